//! hulld's configuration: `/etc/hull/hull.toml` and the flags that override it.
//!
//! A configuration that has been loaded is checked: paths are absolute, ranges make sense, names refer to something.
//! `hack/config/hull.toml` explains every key to people; a test holds it equal to the defaults here.

mod load;
pub mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use load::{ConfigError, Overrides, load, parse};

/// Where hulld looks for its configuration when no file is named.
pub const DEFAULT_FILE: &str = "/etc/hull/hull.toml";

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What must survive a reboot: images, records, writable layers.
    #[serde(deserialize_with = "value::absolute_path")]
    pub root: PathBuf,
    /// What a reboot may take: sockets, pinned namespaces.
    #[serde(deserialize_with = "value::absolute_path")]
    pub state: PathBuf,
    /// The socket for kubelet, crictl and hull; written as `unix:///path`. Default: `hull.sock` in `state`.
    #[serde(default, with = "value::socket")]
    pub listen: PathBuf,
    /// What is logged and how.
    pub log: LogConfig,
    /// The program that runs in each pod.
    pub agent: AgentConfig,
    /// What every pod gets.
    pub pod: PodConfig,
    /// How pods reach each other and the world.
    pub network: NetworkConfig,
    /// How images are fetched.
    pub registry: RegistryConfig,
    /// Which images may be here, and which of them stay.
    pub image: ImageConfig,
    /// Where pods without a cgroup of kubelet's go.
    pub cgroup: CgroupConfig,
    /// What containers may use of disks.
    pub blockio: BlockIoConfig,
    /// Classes of cache and memory bandwidth.
    pub rdt: RdtConfig,
    /// How streams of exec, attach and port-forward reach hulld.
    pub streaming: StreamingConfig,
    /// What a RuntimeClass's handler means.
    pub runtimes: RuntimesConfig,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug` or `trace`; single modules after commas: `info,hull_network=debug`.
    #[serde(deserialize_with = "value::log_level")]
    pub level: String,
    /// For people or for programs.
    pub format: LogFormat,
}

/// Form of log lines on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line for each event
    Text,
    /// One JSON object for each event
    Json,
}

/// `[agent]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// The hull-agent program. Unset: beside hulld, else `$HULL_AGENT`, else /usr/libexec/hull/hull-agent.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// `[pod]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodConfig {
    /// Bytes of a pod's /dev/shm, shared by its containers; written as `64MiB`.
    #[serde(with = "value::size")]
    pub shm_size: u64,
}

/// `[network]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Who attaches pods.
    pub mode: NetworkMode,
    /// Built-in network: name of the bridge, at most 15 bytes.
    #[serde(deserialize_with = "value::interface_name")]
    pub bridge: String,
    /// Built-in network: each pod gets an address from each range, until kubelet names the node's pod ranges.
    #[serde(deserialize_with = "value::subnets")]
    pub subnets: Vec<IpNet>,
    /// Built-in network: MTU of the bridge and the pods. Unset: that of the default route's interface.
    #[serde(deserialize_with = "value::mtu", skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// CNI: directory of network configurations; the first in name order is used.
    #[serde(deserialize_with = "value::absolute_path")]
    pub cni_conf_dir: PathBuf,
    /// CNI: directories of plugins, searched in this order.
    #[serde(deserialize_with = "value::absolute_paths")]
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where network namespaces of pods are pinned.
    #[serde(deserialize_with = "value::absolute_path")]
    pub netns_dir: PathBuf,
}

/// Who attaches pods to a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// hull's own bridge.
    Builtin,
    /// CNI plugins; without a configuration the network is not ready.
    Cni,
    /// CNI when there is a configuration, the bridge otherwise.
    Auto,
}

