//! A pod: CRI's PodSandboxConfig becomes the agent's CreateSandbox and the network's PodNetwork.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hull_agent::protocol::messages;
use hull_network::{Bandwidth, Dns, PodNetwork, PortMapping, Protocol};

use super::user_namespace::{self, Mapping};
use super::{check_text, etc, invalid, resources};
use crate::api::runtime::{
    LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, Protocol as CriProtocol, SecurityProfile,
    security_profile::ProfileType,
};
use crate::runtime::Error;
use crate::security::sysctl::{self, SysctlError};
use crate::systemd::slice;

/// Below the agents' own memory nothing of a pod is worth saving.
const AGENT_OOM_SCORE: i32 = -998;

/// Which of the host's namespaces a pod shares, and whether its containers share their processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// The host's network (and hostname).
    pub host_network: bool,
    /// The host's IPC objects and /dev/shm.
    pub host_ipc: bool,
    /// How containers see processes by default.
    pub pid: NamespaceMode,
}

/// The parts of the request that are absent mean their defaults.
pub fn linux(config: &PodSandboxConfig) -> LinuxPodSandboxConfig {
    config.linux.clone().unwrap_or_default()
}

fn options(config: &PodSandboxConfig) -> Option<&NamespaceOption> {
    config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()
}

/// Which namespaces the pod has of its own.
pub fn namespaces(config: &PodSandboxConfig) -> Result<Namespaces, Error> {
    let none = NamespaceOption::default();
    let options = options(config).unwrap_or(&none);
    let mode = |kind: &str, value: i32| match NamespaceMode::try_from(value) {
        Ok(mode @ (NamespaceMode::Pod | NamespaceMode::Node)) => Ok(mode),
        Ok(mode @ NamespaceMode::Container) if kind == "pid" => Ok(mode),
        _ => Err(invalid(format!("a pod cannot have the {kind} namespace mode {value}"))),
    };
    Ok(Namespaces {
        host_network: mode("network", options.network)? == NamespaceMode::Node,
        host_ipc: mode("ipc", options.ipc)? == NamespaceMode::Node,
        pid: mode("pid", options.pid)?,
    })
}

/// What the pod's user namespace maps, if it asks for one.
pub fn mapping(config: &PodSandboxConfig) -> Result<Option<Mapping>, Error> {
    user_namespace::of_pod(options(config))
}

/// Refuses requests that no sandbox could serve. Called before anything is made.
pub fn check(config: &PodSandboxConfig) -> Result<PodSandboxMetadata, Error> {
    let metadata = config.metadata.clone().ok_or_else(|| invalid("the pod has no metadata"))?;
    for (what, text) in [("name", &metadata.name), ("namespace", &metadata.namespace), ("uid", &metadata.uid)]
    {
        check_text(&format!("the pod's {what}"), text)?;
    }
    if metadata.name.is_empty() {
        return Err(invalid("the pod's metadata has no name"));
    }
    let log_directory = &config.log_directory;
    if !log_directory.is_empty()
        && (!log_directory.starts_with('/') || log_directory.split('/').any(|part| part == ".."))
    {
        return Err(invalid(format!(
            "the log directory {log_directory:?} is not an absolute path without \"..\""
        )));
    }
    check_text("the log directory", log_directory)?;
    etc::check_hostname(&config.hostname)?;
    namespaces(config)?;
    mapping(config)?;
    if let Some(profile) = security(config).seccomp.as_ref() {
        check_profile(profile)?;
    }
    Ok(metadata)
}

fn check_profile(profile: &SecurityProfile) -> Result<(), Error> {
    match ProfileType::try_from(profile.profile_type) {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(format!("{} is no kind of seccomp profile", profile.profile_type))),
    }
}

/// The pod's security context; absent means its default.
pub fn security(config: &PodSandboxConfig) -> LinuxSandboxSecurityContext {
    config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default()
}

