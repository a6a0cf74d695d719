//! Pod networks: the built-in bridge and CNI plugins.
//!
//! [`Network`] is the whole surface: `set_up` makes and pins a pod's network namespace and attaches it, `tear_down`
//! undoes that from nothing but the pod's id and what was recorded before. Behind it are two ways to attach a pod:
//!
//! * `builtin`: a bridge per daemon with IPv4 and IPv6 ranges, masquerading and host ports, made by netlink alone; no
//!   process is started for a pod.
//! * `cni`: the plugins of a CNI configuration, by the letter of the CNI specification 1.1.
//!
//! Every effect outside this process is written down in the data directory before it happens (`ledger`), so that a
//! killed daemon's successor can undo it.
#![forbid(unsafe_code)]

mod bandwidth;
mod builtin;
mod cni;
mod config;
mod error;
mod ledger;
mod namespace;
mod netlink;
mod network;
mod pod;
mod sysctl;

pub use config::{Mode, NetworkConfig};
pub use error::NetworkError;
pub use network::Network;
pub use pod::{Attachment, Bandwidth, Dns, PodNetwork, PortMapping, Protocol};
