//! Pod networks: the built-in bridge and CNI plugins.
//!
//! [`Network`] is the whole surface: `set_up` makes and pins a pod's network namespace and attaches it, `tear_down`
//! undoes that from nothing but the pod's id and what was recorded before. Behind it are two ways to attach a pod:
//!
//! * `builtin`: a bridge per daemon with IPv4 and IPv6 ranges, masquerading and host ports, made by netlink alone; no
//!   process is started for a pod.
//! * `cni`: the plugins of a CNI configuration, by the letter of the CNI specification 1.1.
//!
//! What the built-in network changes on the host, while there are pods: the bridge, an nftables table of the same name
//! (inet family), `route_localnet` on the bridge, one veth per pod. What stays: `net.ipv4.ip_forward` and
//! `net.ipv6.conf.all.forwarding` are 1, and interfaces that accepted router advertisements have `accept_ra` 2 so that
//! they still do. It needs no iptables. Limits worth knowing:
//!
//! * Another table's DROP wins over our accept. Beside Docker (iptables FORWARD policy DROP) pods reach the outside only
//!   with `iptables -I DOCKER-USER -i hull0 -j ACCEPT` and `iptables -I DOCKER-USER -o hull0 -j ACCEPT`.
//! * A host port answers on every address of the host and on 127.0.0.1, but not on ::1: the kernel routes nothing from
//!   there to another link. It is refused at once, so that clients try 127.0.0.1.
//! * From 127.0.0.1, and from a pod through a host port, the receiver sees the bridge's address.
//! * Pods of a bridge are not kept from each other; NetworkPolicy needs a CNI plugin that has it.
//! * In the host's network namespace (hostNetwork) ports are the pod's own; nothing here is called for such a pod.
//!
//! A microVM pod's guest takes the place of its namespace's interface: see [`tap`].
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
/// When things that are made in advance are made again; waiting agents, which hulld makes, as well as namespaces.
pub mod refill;
mod sysctl;
/// The guest's end of a microVM pod's network.
pub mod tap;

pub use config::{Mode, NetworkConfig};
pub use error::NetworkError;
pub use network::Network;
pub use pod::{Attachment, Bandwidth, Dns, PodNetwork, PortMapping, Protocol};
