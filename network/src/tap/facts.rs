use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{GuestNeighbour, GuestRoute, TAP};
use crate::NetworkError;
use crate::netlink::{Attributes, Batch, NetlinkError, Socket};

// linux/rtnetlink.h
const NEWLINK: u16 = 16;
const GETLINK: u16 = 18;
const NEWROUTE: u16 = 24;
const GETROUTE: u16 = 26;
const NEWNEIGH: u16 = 28;
const GETNEIGH: u16 = 30;
const F_DUMP: u16 = 0x300;

const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const ETHERNET: u16 = 1;
const UP: u32 = 1;
const LOOPBACK: u32 = 8;

const ROUTE_DESTINATION: u16 = 1;
const ROUTE_LINK: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const ROUTE_PRIORITY: u16 = 6;
const ROUTE_SOURCE: u16 = 7;
const ROUTE_TABLE: u16 = 15;
const ROUTE_VIA: u16 = 18;
const TABLE_MAIN: u32 = 254;
const TYPE_UNICAST: u8 = 1;
/// RTM_F_CLONED: a cached entry, and not a route.
const CLONED: u32 = 0x200;
/// RTNH_F_ONLINK.
const ON_LINK: u32 = 4;

const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_LINK_ADDRESS: u16 = 2;
const PERMANENT: u16 = 0x80;

const INET: u8 = 2;
const INET6: u8 = 10;
/// Most routes, addresses and neighbours that a guest is told of, each.
const MOST: usize = 1024;

pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
}

struct Found {
    index: u32,
    name: String,
    kind: u16,
    flags: u32,
    mac: Option<[u8; 6]>,
    mtu: u32,
}

/// The pod's interface, which must be the only one that is up, loopback and a tap of ours aside. (Modules leave links that
/// are down in every namespace: tunl0, sit0 and the like.)
pub(super) fn interface(socket: &Socket, name: &str) -> Result<Interface, NetworkError> {
    let links = links(socket)?;
    let unfit =
        |reason: String| NetworkError::Config(format!("a microVM pod cannot have this network: {reason}"));
    let others: Vec<&str> = links
        .iter()
        .filter(|link| link.flags & UP != 0 && link.flags & LOOPBACK == 0)
        .filter(|link| link.name != name && link.name != TAP)
        .map(|link| link.name.as_str())
        .collect();
    if !others.is_empty() {
        return Err(unfit(format!(
            "beside {name} there is {}; one interface is supported",
            others.join(", ")
        )));
    }
    let link = links.into_iter().find(|link| link.name == name);
    let link = link.ok_or_else(|| unfit(format!("there is no interface {name}")))?;
    if link.flags & UP == 0 {
        return Err(unfit(format!("interface {name} is down")));
    }
    match link.mac {
        Some(mac) if link.kind == ETHERNET => Ok(Interface { index: link.index, mac, mtu: link.mtu }),
        _ => Err(unfit(format!("interface {name} is not Ethernet (type {})", link.kind))),
    }
}

