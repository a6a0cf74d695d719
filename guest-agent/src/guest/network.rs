//! The pod's network in a guest: one interface, which the machine was born with, and the loopback.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use hull_sys::namespace::{self, Namespaces};

use super::GuestError;
use super::netlink::{
    CHANGE, CREATE_OR_REPLACE, Netlink, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE, Request,
};
use crate::protocol::messages::{GuestNetwork, guest_network};

/// Most addresses, routes or neighbours; a pod has a handful.
const MAX_ENTRIES: usize = 1024;
/// Bytes of an interface's name without the zero at its end (IFNAMSIZ).
const MAX_NAME: usize = 15;

// linux/if.h, if_link.h, if_addr.h, rtnetlink.h, neighbour.h.
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// No duplicate address detection: the address is usable at once, and the node has given it to nobody else.
const IFA_F_NODAD: u32 = 2;
const IFA_F_PERMANENT: u32 = 0x80;
/// No route comes with an address: all routes are told, and with some plugins (ptp) the pod's network is not on the link.
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// In every namespace (linux/net_namespace.h, LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Brings the loopback up.
pub(super) fn loopback() -> Result<(), GuestError> {
    let system = |error| GuestError::system("bring up the loopback", error);
    Netlink::open().and_then(|mut netlink| netlink.ask(link(LOOPBACK, IFF_UP))).map_err(system)
}