/// `[registry]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Directory with one directory for each registry (`docker.io/hosts.toml`): mirrors, certificates.
    #[serde(deserialize_with = "value::absolute_path")]
    pub hosts_dir: PathBuf,
    /// Layers of one pull that are fetched and converted at the same time, 1 to 64.
    #[serde(deserialize_with = "value::parallel_layers")]
    pub max_parallel_layers: usize,
    /// Connections over which layers are received at the same time, over all pulls, 1 to 64. Those that are left over
    /// serve for receiving large layers in several parts at once.
    #[serde(deserialize_with = "value::parallel_downloads")]
    pub max_parallel_downloads: usize,
    /// A pull that receives nothing for so long, or less than 1 KiB a second, is given up; however long it takes in
    /// total.
    #[serde(with = "value::duration")]
    pub progress_timeout: Duration,
}

/// `[image]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// The image policy, asked at each pull and each CreateContainer. Unset: everything is accepted.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub policy: Option<PathBuf>,
    /// Patterns of names of images that are never collected.
    #[serde(deserialize_with = "value::image_patterns")]
    pub pinned: Vec<String>,
    /// Whether layers are also kept as they were compressed.
    pub keep_blobs: bool,
}

/// `[cgroup]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CgroupConfig {
    /// Parent of the cgroups of pods that name none (kubelet always names one), below each hierarchy's root.
    #[serde(deserialize_with = "value::cgroup_path")]
    pub parent: String,
    /// Who owns cgroups.
    pub driver: CgroupDriver,
}

/// Who makes cgroups and writes limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// hull itself, and kubelet likewise.
    Cgroupfs,
    /// systemd, over D-Bus.
    Systemd,
    /// systemd if it is this machine's init, except for pods whose parent is no slice.
    Auto,
}

/// `[blockio]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlockIoConfig {
    /// The file that describes classes. Unset: there are none.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub classes: Option<PathBuf>,
}

/// `[rdt]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RdtConfig {
    /// Where resctrl is mounted; a class is a directory in it. Not set: there are no classes.
    #[serde(deserialize_with = "value::optional_absolute_path")]
    pub resctrl: Option<PathBuf>,
}

/// `[streaming]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingConfig {
    /// Address and port of the server for streams; port 0 is any free one. kubelet is told this address, so it must
    /// be one that kubelet can connect to.
    #[serde(deserialize_with = "value::reachable_address")]
    pub address: SocketAddr,
    /// The server's certificate, followed by those that signed it, in PEM. Unset: plain HTTP. Read again when it changes.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// The certificate's key, in PEM; set if the certificate is.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// `[runtimes]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuntimesConfig {
    /// The handler of pods that name none; one of `handlers`.
    pub default: String,
    /// Handler names as a RuntimeClass gives them. A table here replaces the default one.
    pub handlers: BTreeMap<String, RuntimeHandlerConfig>,
}

/// `[runtimes.handlers.NAME]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeHandlerConfig {
    /// What the pods of this handler are.
    pub kind: SandboxKind,
    /// With the kind `microvm`: the machines. Unset: the defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineConfig>,
}

/// `[runtimes.handlers.NAME.machine]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineConfig {
    /// The hull-vmm program. Unset: beside hulld, else in /usr/libexec/hull.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub vmm: Option<PathBuf>,
    /// The hull-virtiofsd program. Unset: as `vmm`.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub virtiofsd: Option<PathBuf>,
    /// The guest's kernel. Unset: `vmlinux` beside hulld, else in /usr/lib/hull.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs with hull-agent in it. Unset: `initramfs.cpio`, as `kernel`.
    #[serde(deserialize_with = "value::optional_absolute_path", skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Appended to the command line of the guest's kernel.
    pub kernel_arguments: String,
    /// Memory of a pod's machine if the pod has no memory limit; its containers cannot use more together.
    #[serde(with = "value::size")]
    pub memory: u64,
    /// Most memory that a pod can be given later. Unset: the node's.
    #[serde(with = "value::optional_size", skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<u64>,
    /// Processors of a pod's machine if the pod has no CPU limit; never more than the node has.
    #[serde(deserialize_with = "value::processors")]
    pub vcpus: u32,
    /// Size of each container's writable layer, of each emptyDir on disk and of each VOLUME of an image.
    #[serde(with = "value::size")]
    pub disk: u64,
    /// What a machine needs beside its memory. Added to the limit of pods whose cgroup hull makes; for kubelet's pods
    /// the RuntimeClass says it.
    #[serde(with = "value::size")]
    pub overhead: u64,
    /// Directories of kubelets (`--root-dir`): what they write for pods is copied, and emptyDirs live in the machine.
    #[serde(deserialize_with = "value::absolute_paths")]
    pub kubelet_roots: Vec<PathBuf>,
}

