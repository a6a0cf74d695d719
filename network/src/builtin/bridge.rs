//! The bridge: the one link between all pods and the host, with the first address of each range.

use ipnet::IpNet;
use rustix::io::Errno;

use super::address::gateway;
use super::marks::Marks;
use crate::netlink::route::Link;
use crate::netlink::{Batch, Socket};
use crate::{NetworkError, sysctl};

const DEFAULT_MTU: u32 = 1500;

/// The bridge as it stands.
#[derive(Clone, Debug)]
pub(super) struct Bridge {
    pub(super) index: u32,
    pub(super) mtu: u32,
}

/// Makes the bridge if it is missing, and gives it what it lacks.
pub(super) fn ensure(
    socket: &Socket,
    marks: &Marks,
    mtu: Option<u32>,
    subnets: &[IpNet],
) -> Result<Bridge, NetworkError> {
    let name = &marks.bridge;
    let links = socket.links()?;
    let found = links.iter().find(|link| link.name == *name);
    if let Some(link) = found
        && link.alias != marks.bridge_alias()
    {
        return Err(NetworkError::Config(format!(
            "link {name} exists and is not this daemon's (its alias is {:?}, not {:?}); choose another name for the \
             bridge or delete it",
            link.alias,
            marks.bridge_alias()
        )));
    }
    refuse_overlaps(socket, &links, found.map(|link| link.index), subnets)?;
    let mtu = match (mtu, found) {
        (Some(mtu), _) => mtu,
        (None, Some(link)) => link.mtu,
        (None, None) => mtu_of_default_route(socket, &links)?,
    };
    if found.is_none() {
        let mut batch = Batch::new();
        batch.add_bridge(name, marks.bridge_mac(), mtu);
        // In the same datagram: killed between the two, hulld would leave a bridge that it takes for somebody else's.
        batch.set_alias(name, &marks.bridge_alias());
        socket.execute(&batch)?;
    }
    let index = socket.link_index(name)?;
    configure(socket, name, index, mtu, found.map(|link| link.mtu), subnets)?;
    Ok(Bridge { index, mtu })
}

fn configure(
    socket: &Socket,
    name: &str,
    index: u32,
    mtu: u32,
    mtu_before: Option<u32>,
    subnets: &[IpNet],
) -> Result<(), NetworkError> {
    let has = |v4: bool| subnets.iter().any(|subnet| subnet.addr().is_ipv4() == v4);
    if has(true) {
        // So that the host reaches host ports on 127.0.0.1; the table's "raw" chain closes what this opens.
        sysctl::set(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
    }
    if has(false) {
        for (setting, value) in
            [("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0"), ("autoconf", "0")]
        {
            sysctl::set(&format!("ipv6/conf/{name}/{setting}"), value)?;
        }
    }
    let mut batch = Batch::new();
    if mtu_before.is_some_and(|before| before != mtu) {
        batch.set_mtu(index, mtu);
    }
    for subnet in subnets {
        batch.add_address(index, gateway(*subnet));
    }
    batch.set_up(index, name);
    socket.execute(&batch)?;
    sysctl::enable_forwarding(has(true), has(false))
}

/// Two interfaces with the same network would steal each other's packets.
fn refuse_overlaps(
    socket: &Socket,
    links: &[Link],
    own: Option<u32>,
    subnets: &[IpNet],
) -> Result<(), NetworkError> {
    for (index, address) in socket.addresses()? {
        let overlaps =
            |subnet: &&IpNet| subnet.contains(&address.trunc()) || address.trunc().contains(*subnet);
        if Some(index) != own
            && let Some(subnet) = subnets.iter().find(overlaps)
        {
            let name = links.iter().find(|link| link.index == index).map_or("?", |link| &link.name);
            return Err(NetworkError::Config(format!(
                "the range {subnet} for pods overlaps {address} of interface {name}; choose another range"
            )));
        }
    }
    Ok(())
}

fn mtu_of_default_route(socket: &Socket, links: &[Link]) -> Result<u32, NetworkError> {
    let index = socket.default_route_link()?;
    Ok(links.iter().find(|link| Some(link.index) == index).map_or(DEFAULT_MTU, |link| link.mtu))
}

/// Whether this daemon's bridge is there.
pub(super) fn is_ours(socket: &Socket, marks: &Marks) -> Result<bool, NetworkError> {
    match socket.link_index(&marks.bridge) {
        Err(error) if error.errno == Errno::NODEV => return Ok(false),
        other => other?,
    };
    let is_ours = |link: &Link| link.name == marks.bridge && link.alias == marks.bridge_alias();
    Ok(socket.links()?.iter().any(is_ours))
}

/// Removes the bridge; one that is gone is fine.
pub(super) fn remove(socket: &Socket, marks: &Marks) -> Result<(), NetworkError> {
    let mut batch = Batch::new();
    batch.delete_link(&marks.bridge);
    Ok(socket.execute(&batch)?)
}
