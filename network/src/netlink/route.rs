use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use rustix::io::Errno;

use super::message::{F_CREATE, F_DUMP, F_EXCL, F_REPLACE};
use super::{Attributes, Batch, Message, NetlinkError, Socket};

// linux/rtnetlink.h
const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const SETLINK: u16 = 19;
const NEWADDR: u16 = 20;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const GETROUTE: u16 = 26;
const NEWQDISC: u16 = 36;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const TYPE_UNICAST: u8 = 1;
const DESTINATION: u16 = 1;
const OUTPUT_INTERFACE: u16 = 4;
const GATEWAY: u16 = 5;
const PRIORITY: u16 = 6;

// linux/if_link.h
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const MASTER: u16 = 10;
const INFO: u16 = 18;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_PORT_KIND: u16 = 4;
const INFO_PORT_DATA: u16 = 5;
const PORT_HAIRPIN: u16 = 4;
const ALIAS: u16 = 20;
const FAMILY_SPECIFIC: u16 = 26;
const NAMESPACE_FD: u16 = 28;
const TX_QUEUES: u16 = 31;
const RX_QUEUES: u16 = 32;
const VETH_PEER: u16 = 1;
const BRIDGE_MULTICAST_SNOOPING: u16 = 23;
const INET6_ADDRESS_GENERATION: u16 = 8;
const GENERATE_NONE: u8 = 1;
const UP: u32 = 1;

// linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
/// No duplicate address detection: the addresses are ours to give.
const IFA_NODAD: u32 = 2;

const INET: u8 = 2;
const INET6: u8 = 10;

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// A pair of links, one end on the bridge, the other inside a pod.
pub(crate) struct Veth<'a> {
    pub(crate) host_name: &'a str,
    pub(crate) host_mac: Mac,
    pub(crate) alias: &'a str,
    /// Interface index of the bridge.
    pub(crate) bridge: u32,
    pub(crate) mtu: u32,
    pub(crate) pod_name: &'a str,
    pub(crate) pod_mac: Mac,
    pub(crate) pod_namespace: BorrowedFd<'a>,
}

/// A link as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: String,
    pub(crate) mtu: u32,
    pub(crate) master: Option<u32>,
}

impl Batch {
    /// A bridge, down, whose own Ethernet address stays when ports come and go.
    pub(crate) fn add_bridge(&mut self, name: &str, mac: Mac, mtu: u32) {
        self.push(NEWLINK, F_CREATE | F_EXCL, format!("creating bridge {name}"), |m| {
            m.raw(&link_header(0, 0)).string(NAME, name).attribute(ADDRESS, &mac).u32(MTU, mtu);
            m.nested(INFO, |m| {
                m.string(INFO_KIND, "bridge").nested(INFO_DATA, |m| {
                    // Without a querier on the bridge snooping would only ever lose neighbour discovery.
                    m.attribute(BRIDGE_MULTICAST_SNOOPING, &[0]);
                });
            });
        });
    }

    /// A new link takes no alias (the kernel ignores it there), and one batch with its making would mark whatever link
    /// has its name already.
    pub(crate) fn set_alias(&mut self, name: &str, alias: &str) {
        self.push(SETLINK, 0, format!("marking link {name}"), |m| {
            m.raw(&link_header(0, 0)).string(NAME, name).string(ALIAS, alias);
        });
    }

    /// A pair of links, both down (a veth cannot be up before it has its peer), the pod's end born in its namespace.
    pub(crate) fn add_veth(&mut self, veth: &Veth<'_>) {
        let name = veth.host_name;
        self.push(NEWLINK, F_CREATE | F_EXCL, format!("creating link {name} to the pod"), |m| {
            m.raw(&link_header(0, 0))
                .string(NAME, name)
                .attribute(ADDRESS, &veth.host_mac)
                .u32(MTU, veth.mtu);
            // One queue: the default is one for each possible CPU, which costs time and memory and brings nothing.
            m.u32(TX_QUEUES, 1).u32(RX_QUEUES, 1);
            m.nested(INFO, |m| {
                m.string(INFO_KIND, "veth").nested(INFO_DATA, |m| {
                    m.nested(VETH_PEER, |m| {
                        m.raw(&link_header(0, 0))
                            .string(NAME, veth.pod_name)
                            .attribute(ADDRESS, &veth.pod_mac);
                        m.u32(MTU, veth.mtu).u32(TX_QUEUES, 1).u32(RX_QUEUES, 1);
                        m.u32(NAMESPACE_FD, veth.pod_namespace.as_raw_fd() as u32);
                    });
                });
            });
        });
    }