fn links(socket: &Socket) -> Result<Vec<Found>, NetlinkError> {
    let mut found: Vec<Found> = Vec::new();
    dump::<16>(socket, GETLINK, NEWLINK, 0, "listing links of the pod", |header, attributes| {
        // struct ifinfomsg: family, type, index, flags, change.
        let [_, _, kind0, kind1, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *header;
        let index = u32::from_ne_bytes([i0, i1, i2, i3]);
        if found.iter().any(|link| link.index == index) {
            return;
        }
        found.push(Found {
            index,
            name: attributes.string(LINK_NAME).unwrap_or_default(),
            kind: u16::from_ne_bytes([kind0, kind1]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            mac: attributes.get(LINK_ADDRESS).and_then(|address| address.try_into().ok()),
            mtu: attributes.u32(LINK_MTU).unwrap_or_default(),
        });
    })?;
    Ok(found)
}

/// Addresses of the link, in the kernel's order, without link-local ones of IPv6.
pub(super) fn addresses(socket: &Socket, link: u32) -> Result<Vec<IpNet>, NetlinkError> {
    let mut addresses: Vec<IpNet> = Vec::new();
    for (index, address) in socket.addresses()? {
        if index == link && !is_link_local(address.addr()) && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.truncate(MOST);
    Ok(addresses)
}

/// Routes of the main table over the link: first those without a gateway, then those whose gateway they reach.
pub(super) fn routes(socket: &Socket, link: u32) -> Result<Vec<GuestRoute>, NetlinkError> {
    let mut routes: Vec<GuestRoute> = Vec::new();
    for family in [INET, INET6] {
        dump::<12>(socket, GETROUTE, NEWROUTE, family, "listing routes of the pod", |header, attributes| {
            if let Some(route) = route(header, attributes, link)
                && !routes.contains(&route)
                && routes.len() < MOST
            {
                routes.push(route);
            }
        })?;
    }
    routes.sort_by_key(|route| route.gateway.is_some());
    Ok(routes)
}

fn route(header: &[u8; 12], attributes: Attributes<'_>, link: u32) -> Option<GuestRoute> {
    // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
    let [family, prefix, source_prefix, _, table, _, _, kind, f0, f1, f2, f3] = *header;
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    let table = attributes.u32(ROUTE_TABLE).unwrap_or(table.into());
    let is_plain = table == TABLE_MAIN && kind == TYPE_UNICAST && source_prefix == 0 && flags & CLONED == 0;
    if !is_plain || attributes.u32(ROUTE_LINK) != Some(link) {
        return None;
    }
    let anywhere: IpAddr = if family == INET { [0; 4].into() } else { [0; 16].into() };
    let destination = match attributes.get(ROUTE_DESTINATION) {
        Some(bytes) => ip(bytes)?,
        None => anywhere,
    };
    if is_link_local(destination) || destination.is_multicast() {
        return None;
    }
    // A gateway of the other family: le16 family, then the address.
    let via = || attributes.get(ROUTE_VIA).and_then(|via| via.get(2..)).and_then(ip);
    Some(GuestRoute {
        destination: IpNet::new(destination, prefix).ok()?,
        gateway: attributes.get(ROUTE_GATEWAY).and_then(ip).or_else(via),
        onlink: flags & ON_LINK != 0,
        source: attributes.get(ROUTE_SOURCE).and_then(ip),
        metric: attributes.u32(ROUTE_PRIORITY).unwrap_or_default(),
    })
}

/// Neighbours on the link that were set for good.
pub(super) fn neighbours(socket: &Socket, link: u32) -> Result<Vec<GuestNeighbour>, NetlinkError> {
    let mut found: Vec<GuestNeighbour> = Vec::new();
    let mut known = BTreeSet::new();
    for family in [INET, INET6] {
        let what = "listing neighbours of the pod";
        dump::<12>(socket, GETNEIGH, NEWNEIGH, family, what, |header, attributes| {
            // struct ndmsg: family, padding, ifindex, state, flags, type.
            let [_, _, _, _, i0, i1, i2, i3, s0, s1, ..] = *header;
            let is_wanted = i32::from_ne_bytes([i0, i1, i2, i3]) as u32 == link
                && u16::from_ne_bytes([s0, s1]) & PERMANENT != 0;
            let address = attributes.get(NEIGHBOUR_ADDRESS).and_then(ip);
            let mac = attributes.get(NEIGHBOUR_LINK_ADDRESS).and_then(|mac| mac.try_into().ok());
            if let (true, Some(address), Some(mac)) = (is_wanted, address, mac)
                && known.insert(address)
                && found.len() < MOST
            {
                found.push(GuestNeighbour { address, mac });
            }
        })?;
    }
    Ok(found)
}

/// Lists; each item is a header of N bytes, with the family in its first, and attributes.
fn dump<const N: usize>(
    socket: &Socket,
    request: u16,
    answer: u16,
    family: u8,
    what: &'static str,
    mut item: impl FnMut(&[u8; N], Attributes<'_>),
) -> Result<(), NetlinkError> {
    let mut header = [0; N];
    header[0] = family;
    let mut batch = Batch::new();
    batch.push(request, F_DUMP, what, |m| {
        m.raw(&header);
    });
    socket.list(&batch, |kind, payload| {
        if let Some((header, rest)) = payload.split_first_chunk::<N>()
            && kind == answer
        {
            item(header, Attributes(rest));
        }
    })
}

/// fe80::/10, which every IPv6 interface gives itself.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
