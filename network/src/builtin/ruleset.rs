//! The daemon's own nftables table: masquerading of what leaves the pods' ranges, and host ports.
//!
//! One table of the inet family, named like the bridge. Its rules change only with the ranges; a pod's host ports are
//! elements of four maps, added and removed in microseconds.
//!
//! A verdict "accept" of ours ends only our own chain: where another table drops forwarded packets (Docker sets
//! iptables' FORWARD policy to DROP), that table must allow the bridge itself, e.g. by
//! `iptables -I DOCKER-USER -i hull0 -j ACCEPT` and the same with `-o`.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use rustix::io::Errno;

use super::host_port::HostPort;
use crate::NetworkError;
use crate::netlink::Socket;
use crate::netlink::expression::{Register, Rule, Version};
use crate::netlink::nftables::{Hook, Map, Transaction};

// nft's numbers for field types (its datatype.h), joined by six bits each.
const IPV4_ADDRESS: u32 = 7;
const IPV6_ADDRESS: u32 = 8;
const INET_PROTOCOL: u32 = 12;
const INET_SERVICE: u32 = 13;

const fn joined(types: &[u32]) -> u32 {
    let (mut all, mut i) = (0, 0);
    while i < types.len() {
        all = all << 6 | types[i];
        i += 1;
    }
    all
}

/// Protocol and port on every IPv4 address of the host → pod's address and port.
const ANY_V4: Map = Map {
    name: "host_ports4",
    key_type: joined(&[INET_PROTOCOL, INET_SERVICE]),
    key_length: 8,
    data_type: joined(&[IPV4_ADDRESS, INET_SERVICE]),
    data_length: 8,
};
/// The same for one IPv4 address of the host.
const ONE_V4: Map = Map {
    name: "host_ports4_on",
    key_type: joined(&[IPV4_ADDRESS, INET_PROTOCOL, INET_SERVICE]),
    key_length: 12,
    ..ANY_V4
};
const ANY_V6: Map =
    Map { name: "host_ports6", data_type: joined(&[IPV6_ADDRESS, INET_SERVICE]), data_length: 20, ..ANY_V4 };
const ONE_V6: Map = Map {
    name: "host_ports6_on",
    key_type: joined(&[IPV6_ADDRESS, INET_PROTOCOL, INET_SERVICE]),
    key_length: 24,
    ..ANY_V6
};
const MAPS: [&Map; 4] = [&ANY_V4, &ONE_V4, &ANY_V6, &ONE_V6];

const HOST_PORTS: &str = "host_ports";
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// Adds what is missing of the table and replaces its rules; elements of the maps stay.
pub(super) fn install(socket: &Socket, bridge: &str, subnets: &[IpNet]) -> Result<(), NetworkError> {
    let mut transaction = Transaction::new(bridge);
    transaction.add_table();
    for map in MAPS {
        transaction.add_map(map);
    }
    let hook = |kind, number, priority| Some(Hook { kind, number, priority });
    transaction.add_chain(HOST_PORTS, None);
    transaction.add_chain("raw", hook("filter", PREROUTING, -300));
    transaction.add_chain("prerouting", hook("nat", PREROUTING, -100));
    transaction.add_chain("output", hook("nat", OUTPUT, -100));
    transaction.add_chain("postrouting", hook("nat", POSTROUTING, 100));
    transaction.add_chain("forward", hook("filter", FORWARD, 0));
    translate_host_ports(&mut transaction);
    // The bridge routes 127.0.0.0/8 so that the host reaches its own host ports there; pods must not reach the host's
    // loopback services that way (CVE-2020-8558 was this).
    transaction.add_rule("raw", |rule| {
        rule.input_interface(bridge).version(Version::V4).destination(Version::V4, true, &[127], 8).drop();
    });
    masquerade(&mut transaction, bridge, subnets);
    transaction.add_rule("forward", |rule| rule.input_interface(bridge).accept());
    transaction.add_rule("forward", |rule| rule.output_interface(true, bridge).accept());
    Ok(transaction.commit(socket)?)
}

fn translate_host_ports(transaction: &mut Transaction<'_>) {
    // The kernel routes nothing from ::1 to another link (IPv6 has no route_localnet). Untranslated, a call to ::1 is
    // refused at once and the caller tries 127.0.0.1; translated, it would wait in vain.
    transaction.add_rule("output", |rule| {
        rule.version(Version::V6).destination(Version::V6, true, &Ipv6Addr::LOCALHOST.octets(), 128).accept();
    });
    for chain in ["prerouting", "output"] {
        transaction.add_rule(chain, |rule| rule.destination_is_local().jump(HOST_PORTS));
    }
    for (version, one, any) in [(Version::V4, &ONE_V4, &ANY_V4), (Version::V6, &ONE_V6, &ANY_V6)] {
        let words = version.address_length() / 4;
        let found = |rule: &mut Rule<'_, '_>, map: &Map| {
            rule.map(map.name, Register::nth(0), Register::nth(0));
            rule.translate_destination(version, Register::nth(0), Register::nth(words));
        };
        transaction.add_rule(HOST_PORTS, |rule| {
            rule.version(version).load_destination(version, Register::nth(0));
            rule.load_protocol(Register::nth(words)).load_destination_port(Register::nth(words + 1));
            found(rule, one);
        });
        transaction.add_rule(HOST_PORTS, |rule| {
            rule.version(version).load_protocol(Register::nth(0)).load_destination_port(Register::nth(1));
            found(rule, any);
        });
    }
}