/// Enters the network namespace of a pod that has its own users, and brings the interface along: in the machine's first
/// one those users could change nothing.
pub(super) fn enter(namespace: BorrowedFd<'_>, interface: Option<u32>) -> Result<(), GuestError> {
    let system = |error| GuestError::system("move into the pod's network namespace", error);
    if let Some(index) = interface {
        // It keeps its number: nothing but the loopback is there (net/core/dev.c, __dev_change_net_namespace).
        let moved = link(index, 0).attribute(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
        Netlink::open().and_then(|mut netlink| netlink.ask(moved)).map_err(system)?;
    }
    namespace::enter(namespace, Namespaces::NET).map_err(system)?;
    loopback()
}

/// Gives the machine's interface its name, address, routes and neighbours, and brings it up.
pub(super) fn configure(network: &GuestNetwork, interface: Option<u32>) -> Result<(), GuestError> {
    let entries = network.addresses.len() + network.routes.len() + network.neighbours.len();
    if entries > MAX_ENTRIES {
        return Err(GuestError::invalid(format!("cannot use a network of {entries} addresses and routes")));
    }
    let none = || GuestError::invalid("the machine was born without a network interface");
    let index = interface.ok_or_else(none)?;
    let failed = |doing: String| move |error| GuestError::system(doing, error);
    let mut netlink = Netlink::open().map_err(failed("open netlink".into()))?;
    for request in settings(network, index)? {
        netlink.ask(request).map_err(failed(format!("set up the interface {index}")))?;
    }
    netlink.ask(link(index, IFF_UP)).map_err(failed(format!("bring up the interface {index}")))?;
    for text in &network.addresses {
        netlink.ask(address(index, prefix(text)?)).map_err(failed(format!("add the address {text}")))?;
    }
    for neighbour in &network.neighbours {
        let doing = format!("add the neighbour {}", neighbour.address);
        netlink.ask(neighbour_of(index, neighbour)?).map_err(failed(doing))?;
    }
    for one in &network.routes {
        let doing = format!("add the route to {} by way of {:?}", one.destination, one.gateway);
        netlink.ask(route(index, one)?).map_err(failed(doing))?;
    }
    Ok(())
}

/// The number of the one interface that has a device behind it, if the machine was born with one.
pub(super) fn interface() -> Result<Option<u32>, GuestError> {
    let system = |error| GuestError::system("look for the network interface", error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net").map_err(system)? {
        let entry = entry.map_err(system)?;
        if entry.path().join("device").exists() {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.sort();
    found.first().map(|name| index_of(name)).transpose().map_err(system)
}

fn index_of(interface: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string(Path::new("/sys/class/net").join(interface).join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// A change of the interface: struct ifinfomsg with these flags set.
fn link(index: u32, up: u32) -> Request {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&up.to_ne_bytes());
    fixed[12..16].copy_from_slice(&up.to_ne_bytes());
    Request::new(RTM_NEWLINK, CHANGE, &fixed)
}

/// Name, MAC and MTU, while the interface is down.
fn settings(network: &GuestNetwork, index: u32) -> Result<Vec<Request>, GuestError> {
    let mut request = link(index, 0);
    let name = if network.name.is_empty() { "eth0" } else { &network.name };
    let sound = name.len() <= MAX_NAME
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if !sound {
        return Err(GuestError::invalid(format!("cannot name an interface {name:?}")));
    }
    request = request.attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
    if !network.mac.is_empty() {
        request = request.attribute(IFLA_ADDRESS, mac(&network.mac)?);
    }
    if network.mtu != 0 {
        request = request.attribute(IFLA_MTU, &network.mtu.to_ne_bytes());
    }
    Ok(vec![request])
}

fn mac(bytes: &[u8]) -> Result<&[u8], GuestError> {
    if bytes.len() == 6 { Ok(bytes) } else { Err(GuestError::invalid("a MAC address has six bytes")) }
}

/// struct ifaddrmsg.
fn address(index: u32, prefix: Prefix) -> Request {
    let mut fixed = [family(prefix.address), prefix.length, 0, 0, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let bytes = octets(prefix.address);
    Request::new(RTM_NEWADDR, CREATE_OR_REPLACE, &fixed)
        .attribute(IFA_LOCAL, &bytes)
        .attribute(IFA_ADDRESS, &bytes)
        .attribute(IFA_FLAGS, &(IFA_F_NODAD | IFA_F_PERMANENT | IFA_F_NOPREFIXROUTE).to_ne_bytes())
}

/// struct rtmsg.
fn route(index: u32, route: &guest_network::Route) -> Result<Request, GuestError> {
    let to = prefix(&route.destination)?;
    let gateway = optional(&route.gateway)?;
    let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
    let scope = if gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
    let mut fixed =
        [family(to.address), to.length, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0, 0, 0, 0];
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    let mut request =
        Request::new(RTM_NEWROUTE, CREATE_OR_REPLACE, &fixed).attribute(RTA_OIF, &index.to_ne_bytes());
    if to.length > 0 {
        request = request.attribute(RTA_DST, &octets(to.address));
    }
    for (kind, address) in [(RTA_GATEWAY, gateway), (RTA_PREFSRC, optional(&route.source)?)] {
        let Some(address) = address else { continue };
        if family(address) != family(to.address) {
            return Err(GuestError::invalid(format!(
                "the route to {} goes by way of another kind of address, {address}",
                route.destination
            )));
        }
        request = request.attribute(kind, &octets(address));
    }
    Ok(request)
}

/// struct ndmsg.
fn neighbour_of(index: u32, neighbour: &guest_network::Neighbour) -> Result<Request, GuestError> {
    let address = ip(&neighbour.address)?;
    let mut fixed = [0; 12];
    fixed[0] = family(address);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    Ok(Request::new(RTM_NEWNEIGH, CREATE_OR_REPLACE, &fixed)
        .attribute(NDA_DST, &octets(address))
        .attribute(NDA_LLADDR, mac(&neighbour.mac)?))
}

const fn family(address: IpAddr) -> u8 {
    // AF_INET and AF_INET6 of Linux.
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ip(text: &str) -> Result<IpAddr, GuestError> {
    text.parse().map_err(|_| GuestError::invalid(format!("{text:?} is not an IP address")))
}

fn optional(text: &str) -> Result<Option<IpAddr>, GuestError> {
    if text.is_empty() { Ok(None) } else { ip(text).map(Some) }
}

fn prefix(text: &str) -> Result<Prefix, GuestError> {
    let parse = || {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let length: u8 = length.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (length <= most).then_some(Prefix { address, length })
    };
    parse().ok_or_else(|| GuestError::invalid(format!("{text:?} is not an address with a prefix length")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// In a network namespace of this thread's own.
    fn in_own_network(test: fn()) {
        std::thread::spawn(move || {
            namespace::unshare(Namespaces::NET).unwrap();
            test();
        })
        .join()
        .unwrap();
    }

    fn shown(arguments: &[&str]) -> String {
        // The thread's namespace is inherited.
        let output = Command::new("ip").args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn an_interface_gets_all_that_it_is_told() {
        in_own_network(|| {
            let ip = |words: &str| Command::new("ip").args(words.split(' ')).status().unwrap();
            assert!(ip("link add born0 type veth peer name far0").success());
            assert!(ip("link set far0 up").success());
            let index = shown(&["-o", "link", "show", "born0"]);
            let index: u32 = index.split(':').next().unwrap().trim().parse().unwrap();
            let network = GuestNetwork {
                mac: vec![2, 0, 0, 0, 0, 9],
                mtu: 1400,
                addresses: vec!["10.9.8.7/24".into(), "fd00:9::7/64".into()],
                routes: vec![
                    guest_network::Route { destination: "10.9.8.0/24".into(), ..Default::default() },
                    guest_network::Route { destination: "fd00:9::/64".into(), ..Default::default() },
                    guest_network::Route {
                        destination: "0.0.0.0/0".into(),
                        gateway: "10.9.8.1".into(),
                        source: "10.9.8.7".into(),
                        ..Default::default()
                    },
                    guest_network::Route { destination: "192.0.2.0/24".into(), ..Default::default() },
                    guest_network::Route {
                        destination: "198.51.100.0/24".into(),
                        gateway: "169.254.1.1".into(),
                        onlink: true,
                        ..Default::default()
                    },
                    guest_network::Route {
                        destination: "::/0".into(),
                        gateway: "fd00:9::1".into(),
                        ..Default::default()
                    },
                ],
                neighbours: vec![guest_network::Neighbour {
                    address: "10.9.8.1".into(),
                    mac: vec![2, 0, 0, 0, 0, 1],
                }],
                name: "eth7".into(),
            };
            let mut netlink = Netlink::open().unwrap();
            let mut requests = settings(&network, index).unwrap();
            requests.push(link(index, IFF_UP));
            requests.extend(network.addresses.iter().map(|text| address(index, prefix(text).unwrap())));
            requests.extend(network.neighbours.iter().map(|one| neighbour_of(index, one).unwrap()));
            requests.extend(network.routes.iter().map(|one| route(index, one).unwrap()));
            for request in requests {
                netlink.ask(request).unwrap();
            }
            let link = shown(&["link", "show", "eth7"]);
            assert!(link.contains("mtu 1400") && link.contains("02:00:00:00:00:09"), "{link}");
            let addresses = shown(&["address", "show", "eth7"]);
            assert!(addresses.contains("inet 10.9.8.7/24"), "{addresses}");
            let ours = addresses.lines().find(|line| line.contains("inet6 fd00:9::7/64"));
            assert!(ours.is_some_and(|line| !line.contains("tentative")), "{addresses}");
            let routes = shown(&["route", "show"]);
            assert!(
                routes.contains("default via 10.9.8.1 dev eth7") && routes.contains("src 10.9.8.7"),
                "{routes}"
            );
            assert!(routes.contains("192.0.2.0/24 dev eth7") && routes.contains("scope link"), "{routes}");
            assert!(
                routes.contains("198.51.100.0/24 via 169.254.1.1") && routes.contains("onlink"),
                "{routes}"
            );
            assert!(shown(&["-6", "route", "show"]).contains("default via fd00:9::1"));
            assert!(!routes.contains("proto kernel"), "{routes}");
            let neighbours = shown(&["neighbour", "show"]);
            assert!(
                neighbours.contains("10.9.8.1 dev eth7 lladdr 02:00:00:00:00:01 PERMANENT"),
                "{neighbours}"
            );
        });
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for text in ["", "10.0.0.1", "10.0.0.1/33", "fd00::/129", "x/8", "10.0.0.1/-1"] {
            assert!(prefix(text).is_err(), "{text}");
        }
        assert!(mac(&[0; 5]).is_err());
        let named = |name: &str| settings(&GuestNetwork { name: name.into(), ..Default::default() }, 1);
        assert!(named("").is_ok() && named("net1").is_ok());
        assert!(named("sixteen-letters!").is_err() && named("a/b").is_err() && named("..").is_err());
        let mixed = guest_network::Route {
            destination: "10.0.0.0/8".into(),
            gateway: "fd00::1".into(),
            ..Default::default()
        };
        assert!(route(1, &mixed).is_err());
    }
}
