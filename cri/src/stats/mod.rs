//! What pods and containers use: measured where they run, turned into CRI's numbers and into cAdvisor's metrics.
//!
//! A launcher measures its pod ([`crate::sandbox::Launcher::measure`]) and answers with a [`PodUsage`], whatever kind of
//! sandbox it is; [`host`] does it for processes of the host. Everything past that is the same for all pods.

pub mod convert;
pub mod disk;
pub mod host;
pub mod metrics;
pub mod network;
pub mod processes;
pub mod rate;

use std::collections::BTreeMap;
use std::path::PathBuf;

use hull_agent::cgroup::stats::{Limits, Usage};

pub use disk::{DiskUsage, Filesystem};
pub use network::Interface;
pub use processes::Details;
pub use rate::Rate;

/// What of a pod is to be measured.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Its agent as the host numbers it; 0 if there is none.
    pub agent_pid: i32,
    /// Its network namespace; `None` on the host's network, whose interfaces are not the pod's.
    pub network_namespace: Option<PathBuf>,
    /// The containers that are meant; those that do not run have nothing to measure and need not be named.
    pub containers: Vec<String>,
    /// Also the pod as a whole.
    pub whole_pod: bool,
    /// Also what only metrics tell: transfers, huge pages, tasks, and what costs more to find out ([`Details`]).
    pub details: bool,
}

/// What a pod uses.
#[derive(Clone, Debug, Default)]
pub struct PodUsage {
    /// The pod as a whole, if that was asked for.
    pub whole: Option<Measured>,
    /// Interfaces of its network namespace, without the loopback.
    pub interfaces: Vec<Interface>,
    /// Its containers by id, as far as they run.
    pub containers: BTreeMap<String, Measured>,
}

/// What a container, or a pod, uses.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// When, nanoseconds since 1970.
    pub at: i64,
    /// Path of its cgroup.
    pub cgroup: String,
    /// The kernel's numbers.
    pub usage: Usage,
    /// Processes that exist.
    pub processes: u64,
    /// The limits.
    pub limits: Limits,
    /// See [`Subject::details`]; none of a pod as a whole.
    pub details: Option<Details>,
}