    /// Marks the host's end of a pair and sets it up on the bridge, without an IPv6 address of its own. Not in one batch
    /// with `add_veth`: if that fails because the name is taken, this would change the link that has it.
    pub(crate) fn attach_veth(&mut self, veth: &Veth<'_>) {
        let name = veth.host_name;
        self.push(SETLINK, 0, format!("attaching link {name} to the bridge"), |m| {
            m.raw(&link_header(0, UP)).string(NAME, name).string(ALIAS, veth.alias).u32(MASTER, veth.bridge);
            m.nested(FAMILY_SPECIFIC, |m| {
                m.nested(u16::from(INET6), |m| {
                    m.attribute(INET6_ADDRESS_GENERATION, &[GENERATE_NONE]);
                });
            });
        });
        self.let_hairpin(name);
    }

    /// With br_netfilter (Kubernetes loads it) a pod that calls its own host port is translated on the bridge, and the
    /// frame must go back through the port it came from.
    fn let_hairpin(&mut self, name: &str) {
        let what = format!("letting link {name} hairpin");
        self.push_tolerating(&[Errno::NODEV], NEWLINK, 0, what, |m| {
            m.raw(&link_header(0, 0)).string(NAME, name).nested(INFO, |m| {
                m.string(INFO_PORT_KIND, "bridge").nested(INFO_PORT_DATA, |m| {
                    m.attribute(PORT_HAIRPIN, &[1]);
                });
            });
        });
    }

    /// Puts a link on a bridge; a link that is gone is fine.
    pub(crate) fn set_bridge(&mut self, name: &str, bridge: u32) {
        let what = format!("attaching link {name} to the bridge again");
        self.push_tolerating(&[Errno::NODEV], SETLINK, 0, what, |m| {
            m.raw(&link_header(0, UP)).string(NAME, name).u32(MASTER, bridge);
        });
        self.let_hairpin(name);
    }

    pub(crate) fn set_up(&mut self, index: u32, what: &str) {
        self.push(SETLINK, 0, format!("setting {what} up"), |m| {
            m.raw(&link_header(index, UP));
        });
    }

    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) {
        self.push(SETLINK, 0, format!("setting MTU {mtu}"), |m| {
            m.raw(&link_header(index, 0)).u32(MTU, mtu);
        });
    }

    /// Removes a link by name; one that is gone is fine.
    pub(crate) fn delete_link(&mut self, name: &str) {
        self.push_tolerating(&[Errno::NODEV], DELLINK, 0, format!("removing link {name}"), |m| {
            m.raw(&link_header(0, 0)).string(NAME, name);
        });
    }

    /// An address with the prefix of its network; one that is there already is fine.
    pub(crate) fn add_address(&mut self, index: u32, address: IpNet) {
        self.push_tolerating(
            &[Errno::EXIST],
            NEWADDR,
            F_CREATE | F_EXCL,
            format!("adding address {address}"),
            |m| {
                m.raw(&address_header(index, address));
                with_ip(m, IFA_LOCAL, address.addr());
                with_ip(m, IFA_ADDRESS, address.addr());
                match address {
                    IpNet::V4(net) => m.attribute(IFA_BROADCAST, &net.broadcast().octets()),
                    IpNet::V6(_) => m.u32(IFA_FLAGS, IFA_NODAD),
                };
            },
        );
    }

    pub(crate) fn add_default_route(&mut self, index: u32, gateway: IpAddr) {
        let what = format!("adding the default route through {gateway}");
        self.push(NEWROUTE, F_CREATE | F_REPLACE, what, |m| {
            m.raw(&[family(gateway), 0, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, 0, TYPE_UNICAST, 0, 0, 0, 0]);
            with_ip(m, GATEWAY, gateway);
            m.u32(OUTPUT_INTERFACE, index);
        });
    }

    /// Shapes what leaves through a link with a token bucket; `rate` in bytes per second, `burst` in bytes.
    pub(crate) fn add_token_bucket(&mut self, index: u32, rate: u64, burst: u32, what: &str) {
        self.push(NEWQDISC, F_CREATE | F_REPLACE, format!("limiting the rate of {what}"), |m| {
            token_bucket(m, index, rate, burst);
        });
    }
}

impl Socket {
    /// Index of the link with this name in the socket's namespace.
    pub(crate) fn link_index(&self, name: &str) -> Result<u32, NetlinkError> {
        rustix::net::netdevice::name_to_index(self, name)
            .map_err(|errno| NetlinkError { what: format!("looking for link {name}"), errno })
    }

