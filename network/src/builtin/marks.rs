//! Names and marks by which a daemon recognises what it made, after its records are lost as well.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;

use crate::config::fnv1a;
use crate::netlink::route::{Link, Mac};

/// Derived from the data directory and the bridge's name, both unique per daemon.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    pub(super) bridge: String,
    tag: String,
}

impl Marks {
    pub(super) fn new(bridge: &str, data: &Path) -> Self {
        let tag = format!("{:08x}", fnv1a(data.as_os_str().as_encoded_bytes()) as u32);
        Self { bridge: bridge.to_owned(), tag }
    }

    pub(super) fn bridge_alias(&self) -> String {
        format!("hull {} bridge", self.tag)
    }

    /// Alias of the host's end of a pod's link.
    pub(super) fn link_alias(&self, pod: &str) -> String {
        format!("hull {} pod {pod}", self.tag)
    }

    /// The pod whose link this is, if this daemon made it.
    pub(super) fn pod_of<'a>(&self, link: &'a Link) -> Option<&'a str> {
        link.alias.strip_prefix(&format!("hull {} pod ", self.tag))
    }

    /// Name of the host's end of a pod's link: 15 bytes, the most that Linux allows.
    pub(super) fn link_name(&self, pod: &str) -> String {
        format!("hull{:011x}", self.hash(pod) & 0xfff_ffff_ffff)
    }

    pub(super) fn bridge_mac(&self) -> Mac {
        self.mac("bridge")
    }

    /// Address of the host's end of a pod's link.
    pub(super) fn host_mac(&self, pod: &str) -> Mac {
        self.mac(pod)
    }

    /// Address of the pod's end: follows from its IPv4 address, so that neighbours' caches stay right when another pod
    /// gets that address.
    pub(super) fn pod_mac(&self, pod: &str, addresses: &[IpNet]) -> Mac {
        match addresses.iter().map(IpNet::addr).find(IpAddr::is_ipv4) {
            Some(IpAddr::V4(address)) => {
                let [a, b, c, d] = address.octets();
                [0x0a, 0x58, a, b, c, d]
            }
            _ => self.mac(&format!("{pod} eth0")),
        }
    }

    fn mac(&self, of: &str) -> Mac {
        let [_, _, a, b, c, d, e, f] = self.hash(of).to_be_bytes();
        // Locally administered, unicast.
        [a & 0xf0 | 0x02, b, c, d, e, f]
    }

    fn hash(&self, of: &str) -> u64 {
        fnv1a(format!("{} {of}", self.tag).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ_between_pods_and_daemons() {
        let marks = Marks::new("hull0", Path::new("/var/lib/hull/network"));
        let other = Marks::new("hull0", Path::new("/tmp/other"));
        assert_eq!(marks.link_name("a").len(), 15);
        assert_ne!(marks.link_name("a"), marks.link_name("b"));
        assert_ne!(marks.link_name("a"), other.link_name("a"));
        assert_eq!(marks.bridge_mac()[0] & 3, 2);
    }

    #[test]
    fn a_daemon_recognises_only_its_own_links() {
        let marks = Marks::new("hull0", Path::new("/a"));
        let alias = marks.link_alias("0123");
        let link = Link { index: 1, name: "x".into(), alias, mtu: 1500, master: None };
        assert_eq!(marks.pod_of(&link), Some("0123"));
        assert_eq!(Marks::new("hull0", Path::new("/b")).pod_of(&link), None);
    }
}