fn masquerade(transaction: &mut Transaction<'_>, bridge: &str, subnets: &[IpNet]) {
    // From the host's own loopback address to a pod through a host port.
    transaction.add_rule("postrouting", |rule| {
        rule.output_interface(true, bridge)
            .version(Version::V4)
            .source(Version::V4, true, &[127], 8)
            .masquerade();
    });
    for subnet in subnets {
        let version = if subnet.addr().is_ipv4() { Version::V4 } else { Version::V6 };
        let network = octets(subnet.network());
        let (is_of, prefix) = (network.as_slice(), subnet.prefix_len());
        // From a pod to a pod through a host port: the answer must come back through the host, not over the bridge.
        transaction.add_rule("postrouting", |rule| {
            rule.version(version).source(version, true, is_of, prefix);
            rule.destination(version, true, is_of, prefix).translated().masquerade();
        });
        // Out of the machine.
        transaction.add_rule("postrouting", |rule| {
            rule.version(version)
                .source(version, true, is_of, prefix)
                .destination(version, false, is_of, prefix);
            rule.output_interface(false, bridge).masquerade();
        });
    }
}

/// Deletes the table with all that is in it; one that is gone is fine.
pub(super) fn remove(socket: &Socket, bridge: &str) -> Result<(), NetworkError> {
    let mut transaction = Transaction::new(bridge);
    transaction.delete_table();
    match transaction.commit(socket) {
        Err(error) if error.errno == Errno::NOENT => Ok(()),
        other => Ok(other?),
    }
}

/// Adds a pod's host ports, all or none.
pub(super) fn add_host_ports(
    socket: &Socket,
    bridge: &str,
    ports: &[HostPort],
    addresses: &[IpAddr],
) -> Result<(), NetworkError> {
    let mut transaction = Transaction::new(bridge);
    for map in MAPS {
        let elements = elements(ports, addresses, map);
        transaction.add_elements(map, &elements);
    }
    Ok(transaction.commit(socket)?)
}

/// Deletes a pod's host ports; those that are gone are fine.
pub(super) fn delete_host_ports(
    socket: &Socket,
    bridge: &str,
    ports: &[HostPort],
    addresses: &[IpAddr],
) -> Result<(), NetworkError> {
    let keys: Vec<(&Map, Vec<u8>)> = MAPS
        .iter()
        .flat_map(|map| elements(ports, addresses, map).into_iter().map(|(key, _)| (*map, key)))
        .collect();
    delete_keys(socket, bridge, &keys)
}

/// Deletes the elements of all maps that belong to none of these pods.
pub(super) fn retain_host_ports<'a>(
    socket: &Socket,
    bridge: &str,
    pods: impl Iterator<Item = (&'a [HostPort], &'a [IpAddr])>,
) -> Result<(), NetworkError> {
    let mut known = std::collections::HashSet::new();
    for (ports, addresses) in pods {
        for map in MAPS {
            known.extend(elements(ports, addresses, map).into_iter().map(|(key, _)| (map.name, key)));
        }
    }
    let mut stray = Vec::new();
    for map in MAPS {
        let keys = match socket.map_keys(bridge, map) {
            Err(error) if error.errno == Errno::NOENT => return Ok(()),
            keys => keys?,
        };
        stray.extend(
            keys.into_iter().map(|key| (map, key)).filter(|(m, key)| !known.contains(&(m.name, key.clone()))),
        );
    }
    delete_keys(socket, bridge, &stray)
}

fn delete_keys(socket: &Socket, bridge: &str, keys: &[(&Map, Vec<u8>)]) -> Result<(), NetworkError> {
    let delete = |keys: &[(&Map, Vec<u8>)]| {
        let mut transaction = Transaction::new(bridge);
        for (map, key) in keys {
            transaction.delete_elements(map, std::slice::from_ref(key));
        }
        transaction.commit(socket)
    };
    if keys.is_empty() {
        return Ok(());
    }
    match delete(keys) {
        // One is gone and the transaction failed as a whole: one by one.
        Err(error) if error.errno == Errno::NOENT => {
            keys.iter().try_for_each(|key| match delete(std::slice::from_ref(key)) {
                Err(error) if error.errno == Errno::NOENT => Ok(()),
                other => Ok(other?),
            })
        }
        other => Ok(other?),
    }
}

/// What `ports` of a pod with these addresses put into `map`.
fn elements(ports: &[HostPort], addresses: &[IpAddr], map: &Map) -> Vec<(Vec<u8>, Vec<u8>)> {
    let is_v4 = map.data_length == ANY_V4.data_length;
    let is_any = map.key_length == ANY_V4.key_length;
    let address = addresses.iter().find(|address| address.is_ipv4() == is_v4);
    let fits = |port: &&HostPort| match port.host_ip {
        None => is_any,
        Some(host_ip) => !is_any && host_ip.is_ipv4() == is_v4,
    };
    let Some(address) = address else { return Vec::new() };
    ports
        .iter()
        .filter(fits)
        .map(|port| {
            let mut key = port.host_ip.map(octets).unwrap_or_default();
            key.extend([port.protocol.number(), 0, 0, 0]);
            key.extend(port_field(port.host_port));
            let mut data = octets(*address);
            data.extend(port_field(port.container_port));
            (key, data)
        })
        .collect()
}

fn port_field(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