    pub(crate) fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push(GETLINK, F_DUMP, "listing links", |m| {
            m.raw(&link_header(0, 0));
        });
        let mut links = Vec::new();
        self.list(&batch, |kind, payload| {
            let (Some(header), Some(rest)) = (payload.first_chunk::<16>(), payload.get(16..)) else { return };
            let attributes = Attributes(rest);
            if kind == NEWLINK {
                links.push(Link {
                    index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
                    name: attributes.string(NAME).unwrap_or_default(),
                    alias: attributes.string(ALIAS).unwrap_or_default(),
                    mtu: attributes.u32(MTU).unwrap_or_default(),
                    master: attributes.u32(MASTER),
                });
            }
        })?;
        links.sort_by_key(|link| link.index);
        links.dedup_by_key(|link| link.index);
        Ok(links)
    }

    /// All addresses of the namespace, each with the index of its link.
    pub(crate) fn addresses(&self) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push(GETADDR, F_DUMP, "listing addresses", |m| {
            m.raw(&[0; 8]);
        });
        let mut addresses = Vec::new();
        self.list(&batch, |kind, payload| {
            let (Some(header), Some(rest)) = (payload.first_chunk::<8>(), payload.get(8..)) else { return };
            let attributes = Attributes(rest);
            // On a point-to-point link ADDRESS is the other end; LOCAL is absent for most of IPv6.
            let value = attributes.get(IFA_LOCAL).or_else(|| attributes.get(IFA_ADDRESS));
            let address = value.and_then(ip).and_then(|ip| IpNet::new(ip, header[1]).ok());
            if let (NEWADDR, Some(address)) = (kind, address) {
                let index = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
                addresses.push((index, address));
            }
        })?;
        Ok(addresses)
    }

    /// Index of the link that the best IPv4 or else IPv6 default route of the main table leads to.
    pub(crate) fn default_route_link(&self) -> Result<Option<u32>, NetlinkError> {
        for family in [INET, INET6] {
            let mut batch = Batch::new();
            batch.push(GETROUTE, F_DUMP, "listing routes", |m| {
                m.raw(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            });
            let mut best: Option<(u32, u32)> = None;
            self.list(&batch, |kind, payload| {
                let (Some(header), Some(rest)) = (payload.first_chunk::<12>(), payload.get(12..)) else {
                    return;
                };
                let attributes = Attributes(rest);
                let is_default = header[1] == 0 && header[4] == TABLE_MAIN && header[7] == TYPE_UNICAST;
                if kind != NEWROUTE || !is_default || attributes.get(DESTINATION).is_some() {
                    return;
                }
                let priority = attributes.u32(PRIORITY).unwrap_or_default();
                if let Some(link) = attributes.u32(OUTPUT_INTERFACE)
                    && best.is_none_or(|(least, _)| priority < least)
                {
                    best = Some((priority, link));
                }
            })?;
            if let Some((_, link)) = best {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }
}

/// struct ifinfomsg.
fn link_header(index: u32, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// struct ifaddrmsg.
fn address_header(index: u32, address: IpNet) -> [u8; 8] {
    let mut header = [family(address.addr()), address.prefix_len(), 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

fn token_bucket(m: &mut Message<'_>, index: u32, rate: u64, burst: u32) {
    // linux/pkt_sched.h
    const ROOT: u32 = 0xffff_ffff;
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const PARAMETERS: u16 = 1;
    const RATE64: u16 = 4;
    const BURST: u16 = 6;
    // struct tcmsg: family, index, handle, parent, info.
    m.raw(&[0; 4]).raw(&index.to_ne_bytes()).raw(&[0; 4]).raw(&ROOT.to_ne_bytes()).raw(&[0; 4]);
    // What waits longer than 50 ms beyond the burst is dropped (the latency that tc's manual suggests).
    let limit = u32::try_from(rate / 20 + u64::from(burst)).unwrap_or(u32::MAX);
    let mut parameters = [0u8; 36];
    // struct tc_ratespec: the rate in bytes per second stands in its last four bytes; 1 is Ethernet's link layer.
    parameters[1] = 1;
    parameters[8..12].copy_from_slice(&u32::try_from(rate).unwrap_or(u32::MAX).to_ne_bytes());
    parameters[24..28].copy_from_slice(&limit.to_ne_bytes());
    m.string(KIND, "tbf").nested(OPTIONS, |m| {
        m.attribute(PARAMETERS, &parameters).u32(BURST, burst);
        if rate > u64::from(u32::MAX) {
            m.attribute(RATE64, &rate.to_ne_bytes());
        }
    });
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { INET } else { INET6 }
}

fn with_ip(m: &mut Message<'_>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => m.attribute(kind, &address.octets()),
        IpAddr::V6(address) => m.attribute(kind, &address.octets()),
    };
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
