//! What a machine cannot do, said before anything is made, in words that a user gets to read.

use crate::api::runtime::{ContainerConfig, MountPropagation, NamespaceMode, PodSandboxConfig};

/// Why this pod cannot be in a machine.
pub(super) fn pod(config: &PodSandboxConfig) -> Option<String> {
    let context = config.linux.as_ref()?.security_context.as_ref()?;
    let Some(options) = &context.namespace_options else { return None };
    for (mode, what) in [
        (options.network(), "network (hostNetwork)"),
        (options.pid(), "processes (hostPID)"),
        (options.ipc(), "IPC (hostIPC)"),
    ] {
        if mode == NamespaceMode::Node {
            return Some(format!(
                "a pod in a machine of its own cannot share the host's {what}; use the process runtime"
            ));
        }
    }
    None
}

/// Why this container cannot be in a machine.
pub(super) fn container(config: &ContainerConfig) -> Option<String> {
    for mount in &config.mounts {
        if mount.propagation() == MountPropagation::PropagationBidirectional {
            return Some(format!(
                "the mount at {} cannot have Bidirectional propagation: what is mounted in a machine stays there",
                mount.container_path
            ));
        }
    }
    let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let hugepages = resources.map(|resources| resources.hugepage_limits.as_slice()).unwrap_or_default();
    if hugepages.iter().any(|limit| limit.limit > 0) {
        return Some(
            "a pod in a machine of its own has no huge pages: they are not taken from the node's".into(),
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{
        HugepageLimit, LinuxContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig,
        LinuxSandboxSecurityContext, Mount, NamespaceOption,
    };

    fn with(options: NamespaceOption) -> PodSandboxConfig {
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        PodSandboxConfig { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn the_hosts_namespaces_are_refused_each_by_its_name() {
        let node = i32::from(NamespaceMode::Node);
        for (options, name) in [
            (NamespaceOption { network: node, ..Default::default() }, "hostNetwork"),
            (NamespaceOption { pid: node, ..Default::default() }, "hostPID"),
            (NamespaceOption { ipc: node, ..Default::default() }, "hostIPC"),
        ] {
            assert!(pod(&with(options)).unwrap().contains(name));
        }
        assert_eq!(pod(&with(NamespaceOption::default())), None);
        assert_eq!(pod(&PodSandboxConfig::default()), None);
    }

    #[test]
    fn mounts_towards_the_host_and_huge_pages_are_refused() {
        let mount = Mount {
            container_path: "/x".into(),
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..Default::default()
        };
        let config = ContainerConfig { mounts: vec![mount], ..Default::default() };
        assert!(container(&config).unwrap().starts_with("the mount at /x cannot have Bidirectional"));
        let limit = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit }],
            ..Default::default()
        };
        let with = |resources| ContainerConfig {
            linux: Some(LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(container(&with(limit(0))), None, "kubelet sends zeros for every size");
        assert!(container(&with(limit(1))).unwrap().contains("huge pages"));
    }
}