/// Where the pod's cgroup lies, and how many of its lowest levels are hull's to remove.
///
/// Where systemd owns cgroups (`systemd`), a slice becomes its path; its levels are the launcher's to count.
pub fn cgroup(
    config: &PodSandboxConfig,
    default: &str,
    systemd: bool,
    id: &str,
) -> Result<(String, u32), Error> {
    let asked = config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str());
    if systemd && asked.is_empty() && slice::is_slice(default) {
        let stem = slice::name_of(default).trim_end_matches(".slice");
        return Ok((slice::cgroup_of(&format!("{stem}-{id}.slice")).map_err(invalid)?, 1));
    }
    if systemd && slice::is_slice(asked) {
        return Ok((slice::cgroup_of(asked).map_err(invalid)?, 0));
    }
    if asked.is_empty() {
        let path = format!("/{}/{id}", default.trim_matches('/'));
        let levels = path.split('/').filter(|part| !part.is_empty()).count() as u32;
        return Ok((path, levels));
    }
    // `a-b.slice`, `/a.slice/a-b.slice` and `a-b.slice:prefix:name`: as paths they would be other groups than are meant.
    if asked.split(['/', ':']).any(|part| part.ends_with(".slice")) {
        return Err(invalid(format!(
            "the cgroup parent {asked:?} is a systemd slice, and hull uses the cgroupfs driver here (hull: \
             cgroup.driver, kubelet: cgroupDriver)"
        )));
    }
    check_text("the cgroup parent", asked)?;
    if asked.split('/').any(|part| part == "..") {
        return Err(invalid(format!("the cgroup parent {asked:?} contains \"..\"")));
    }
    Ok((format!("/{}", asked.trim_matches('/')), 0))
}

/// What of the host's own a pod may be given.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// The host's name.
    pub hostname: String,
    /// The host's /etc/hosts.
    pub hosts: Vec<u8>,
    /// The host's /etc/resolv.conf.
    pub resolv_conf: Vec<u8>,
}

/// The hostname inside the pod.
pub fn hostname(config: &PodSandboxConfig, namespaces: Namespaces, host: &Host) -> String {
    if namespaces.host_network || config.hostname.is_empty() {
        host.hostname.clone()
    } else {
        config.hostname.clone()
    }
}

/// The agent's request; `own_kernel`: it goes to a machine. Its slots are the launcher's to fill in.
pub fn create_sandbox(
    id: &str,
    config: &PodSandboxConfig,
    addresses: &[IpAddr],
    host: &Host,
    shm_size: u64,
    cgroup_is_ours: bool,
    own_kernel: bool,
) -> Result<messages::CreateSandbox, Error> {
    let namespaces = namespaces(config)?;
    let mapping = mapping(config)?;
    let mut linux = linux(config);
    let mut kernel_sysctls = BTreeMap::new();
    for (name, value) in std::mem::take(&mut linux.sysctls) {
        match sysctl::check(&name, &value, namespaces.host_ipc, namespaces.host_network) {
            Ok(()) => drop(linux.sysctls.insert(name, value)),
            // What would be the host's on the host is the pod's own in its machine.
            Err(SysctlError::NotNamespaced(_)) if own_kernel => drop(kernel_sysctls.insert(name, value)),
            Err(error) => return Err(invalid(error.to_string())),
        }
    }
    let guest = own_kernel.then(|| messages::Guest { kernel_sysctls, ..Default::default() });
    let hostname = hostname(config, namespaces, host);
    let hosts = if namespaces.host_network {
        host.hosts.clone()
    } else {
        etc::hosts(&hostname, addresses).into_bytes()
    };
    let dns = config.dns_config.as_ref().map(etc::resolv_conf).transpose()?.flatten();
    let limits = |cri: &LinuxContainerResources| resources::limits(cri);
    let pod_resources = match &linux.resources {
        Some(cri) if cgroup_is_ours => Some(limits(cri)?),
        _ => None,
    };
    Ok(messages::CreateSandbox {
        id: id.to_owned(),
        new_ipc_namespace: !namespaces.host_ipc,
        new_uts_namespace: !namespaces.host_network,
        shared_pid_namespace: namespaces.pid == NamespaceMode::Pod,
        etc_hostname: Some(format!("{hostname}\n").into_bytes()),
        hostname,
        sysctls: linux.sysctls,
        shm_size,
        etc_hosts: Some(hosts),
        etc_resolv_conf: Some(dns.map_or_else(|| host.resolv_conf.clone(), String::into_bytes)),
        pod_resources,
        guest,
        oom_score_adj: AGENT_OOM_SCORE,
        uid_mapping: mapping.map(|mapping| mapping.uids.message()),
        gid_mapping: mapping.map(|mapping| mapping.gids.message()),
        ..Default::default()
    })
}

