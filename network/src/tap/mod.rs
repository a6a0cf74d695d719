//! What a microVM pod needs of its network: a tap in the pod's network namespace that stands for the pod's interface.
//!
//! The pod's namespace is made and attached as for any pod, by the built-in network or by CNI plugins. Then everything that
//! comes in at its interface goes out at the tap, and the other way round (tc: an ingress queueing discipline and one
//! redirecting filter on each). The guest takes over the interface's MAC and addresses; nothing but the namespace's end
//! is needed to undo it, and the tap itself goes with its last descriptor. So host ports, masquerading, bandwidth limits and
//! whatever a plugin did at the host's end hold for a guest as for any pod.
//!
//! The interface keeps its addresses on the host's side: plugins' CHECK and [`Network::check`](crate::Network::check)
//! compare them. Nothing there answers to them, since no packet gets past the redirection; the kernel is kept from
//! soliciting routers with them, and IPv6 is off on the tap.

/// What the guest must be told of the interface.
mod facts;
/// The redirection between interface and tap.
mod redirect;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use ipnet::IpNet;

use crate::netlink::{Batch, Socket};
use crate::{NetworkError, namespace, sysctl};

/// Name of the tap in the pod's namespace.
const TAP: &str = "hull-tap";

/// The pod's interface, as the guest has it.
#[derive(Debug)]
pub struct GuestLink {
    /// The other end of the wire: Ethernet frames with virtio-net headers, non-blocking. The tap lives as long as this
    /// descriptor or a copy.
    pub tap: OwnedFd,
    /// Name of the interface: "eth0".
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses, each with the length of its network's prefix. Link-local ones are not among them: the guest makes
    /// its own. To be added without a route of their own (IFA_F_NOPREFIXROUTE): all routes are in `routes`.
    pub addresses: Vec<IpNet>,
    /// All routes over it, in an order in which they can be added.
    pub routes: Vec<GuestRoute>,
    /// Neighbours that were set for good.
    pub neighbours: Vec<GuestNeighbour>,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRoute {
    /// Where to.
    pub destination: IpNet,
    /// By whom; `None`: directly.
    pub gateway: Option<IpAddr>,
    /// The gateway is taken to be on the link whatever the addresses say.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// The least is preferred.
    pub metric: u32,
}

/// Somebody on the link whose Ethernet address need not be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNeighbour {
    /// IP address.
    pub address: IpAddr,
    /// Ethernet address.
    pub mac: [u8; 6],
}

/// Puts a tap in the place of the interface `name` (usually "eth0") in the network namespace pinned at `pin`, and reads
/// what the guest must be told. May be called again while no tap of the pod's is open (the caller ended in between): it
/// makes a new one. Blocks for some milliseconds.
///
/// # Errors
/// A namespace that is none, an interface that is missing, down, not Ethernet, or not alone (the names of the others
/// are given), a kernel without taps, the ingress discipline, the
/// mirred action, and both of the filters matchall and u32.
pub fn open_guest_link(pin: &Path, name: &str) -> Result<GuestLink, NetworkError> {
    let namespace = namespace::open(pin)?;
    hull_sys::namespace::on_thread_in(&[namespace.as_fd()], || take_over(name)).map_err(|source| {
        NetworkError::Kernel { action: format!("entering network namespace {}", pin.display()), source }
    })?
}

/// In the pod's namespace.
fn take_over(name: &str) -> Result<GuestLink, NetworkError> {
    let socket = Socket::route()?;
    let interface = facts::interface(&socket, name)?;
    let tap = hull_sys::tun::make_tap(TAP).map_err(|source| failure("making a tap for the guest", source))?;
    if sysctl::has_ipv6() {
        sysctl::set(&format!("ipv6/conf/{TAP}/disable_ipv6"), "1")?;
        for setting in ["accept_ra", "router_solicitations"] {
            sysctl::set(&format!("ipv6/conf/{name}/{setting}"), "0")?;
        }
    }
    let index = socket.link_index(TAP)?;
    let mut batch = Batch::new();
    batch.set_mtu(index, interface.mtu);
    batch.set_up(index, "the guest's tap");
    socket.execute(&batch)?;
    redirect::both_ways(&socket, (interface.index, name), (index, TAP))?;
    Ok(GuestLink {
        tap,
        name: name.to_owned(),
        mac: interface.mac,
        mtu: interface.mtu,
        addresses: facts::addresses(&socket, interface.index)?,
        routes: facts::routes(&socket, interface.index)?,
        neighbours: facts::neighbours(&socket, interface.index)?,
    })
}

fn failure(action: &str, source: io::Error) -> NetworkError {
    NetworkError::Kernel { action: action.to_owned(), source }
}
