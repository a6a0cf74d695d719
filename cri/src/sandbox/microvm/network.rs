//! The machine's one network interface: a tap in the pod's network namespace, between which and the namespace's own
//! interface every frame is redirected. The guest gets the addresses and routes that the namespace has.

use std::os::fd::OwnedFd;

use hull_agent::protocol::messages::{GuestNetwork, guest_network};
use hull_network::tap::{GuestLink, open_guest_link};

use crate::sandbox::{Outside, SandboxError};

/// What CNI and hull's own network call a pod's interface to the cluster.
const INTERFACE: &str = "eth0";

/// What the VMM and the agent need.
pub(super) struct Uplink {
    pub(super) tap: OwnedFd,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    pub(super) guest: GuestNetwork,
}

/// Makes the tap; it goes with its descriptor, the redirection with the namespace. None for a pod without a network.
pub(super) async fn attach(outside: &Outside) -> Result<Option<Uplink>, SandboxError> {
    let Some(namespace) = outside.network_namespace.clone() else { return Ok(None) };
    let opening = tokio::task::spawn_blocking(move || open_guest_link(&namespace, INTERFACE));
    let failed = "attach the network of";
    let link = opening.await.map_err(SandboxError::machine(failed))?;
    let GuestLink { tap, name, mac, mtu, addresses, routes, neighbours } =
        link.map_err(SandboxError::machine(failed))?;
    let text = |address: Option<std::net::IpAddr>| address.map(|one| one.to_string()).unwrap_or_default();
    let routes = routes.into_iter().map(|route| guest_network::Route {
        destination: route.destination.to_string(),
        gateway: text(route.gateway),
        onlink: route.onlink,
        source: text(route.source),
    });
    let neighbours = neighbours
        .into_iter()
        .map(|one| guest_network::Neighbour { address: one.address.to_string(), mac: one.mac.to_vec() });
    let guest = GuestNetwork {
        mac: mac.to_vec(),
        mtu,
        addresses: addresses.iter().map(ToString::to_string).collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        name,
    };
    Ok(Some(Uplink { tap, mac, mtu, guest }))
}