/// What a pod is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxKind {
    /// Namespaced processes on the host.
    Process,
    /// Processes in a virtual machine of the pod's own.
    Microvm,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: "/var/lib/hull".into(),
            state: "/run/hull".into(),
            listen: "/run/hull/hull.sock".into(),
            log: LogConfig::default(),
            agent: AgentConfig::default(),
            pod: PodConfig::default(),
            network: NetworkConfig::default(),
            registry: RegistryConfig::default(),
            image: ImageConfig::default(),
            cgroup: CgroupConfig::default(),
            blockio: BlockIoConfig::default(),
            rdt: RdtConfig::default(),
            streaming: StreamingConfig::default(),
            runtimes: RuntimesConfig::default(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: "info".into(), format: LogFormat::Text }
    }
}

impl Default for PodConfig {
    fn default() -> Self {
        PodConfig { shm_size: 64 << 20 }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        let subnet = |address: [u16; 8], prefix| IpNet::new_assert(IpAddr::from(address), prefix);
        NetworkConfig {
            mode: NetworkMode::Auto,
            bridge: "hull0".into(),
            subnets: vec![
                IpNet::new_assert(IpAddr::from([10, 66, 0, 0]), 16),
                // A unique local address whose global id spells "hull".
                subnet([0xfd68, 0x756c, 0x6c00, 0, 0, 0, 0, 0], 64),
            ],
            mtu: None,
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            netns_dir: "/run/netns".into(),
        }
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        RegistryConfig {
            hosts_dir: "/etc/hull/certs.d".into(),
            max_parallel_layers: 4,
            max_parallel_downloads: 8,
            progress_timeout: Duration::from_secs(60),
        }
    }
}

impl Default for CgroupConfig {
    fn default() -> Self {
        CgroupConfig { parent: "/hull".into(), driver: CgroupDriver::Auto }
    }
}

impl Default for StreamingConfig {
    fn default() -> Self {
        StreamingConfig { address: (Ipv4Addr::LOCALHOST, 0).into(), certificate: None, key: None }
    }
}

impl Default for RuntimesConfig {
    fn default() -> Self {
        let process = RuntimeHandlerConfig { kind: SandboxKind::Process, machine: None };
        let machine = Some(MachineConfig::default());
        let microvm = RuntimeHandlerConfig { kind: SandboxKind::Microvm, machine };
        let handlers = BTreeMap::from([("process".into(), process), ("microvm".into(), microvm)]);
        RuntimesConfig { default: "process".into(), handlers }
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vmm: None,
            virtiofsd: None,
            kernel: None,
            initramfs: None,
            kernel_arguments: String::new(),
            memory: 2 << 30,
            max_memory: None,
            vcpus: 4,
            disk: 10 << 30,
            overhead: 96 << 20,
            kubelet_roots: vec!["/var/lib/kubelet".into()],
        }
    }
}

impl Config {
    /// The configuration as TOML, with what was left out filled in.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The socket as clients name it, `unix:///path`.
    pub fn endpoint(&self) -> String {
        value::endpoint(&self.listen)
    }

    /// The handler that a pod's `runtime_handler` means (empty: the default), or `None` if there is no such one.
    pub fn handler(&self, name: &str) -> Option<(&str, &RuntimeHandlerConfig)> {
        let name = if name.is_empty() { self.runtimes.default.as_str() } else { name };
        self.runtimes.handlers.get_key_value(name).map(|(name, handler)| (name.as_str(), handler))
    }

    /// Below `state`: the default for `listen`.
    fn socket_in(state: &Path) -> PathBuf {
        state.join("hull.sock")
    }
}

#[cfg(test)]
mod tests;
