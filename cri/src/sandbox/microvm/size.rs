//! How large a pod's machine is. Pure.

use super::super::PodLimits;
use crate::api::runtime::{LinuxContainerResources, PodSandboxConfig};
use crate::config::MachineConfig;
use hull_agent::protocol::messages;

/// The least a guest's kernel with its agent and one container gets along with.
const LEAST: u64 = 128 << 20;
/// Memory comes in pieces of this size.
const PIECE: u64 = 2 << 20;
/// What of the overhead is used outside the machine's memory: the VMM, the server of volumes, the kernel's page tables.
const OUTSIDE: u64 = 48 << 20;

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Processors.
    pub(super) vcpus: u32,
    /// Bytes it boots with.
    pub(super) memory: u64,
    /// Bytes it can ever be given.
    pub(super) memory_max: u64,
}

/// What the node has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) processors: u32,
    pub(super) memory: u64,
}

impl Node {
    /// This one.
    pub(super) fn look() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        let info = rustix::system::sysinfo();
        Self { processors, memory: info.totalram.saturating_mul(u64::from(info.mem_unit)) }
    }
}

/// The machine of a pod: as large as the pod's limits, or else as the handler says. kubelet sends the sum of the
/// containers' limits, and the RuntimeClass's overhead apart from it. The guest's kernel needs memory of its own, so
/// the machine gets the overhead too, but for what is used outside of it: the pod's cgroup has no more than both.
pub(super) fn of_pod(config: &PodSandboxConfig, overhead: u64, handler: &MachineConfig, node: Node) -> Size {
    let limits = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let most = handler.max_memory.unwrap_or(node.memory).max(LEAST);
    let memory = match limits.map_or(0, memory_limit) {
        0 => handler.memory,
        limit => limit.saturating_add(overhead.saturating_sub(OUTSIDE)),
    };
    let memory = whole_pieces(memory.max(LEAST)).min(whole_pieces(most));
    let vcpus = match limits.map_or(0, processors) {
        0 => handler.vcpus,
        limit => limit,
    };
    Size { vcpus: vcpus.clamp(1, node.processors.clamp(1, 64)), memory, memory_max: whole_pieces(most) }
}

/// What a pod needs beside its containers: as its RuntimeClass says, or, where hull makes its cgroup, as the handler.
pub(super) fn overhead(config: &PodSandboxConfig, cgroup_is_ours: bool, handler: &MachineConfig) -> u64 {
    let announced = config.linux.as_ref().and_then(|linux| linux.overhead.as_ref()).map_or(0, memory_limit);
    if announced == 0 && cgroup_is_ours { handler.overhead } else { announced }
}

/// What a running machine is to become. None: as it is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct After {
    pub(super) memory: Option<u64>,
    pub(super) vcpus: Option<u32>,
    /// Of the pod's cgroup, with the overhead that it was born with where nobody names another.
    pub(super) cgroup: messages::Resources,
}

/// The machine of a pod whose limits change: as [`of_pod`] would make it, but for what it was born without.
pub(super) fn after(limits: &PodLimits, born: Size, cgroup_is_ours: bool, handler: &MachineConfig) -> After {
    let positive =
        |limit: Option<i64>| limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
    let mut cgroup = limits.cgroup.clone();
    let containers = positive(limits.containers.memory_limit);
    let named = positive(cgroup.memory_limit).unwrap_or(0).saturating_sub(containers.unwrap_or(0));
    let overhead = if named == 0 && cgroup_is_ours { handler.overhead } else { named };
    let memory = containers.map(|limit| {
        cgroup.memory_limit = i64::try_from(limit.saturating_add(overhead)).ok();
        // As at the birth: a guest does not swap.
        cgroup.memory_swap_limit = None;
        let memory = limit.saturating_add(overhead.saturating_sub(OUTSIDE));
        whole_pieces(memory.max(LEAST)).min(born.memory_max)
    });
    let vcpus = messages_processors(&limits.containers).map(|count| count.clamp(1, born.vcpus));
    After { memory, vcpus, cgroup }
}

fn messages_processors(limits: &messages::Resources) -> Option<u32> {
    let quota = limits.cpu_quota.filter(|quota| *quota > 0)?;
    Some(rounded_up(quota, limits.cpu_period.unwrap_or(100_000)))
}