/// What the network needs to know.
pub fn network(id: &str, config: &PodSandboxConfig, hostname: &str) -> Result<PodNetwork, Error> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let mut port_mappings = Vec::new();
    for mapping in config.port_mappings.iter().filter(|mapping| mapping.host_port > 0) {
        port_mappings.push(port_mapping(mapping)?);
    }
    let dns = config.dns_config.as_ref().map(|dns| Dns {
        servers: dns.servers.clone(),
        searches: dns.searches.clone(),
        options: dns.options.clone(),
    });
    Ok(PodNetwork {
        id: id.to_owned(),
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        hostname: hostname.to_owned(),
        port_mappings,
        annotations: config.annotations.clone(),
        bandwidth: Bandwidth::from_annotations(&config.annotations).map_err(invalid)?,
        dns,
    })
}

fn port_mapping(mapping: &crate::api::runtime::PortMapping) -> Result<PortMapping, Error> {
    let port = |what: &str, value: i32| match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(invalid(format!("the {what} port {value} is not between 1 and 65535"))),
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format!("the host IP {text:?} is not an address")))?),
    };
    Ok(PortMapping {
        protocol: match mapping.protocol() {
            CriProtocol::Tcp => Protocol::Tcp,
            CriProtocol::Udp => Protocol::Udp,
            CriProtocol::Sctp => Protocol::Sctp,
        },
        container_port: port("container", mapping.container_port)?,
        host_port: port("host", mapping.host_port)?,
        host_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{IdMapping, UserNamespace};

    fn config(options: NamespaceOption) -> PodSandboxConfig {
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        let metadata = PodSandboxMetadata { name: "web".into(), ..Default::default() };
        PodSandboxConfig {
            metadata: Some(metadata),
            hostname: "web-0".into(),
            linux: Some(linux),
            ..Default::default()
        }
    }

    fn node() -> i32 {
        NamespaceMode::Node.into()
    }

    fn created(config: &PodSandboxConfig) -> messages::CreateSandbox {
        let host =
            Host { hostname: "host".into(), hosts: b"1.2.3.4 host\n".to_vec(), resolv_conf: b"r".to_vec() };
        create_sandbox("id", config, &["10.0.0.2".parse().unwrap()], &host, 1, true, false).unwrap()
    }

    #[test]
    fn a_pod_has_namespaces_of_its_own_unless_it_asks_for_the_nodes() {
        let own = created(&config(NamespaceOption::default()));
        assert!(own.new_ipc_namespace && own.new_uts_namespace && own.shared_pid_namespace);
        assert_eq!(own.hostname, "web-0");
        let options =
            NamespaceOption { network: node(), ipc: node(), pid: node(), ..NamespaceOption::default() };
        let shared = created(&config(options));
        assert!(!shared.new_ipc_namespace && !shared.new_uts_namespace && !shared.shared_pid_namespace);
        assert_eq!(shared.etc_hosts.as_deref(), Some(&b"1.2.3.4 host\n"[..]));
        assert_eq!(shared.etc_hostname.as_deref(), Some(&b"host\n"[..]));
    }

    #[test]
    fn a_pods_user_namespace_is_told_to_its_agent() {
        let ids = vec![IdMapping { container_id: 0, host_id: 100_000, length: 65_536 }];
        let user = UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids };
        let asked =
            |user| config(NamespaceOption { userns_options: Some(user), ..NamespaceOption::default() });
        check(&asked(user.clone())).unwrap();
        let request = created(&asked(user.clone()));
        assert_eq!(request.uid_mapping.unwrap().host_id, 100_000);
        assert_eq!(request.gid_mapping.unwrap().length, 65_536);
        assert!(matches!(check(&asked(UserNamespace { gids: Vec::new(), ..user })), Err(Error::Invalid(_))));
        let node = UserNamespace { mode: node(), ..Default::default() };
        check(&asked(node.clone())).unwrap();
        assert_eq!(created(&asked(node)).uid_mapping, None);
    }

    #[test]
    fn a_pod_without_a_name_or_with_line_breaks_is_refused() {
        let good = config(NamespaceOption::default());
        check(&good).unwrap();
        assert!(check(&PodSandboxConfig { metadata: None, ..good.clone() }).is_err());
        assert!(check(&PodSandboxConfig { hostname: "a\nb".into(), ..good.clone() }).is_err());
        assert!(check(&PodSandboxConfig { log_directory: "logs".into(), ..good.clone() }).is_err());
        assert!(check(&PodSandboxConfig { log_directory: "/var/log/../lib".into(), ..good }).is_err());
    }

    #[test]
    fn the_cgroup_is_kubelets_or_below_hulls_own() {
        let mut asked = config(NamespaceOption::default());
        assert_eq!(cgroup(&asked, "/hull", false, "id").unwrap(), ("/hull/id".into(), 2));
        let mut parent = |path: &str| {
            asked.linux.as_mut().unwrap().cgroup_parent = path.into();
            cgroup(&asked, "/hull", false, "id")
        };
        assert_eq!(parent("/kubepods/pod1/").unwrap(), ("/kubepods/pod1".into(), 0));
        for slice in [
            "kubepods-pod1.slice",
            "/kubepods.slice/kubepods-pod1.slice",
            "kubepods-pod1.slice:cri-containerd:c1",
        ] {
            assert!(parent(slice).unwrap_err().to_string().contains("systemd slice"), "{slice}");
        }
        assert!(parent("/a/../b").is_err());
    }

    #[test]
    fn under_systemd_a_slice_is_the_pods_cgroup() {
        let mut asked = config(NamespaceOption::default());
        assert_eq!(cgroup(&asked, "/hull", true, "id").unwrap(), ("/hull/id".into(), 2));
        assert_eq!(
            cgroup(&asked, "/hull.slice", true, "id").unwrap(),
            ("/hull.slice/hull-id.slice".into(), 1)
        );
        let mut parent = |path: &str| {
            asked.linux.as_mut().unwrap().cgroup_parent = path.into();
            cgroup(&asked, "/hull", true, "id")
        };
        let wanted = ("/kubepods.slice/kubepods-pod1.slice".to_owned(), 0);
        assert_eq!(parent("kubepods-pod1.slice").unwrap(), wanted);
        assert_eq!(parent("/kubepods.slice/kubepods-pod1.slice").unwrap(), wanted);
        assert_eq!(parent("/kubepods/pod1/").unwrap(), ("/kubepods/pod1".into(), 0));
        assert!(parent("kubepods-pod1.slice:cri-containerd:c1").is_err());
    }

    #[test]
    fn host_ports_are_checked_and_unset_ones_left_out() {
        let mapping = |host_port, container_port, host_ip: &str| crate::api::runtime::PortMapping {
            host_port,
            container_port,
            host_ip: host_ip.into(),
            ..Default::default()
        };
        let with = |mappings: &[crate::api::runtime::PortMapping]| {
            let mut asked = config(NamespaceOption::default());
            asked.port_mappings = mappings.to_vec();
            network("id", &asked, "web-0")
        };
        let pod = with(&[mapping(0, 80, ""), mapping(8080, 80, "127.0.0.1")]).unwrap();
        assert_eq!(pod.port_mappings.len(), 1);
        assert_eq!(pod.port_mappings[0].host_port, 8080);
        assert!(with(&[mapping(70000, 80, "")]).is_err());
        assert!(with(&[mapping(80, 0, "")]).is_err());
        assert!(with(&[mapping(80, 80, "localhost")]).is_err());
    }
}
