use std::sync::Arc;

use super::UserNamespace;
use crate::protocol::messages;

/// What the pod's containers need to know of it. A function of the request that created the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// The pod has its own content for /etc/hostname.
    pub etc_hostname: bool,
    /// The same for /etc/hosts.
    pub etc_hosts: bool,
    /// The same for /etc/resolv.conf.
    pub etc_resolv_conf: bool,
    /// The machine's cgroup hierarchies.
    pub cgroups: CgroupView,
    /// Where the containers live; `None`: where the agent does.
    pub user_namespace: Option<Arc<UserNamespace>>,
    /// The pod has an IPC namespace of its own, not the host's.
    pub own_ipc: bool,
}

impl PodFacts {
    /// From the request, and the user namespace that it brought.
    pub fn new(spec: &messages::CreateSandbox, user_namespace: Option<Arc<UserNamespace>>) -> Self {
        Self {
            etc_hostname: spec.etc_hostname.is_some(),
            etc_hosts: spec.etc_hosts.is_some(),
            etc_resolv_conf: spec.etc_resolv_conf.is_some(),
            cgroups: CgroupView::new(&spec.cgroups.clone().unwrap_or_default()),
            user_namespace,
            own_ipc: spec.new_ipc_namespace || spec.ipc_namespace.is_some(),
        }
    }
}

/// What a container is to find below /sys/fs/cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupView {
    v2: bool,
    hierarchies: Vec<Hierarchy>,
}

/// A cgroup v1 hierarchy, or the unified one of a hybrid machine, as a directory below /sys/fs/cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// One path component.
    pub directory: String,
    /// What fsconfig is told, e.g. `cpu` and `cpuacct`, or `name=systemd`; empty: the unified hierarchy.
    pub controllers: Vec<String>,
}

impl CgroupView {
    /// The same directories as on the host.
    pub fn new(layout: &messages::CgroupLayout) -> Self {
        if layout.unified_controllers {
            return Self { v2: true, hierarchies: Vec::new() };
        }
        let directory = |mount_point: &str| {
            let name = mount_point.rsplit('/').next().unwrap_or_default();
            (!name.is_empty() && name != "." && name != "..").then(|| name.to_owned())
        };
        let mut hierarchies: Vec<Hierarchy> = layout
            .v1
            .iter()
            .filter_map(|one| {
                let controllers = one.controllers.clone();
                Some(Hierarchy { directory: directory(&one.mount_point)?, controllers })
            })
            .filter(|one| !one.controllers.is_empty())
            .collect();
        if let Some(directory) = directory(&layout.unified) {
            hierarchies.push(Hierarchy { directory, controllers: Vec::new() });
        }
        Self { v2: false, hierarchies }
    }

    /// The unified hierarchy holds the controllers.
    pub const fn is_v2(&self) -> bool {
        self.v2
    }

    /// The v1 hierarchies, and the unified one of a hybrid machine; none on v2.
    pub fn hierarchies(&self) -> Vec<Hierarchy> {
        self.hierarchies.clone()
    }
}
