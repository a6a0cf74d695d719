use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use serde::{Deserialize, Serialize};

use crate::{NetworkError, PodNetwork, PortMapping, Protocol};

/// Most host ports of one pod.
const MOST: usize = 4096;

/// A port of the host that is translated to a pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostPort {
    pub(crate) protocol: Protocol,
    /// `None`: all addresses of the host.
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) container_port: u16,
}

impl Protocol {
    /// IANA's protocol number.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl HostPort {
    /// The pod's host ports, checked: no port twice, none without a container port.
    pub(crate) fn of_pod(pod: &PodNetwork) -> Result<Vec<Self>, NetworkError> {
        let invalid = |reason: String| NetworkError::Invalid { pod: pod.id.clone(), reason };
        let wanted: Vec<&PortMapping> =
            pod.port_mappings.iter().filter(|mapping| mapping.host_port != 0).collect();
        if wanted.len() > MOST {
            return Err(invalid(format!("{} host ports are more than {MOST}", wanted.len())));
        }
        let mut ports: Vec<Self> = Vec::with_capacity(wanted.len());
        for mapping in wanted {
            let port = Self {
                protocol: mapping.protocol,
                host_ip: mapping.host_ip.filter(|address| !address.is_unspecified()),
                host_port: mapping.host_port,
                container_port: mapping.container_port,
            };
            if port.container_port == 0 {
                return Err(invalid(format!("host port {} leads to container port 0", port.host_port)));
            }
            // Kubernetes admits the same mapping twice.
            if ports.contains(&port) {
                continue;
            }
            if let Some(other) = ports.iter().find(|other| other.collides(&port)) {
                return Err(
                    port.in_use(pod, format!("the same pod's container port {}", other.container_port))
                );
            }
            ports.push(port);
        }
        Ok(ports)
    }

    /// Host ports of the UDP ones.
    pub(crate) fn udp(ports: &[Self]) -> Vec<u16> {
        ports.iter().filter(|port| port.protocol == Protocol::Udp).map(|port| port.host_port).collect()
    }

    /// True if both answer to some packet.
    pub(crate) fn collides(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && (self.host_ip == other.host_ip || self.host_ip.is_none() || other.host_ip.is_none())
    }

    pub(crate) fn in_use(&self, pod: &PodNetwork, owner: String) -> NetworkError {
        NetworkError::PortInUse {
            pod: pod.id.clone(),
            protocol: self.protocol,
            port: self.host_port,
            address: self.host_ip,
            owner,
        }
    }

    /// Fails if a process of the host listens on this port: translation would cut it off.
    pub(crate) fn check_not_listening(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        let addresses: &[IpAddr] = match &self.host_ip {
            Some(address) => std::slice::from_ref(address),
            None => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
        };
        for address in addresses {
            if is_bound(self.protocol, SocketAddr::new(*address, self.host_port)) {
                return Err(self.in_use(pod, "a process on the host".into()));
            }
        }
        Ok(())
    }
}

/// Whether binding fails because somebody is bound there. Any other failure (no such address, no IPv6, no SCTP) says
/// nothing about that.
fn is_bound(protocol: Protocol, address: SocketAddr) -> bool {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (kind, protocol_number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, ipproto::SCTP),
    };
    let bind = || -> Result<(), Errno> {
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol_number))?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        if protocol == Protocol::Tcp {
            // Connections that linger from a former listener do not count.
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        rustix::net::bind(&socket, &address)
    };
    bind().is_err_and(|error| std::io::Error::from(error).kind() == ErrorKind::AddrInUse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn pod(ports: &[(Protocol, Option<&str>, u16, u16)]) -> PodNetwork {
        let port_mappings = ports
            .iter()
            .map(|(protocol, host_ip, host_port, container_port)| PortMapping {
                protocol: *protocol,
                host_ip: host_ip.map(|ip| ip.parse().unwrap()),
                host_port: *host_port,
                container_port: *container_port,
            })
            .collect();
        PodNetwork { id: "pod".into(), port_mappings, ..PodNetwork::default() }
    }

    #[test]
    fn mappings_without_a_host_port_and_repeated_ones_are_passed_over() {
        let tcp = Protocol::Tcp;
        let ports = HostPort::of_pod(&pod(&[
            (tcp, None, 0, 80),
            (tcp, None, 8080, 80),
            (tcp, Some("0.0.0.0"), 8080, 80),
            (Protocol::Udp, None, 8080, 80),
        ]))
        .unwrap();
        assert_eq!(ports.len(), 2);
        assert_eq!(ports[0].host_ip, None);
    }

    #[test]
    fn one_host_port_cannot_lead_to_two_places() {
        let tcp = Protocol::Tcp;
        for second in [(tcp, None, 8080, 81), (tcp, Some("127.0.0.1"), 8080, 80)] {
            let error = HostPort::of_pod(&pod(&[(tcp, None, 8080, 80), second])).unwrap_err().to_string();
            assert!(error.contains("8080"), "{error}");
        }
        let apart = pod(&[(tcp, Some("127.0.0.1"), 8080, 80), (tcp, Some("127.0.0.2"), 8080, 81)]);
        assert_eq!(HostPort::of_pod(&apart).unwrap().len(), 2);
        assert!(HostPort::of_pod(&pod(&[(tcp, None, 8080, 0)])).is_err());
    }

    #[test]
    fn a_listener_of_the_host_keeps_its_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp_port = udp.local_addr().unwrap().port();
        let check = |protocol, host_ip, port| {
            let pod = pod(&[(protocol, host_ip, port, 80)]);
            HostPort::of_pod(&pod).unwrap()[0].check_not_listening(&pod)
        };
        for host_ip in [None, Some("127.0.0.1")] {
            let error = check(Protocol::Tcp, host_ip, port).unwrap_err().to_string();
            assert!(error.contains("a process on the host"), "{error}");
            assert!(check(Protocol::Udp, host_ip, udp_port).is_err());
        }
        check(Protocol::Tcp, Some("127.0.0.2"), port).unwrap();
        drop(listener);
        check(Protocol::Tcp, None, port).unwrap();
    }
}