fn memory_limit(resources: &LinuxContainerResources) -> u64 {
    u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0)
}

fn processors(resources: &LinuxContainerResources) -> u32 {
    if resources.cpu_quota <= 0 {
        return 0;
    }
    rounded_up(resources.cpu_quota, resources.cpu_period)
}

fn rounded_up(quota: i64, period: i64) -> u32 {
    let period = if period > 0 { period } else { 100_000 };
    u32::try_from((quota.saturating_add(period - 1)) / period).unwrap_or(u32::MAX)
}

fn whole_pieces(bytes: u64) -> u64 {
    bytes.div_ceil(PIECE).saturating_mul(PIECE).min(1 << 46)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::LinuxPodSandboxConfig;

    const NODE: Node = Node { processors: 8, memory: 32 << 30 };

    fn pod(memory: i64, quota: i64, overhead: i64) -> PodSandboxConfig {
        let limits = |memory, quota| LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_quota: quota,
            cpu_period: 100_000,
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            resources: Some(limits(memory, quota)),
            overhead: Some(limits(overhead, 0)),
            ..Default::default()
        };
        PodSandboxConfig { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn a_pod_with_limits_gets_a_machine_of_their_size() {
        let handler = MachineConfig::default();
        let of = |pod| of_pod(&pod, overhead(&pod, false, &handler), &handler, NODE);
        let size = of(pod(512 << 20, 250_000, 0));
        assert_eq!((size.memory, size.vcpus, size.memory_max), (512 << 20, 3, 32 << 30));
        assert_eq!(of(pod((512 << 20) - 1, 1, 0)).memory, 512 << 20, "whole pieces");
        assert_eq!(of(pod(512 << 20, 1, 96 << 20)).memory, 560 << 20, "within limit and overhead");
        assert_eq!(of(pod(1, 1, 0)).memory, LEAST);
    }

    #[test]
    fn a_pod_without_limits_gets_what_the_handler_says_and_never_more_than_the_node_has() {
        let handler = MachineConfig::default();
        let size = of_pod(&PodSandboxConfig::default(), 0, &handler, NODE);
        assert_eq!((size.memory, size.vcpus), (handler.memory, handler.vcpus));
        let small = Node { processors: 1, memory: 1 << 30 };
        let size = of_pod(&pod(i64::MAX, i64::MAX, 0), u64::MAX, &handler, small);
        assert_eq!((size.memory, size.vcpus), (1 << 30, 1));
    }

    #[test]
    fn a_resize_stays_within_what_the_machine_was_born_for() {
        let size = Size { vcpus: 2, memory: 1 << 30, memory_max: 4 << 30 };
        let limits = |memory, quota| PodLimits {
            containers: messages::Resources {
                memory_limit: Some(memory),
                cpu_quota: Some(quota),
                cpu_period: Some(100_000),
                ..Default::default()
            },
            ..Default::default()
        };
        let handler = MachineConfig::default();
        let kubelets = |limits| {
            let After { memory, vcpus, .. } = after(&limits, size, false, &handler);
            (memory, vcpus)
        };
        assert_eq!(kubelets(limits(2 << 30, 150_000)), (Some(2 << 30), Some(2)));
        assert_eq!(kubelets(limits(8 << 30, 900_000)), (Some(4 << 30), Some(2)));
        assert_eq!(kubelets(limits(-1, -1)), (None, None));
    }

    #[test]
    fn a_resize_leaves_room_for_the_guest_as_the_birth_did() {
        let handler = MachineConfig::default();
        let born = of_pod(&pod(512 << 20, 0, 96 << 20), 96 << 20, &handler, NODE);
        let memory = |bytes: i64| messages::Resources { memory_limit: Some(bytes), ..Default::default() };
        let limits =
            |containers, cgroup| PodLimits { containers: memory(containers), cgroup: memory(cgroup) };
        let named = after(&limits(512 << 20, 608 << 20), born, false, &handler);
        assert_eq!((named.memory, named.cgroup.memory_limit), (Some(born.memory), Some(608 << 20)));
        let unnamed = after(&limits(512 << 20, 512 << 20), born, true, &handler);
        assert_eq!((unnamed.memory, unnamed.cgroup.memory_limit), (Some(born.memory), Some(608 << 20)));
    }
}
