use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the network needs to know of a pod. `id` alone is enough to undo; the rest is used to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNetwork {
    /// Sandbox id: 1 to 128 of `[A-Za-z0-9_.-]`, the first a letter or digit. Names the namespace.
    pub id: String,
    /// Kubernetes name of the pod (CNI_ARGS K8S_POD_NAME).
    pub name: String,
    /// Kubernetes namespace of the pod (CNI_ARGS K8S_POD_NAMESPACE).
    pub namespace: String,
    /// Kubernetes UID of the pod (CNI_ARGS K8S_POD_UID).
    pub uid: String,
    /// Host name of the pod; kept for plugins, the network does not set it.
    pub hostname: String,
    /// Host ports. Entries with `host_port` 0 are ignored, as CRI asks.
    pub port_mappings: Vec<PortMapping>,
    /// Pod annotations; nothing is read from them but by [`Bandwidth::from_annotations`].
    pub annotations: BTreeMap<String, String>,
    /// Rate limits (CNI capability `bandwidth`; the built-in network shapes both directions itself).
    pub bandwidth: Option<Bandwidth>,
    /// Resolver settings (CNI capability `dns`).
    pub dns: Option<Dns>,
}

/// One port of the host that leads to one of the pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port inside the pod, 1 to 65535.
    pub container_port: u16,
    /// Port of the host; 0: no mapping.
    pub host_port: u16,
    /// Address of the host on which the port answers; `None` or the unspecified address: on all of them.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
}

/// Transport protocol of a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Rate limits of a pod, in bits per second and bits; 0: no limit in that direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Bandwidth {
    /// Into the pod, bits per second.
    pub ingress_rate: u64,
    /// Bits that may pass at once into the pod.
    pub ingress_burst: u64,
    /// Out of the pod, bits per second.
    pub egress_rate: u64,
    /// Bits that may pass at once out of the pod.
    pub egress_burst: u64,
}

/// Resolver settings of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// resolv.conf options.
    pub options: Vec<String>,
}

/// How a pod is attached; recorded by the caller and shown as PodSandboxStatus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pinned namespace: the same as [`crate::Network::namespace_path`] of the pod's id.
    pub namespace: PathBuf,
    /// Addresses of the pod's eth0, the primary first. Never empty.
    pub addresses: Vec<IpAddr>,
    /// `builtin`, or the name of the CNI network.
    pub network: String,
}
