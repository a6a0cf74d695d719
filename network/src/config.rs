use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Who attaches pods to the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The CNI configuration in `cni_conf_dir` if there is one when a pod is set up, else the built-in bridge.
    #[default]
    Auto,
    /// Always the built-in bridge.
    Builtin,
    /// Always CNI: without a configuration that loads, no pod starts and the network is not ready.
    Cni,
}

/// What [`crate::Network::open`] needs to know. Several daemons run side by side if each has its own `data`, `bridge`
/// and `subnets`.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Who attaches pods.
    pub mode: Mode,
    /// Volatile directory of this daemon (e.g. /run/hull); created with mode 0700 if missing.
    pub state: PathBuf,
    /// Durable directory for this crate's records (e.g. /var/lib/hull/network); created with mode 0700 if missing.
    /// Only one [`crate::Network`] may have it open.
    pub data: PathBuf,
    /// Where namespaces are pinned; /run/netns makes `ip netns` see them. Shared with other programs.
    pub netns_dir: PathBuf,
    /// Name of the bridge, at most 15 bytes; also the name of the nftables table. Unique per daemon on a machine.
    pub bridge: String,
    /// Ranges for pods: at most one IPv4 (prefix 8 to 29) and one IPv6 (prefix 48 to 120) are used; the first host
    /// address is the bridge's own. Empty: derived from the name of the bridge, see [`NetworkConfig::default_subnets`].
    pub subnets: Vec<IpNet>,
    /// MTU of the bridge and of pods; `None`: that of the interface with the default route, else 1500.
    pub mtu: Option<u32>,
    /// How long the bridge and the table stay after the last pod's link; a pod that comes meanwhile finds them. Making
    /// and removing them takes the kernel's routing lock for tens of milliseconds, in the way of a start.
    pub linger: Duration,
    /// Directory of CNI configurations (/etc/cni/net.d); the lexicographically first one that loads is used.
    pub cni_conf_dir: PathBuf,
    /// Directories that CNI plugins are looked up in, in this order (/opt/cni/bin, /usr/lib/cni).
    pub cni_bin_dirs: Vec<PathBuf>,
}

impl NetworkConfig {
    /// The ranges that a daemon with this bridge uses if it is given none: 10.213.N.0/24 and fd68:756c:6c00:N::/64,
    /// where N is 0 for `hull0` and otherwise drawn from the name, so that daemons side by side rarely meet. Few
    /// products use 10.213.0.0/16 (Docker, Podman, libvirt, kubeadm, flannel, Calico, k3s and the clouds' defaults lie
    /// elsewhere); a range that another interface has is refused when the first pod is set up.
    pub fn default_subnets(bridge: &str) -> Vec<IpNet> {
        let third = if bridge == "hull0" { 0 } else { (fnv1a(bridge.as_bytes()) % 255 + 1) as u8 };
        let v4 = Ipv4Addr::new(10, 213, third, 0);
        let v6 = Ipv6Addr::new(0xfd68, 0x756c, 0x6c00, u16::from(third), 0, 0, 0, 0);
        vec![IpNet::new_assert(v4.into(), 24), IpNet::new_assert(v6.into(), 64)]
    }
}

/// FNV-1a: a hash whose values never change, for names that outlive this build.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
