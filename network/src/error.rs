use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::Protocol;

/// Why something about a pod's network could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The configuration cannot be used.
    #[error("network configuration: {0}")]
    Config(String),
    /// The pod's description cannot be used.
    #[error("network of pod {pod}: {reason}")]
    Invalid {
        /// Pod id.
        pod: String,
        /// What is wrong.
        reason: String,
    },
    /// No network to attach pods to yet.
    #[error("network is not ready: {0}")]
    NotReady(String),
    /// A file or directory could not be used.
    #[error("{action} {path}: {source}")]
    File {
        /// What was being done, e.g. "writing".
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused something.
    #[error("{action}: {source}")]
    Kernel {
        /// What was being done, to which thing.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// All addresses of a range are in use or in quarantine.
    #[error("no free address for pod {pod} in {subnet}")]
    NoAddress {
        /// Pod id.
        pod: String,
        /// The range.
        subnet: ipnet::IpNet,
    },
    /// The host port belongs to somebody else.
    #[error("host port {port}/{protocol:?}{} for pod {pod} is already used by {owner}", .address.map(|a| format!(" on {a}")).unwrap_or_default())]
    PortInUse {
        /// Pod that wants it.
        pod: String,
        /// Transport protocol.
        protocol: Protocol,
        /// Port of the host.
        port: u16,
        /// Address of the host, `None`: all.
        address: Option<IpAddr>,
        /// Who has it.
        owner: String,
    },
    /// A CNI plugin or configuration failed.
    #[error("CNI network {network}, plugin {plugin}, {command}: {reason}")]
    Cni {
        /// Name of the network.
        network: String,
        /// Plugin type.
        plugin: String,
        /// ADD, DEL, CHECK, STATUS or GC.
        command: &'static str,
        /// What went wrong, with the plugin's own code, message and details.
        reason: String,
    },
    /// A task of this crate ended before its work was done.
    #[error("network of pod {pod}: {reason}")]
    Interrupted {
        /// Pod id.
        pod: String,
        /// What happened.
        reason: String,
    },
    /// Several things that were all tried failed.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<NetworkError>),
}

impl NetworkError {
    /// The outcome of things that were all tried, from those that failed.
    pub(crate) fn all(mut failures: Vec<NetworkError>) -> Result<(), NetworkError> {
        if failures.len() > 1 {
            return Err(NetworkError::Several(failures));
        }
        failures.pop().map_or(Ok(()), Err)
    }
}
