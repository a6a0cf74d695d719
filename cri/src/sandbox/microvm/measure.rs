//! What a pod in a machine uses: containers and interfaces as its agent counts them, the pod as a whole as the host
//! counts it, VMM and all.

use std::collections::BTreeMap;
use std::sync::Arc;

use hull_agent::cgroup::stats::{
    Cpu, CpuLimits, DeviceIo, Hugepages, Limits, Memory, MemoryLimits, Pressure, Stall, Stalls, Usage,
};
use hull_agent::protocol::messages::{self, CgroupUsage, Measure, cgroup_usage as wire, request, response};

use super::cgroup::Cgroups;
use super::machine::Machine;
use crate::runtime::now;
use crate::sandbox::{Place, SandboxError, Slots};
use crate::stats::network::Counters;
use crate::stats::{Details, Interface, Measured, PodUsage, Subject};

/// What is believed of a guest at most: it writes what it likes, and whoever collects metrics keeps every name.
const INTERFACES: usize = 16;
const DEVICES: usize = 64;
const SIZES: usize = 8;

/// Asks the agent, and looks at the pod's cgroup.
pub(super) async fn measure(
    machine: Arc<Machine>,
    cgroups: Arc<Cgroups>,
    place: Place,
    subject: Subject,
) -> Result<PodUsage, SandboxError> {
    let call = request::Call::Measure(Measure { container_ids: subject.containers.clone() });
    let limit = crate::sandbox::agent::ANSWER_TIME;
    let answer = machine.agent.call_within(limit, "measure its pod", call, Slots::default()).await?;
    let response::Outcome::Measured(answer) = answer else {
        return Err(SandboxError::Unexpected("the measuring of the pod"));
    };
    // By the host's clock: a guest's may be off, and rates are computed from differences.
    let at = now();
    let mut usage = PodUsage::default();
    for container in &answer.containers {
        let Some(cgroup) = &container.cgroup else { continue };
        if subject.containers.contains(&container.id) {
            usage
                .containers
                .insert(container.id.clone(), of_container(at, &place, container, cgroup, &subject));
        }
    }
    if subject.whole_pod {
        let processes = usage.containers.values().map(|one| one.processes).sum::<u64>() + 1;
        let whole = tokio::task::spawn_blocking(move || of_pod(&cgroups, &place, processes)).await;
        usage.whole = Some(whole.unwrap_or_else(|error| Err(SandboxError::Source(error.to_string())))?);
        usage.interfaces = answer.interfaces.iter().filter_map(interface).take(INTERFACES).collect();
    }
    Ok(usage)
}

fn of_pod(cgroups: &Cgroups, place: &Place, processes: u64) -> Result<Measured, SandboxError> {
    let failed = |error: hull_agent::cgroup::CgroupError| SandboxError::Cgroup {
        action: "measure",
        reason: error.to_string(),
    };
    let (pod, _) = cgroups.existing(place)?;
    Ok(Measured {
        at: now(),
        cgroup: place.cgroup_parent.clone(),
        usage: pod.usage().map_err(failed)?,
        processes,
        limits: pod.limits().map_err(failed)?,
        details: None,
    })
}

fn of_container(
    at: i64,
    place: &Place,
    container: &messages::measured::Container,
    cgroup: &CgroupUsage,
    subject: &Subject,
) -> Measured {
    let details = || Details {
        descriptors: container.descriptors,
        sockets: container.sockets,
        ulimits: ulimits(&container.ulimits),
    };
    Measured {
        at,
        cgroup: format!("{}/{}", place.cgroup_parent.trim_end_matches('/'), container.id),
        usage: usage(cgroup),
        processes: container.processes,
        limits: limits(cgroup),
        details: subject.details.then(details),
    }
}

/// Linux has sixteen.
fn ulimits(told: &BTreeMap<String, u64>) -> Vec<(String, u64)> {
    let legal =
        |name: &str| name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    told.iter().filter(|(name, _)| legal(name)).take(16).map(|(name, value)| (name.clone(), *value)).collect()
}

/// None for one whose name no kernel would allow.
fn interface(one: &messages::measured::Interface) -> Option<Interface> {
    let legal = |letter: char| letter.is_ascii_graphic() && letter != '/';
    if one.name.is_empty() || one.name.len() > 15 || !one.name.chars().all(legal) {
        return None;
    }
    let counters = |one: &Option<messages::measured::Counters>| {
        let one = one.unwrap_or_default();
        Counters { bytes: one.bytes, packets: one.packets, errors: one.errors, dropped: one.dropped }
    };
    let (received, sent) = (counters(&one.received), counters(&one.sent));
    Some(Interface { name: one.name.clone(), received, sent })
}

fn usage(wire: &CgroupUsage) -> Usage {
    Usage {
        cpu: wire.cpu.as_ref().map(cpu),
        memory: wire.memory.as_ref().map(memory),
        hugepages: wire
            .hugepages
            .iter()
            .filter(|one| is_size(&one.size))
            .take(SIZES)
            .map(|one| Hugepages { size: one.size.clone(), usage: one.usage, max_usage: one.max_usage })
            .collect(),
        io: wire.io.iter().take(DEVICES).map(device).collect(),
        tasks: wire.tasks,
        tasks_limit: wire.tasks_limit,
        pressure: Pressure {
            cpu: wire.cpu_pressure.as_ref().map(stalls),
            memory: wire.memory_pressure.as_ref().map(stalls),
            io: wire.io_pressure.as_ref().map(stalls),
        },
    }
}

/// As the kernel names sizes of pages: "2MB".
fn is_size(name: &str) -> bool {
    (1..=8).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn cpu(wire: &wire::Cpu) -> Cpu {
    Cpu {
        usage: wire.usage,
        user: wire.user,
        system: wire.system,
        periods: wire.periods,
        throttled_periods: wire.throttled_periods,
        throttled: wire.throttled,
    }
}

fn memory(wire: &wire::Memory) -> Memory {
    Memory {
        usage: wire.usage,
        max_usage: wire.max_usage,
        working_set: wire.working_set,
        rss: wire.rss,
        cache: wire.cache,
        mapped_file: wire.mapped_file,
        kernel: wire.kernel,
        swap: wire.swap,
        faults: wire.faults,
        major_faults: wire.major_faults,
        own_faults: wire.own_faults,
        own_major_faults: wire.own_major_faults,
        limit_hits: wire.limit_hits,
        oom_kills: wire.oom_kills,
    }
}

fn device(wire: &wire::DeviceIo) -> DeviceIo {
    DeviceIo {
        major: wire.major,
        minor: wire.minor,
        read_bytes: wire.read_bytes,
        written_bytes: wire.written_bytes,
        reads: wire.reads,
        writes: wire.writes,
    }
}

fn stalls(wire: &wire::Stalls) -> Stalls {
    let stall = |one: &Option<wire::Stall>| {
        let one = one.unwrap_or_default();
        Stall {
            total: one.total,
            average_10: one.average_10,
            average_60: one.average_60,
            average_300: one.average_300,
        }
    };
    Stalls { some: stall(&wire.some), full: stall(&wire.full) }
}

fn limits(wire: &CgroupUsage) -> Limits {
    Limits {
        cpu: CpuLimits { shares: wire.cpu_shares, quota: wire.cpu_quota, period: wire.cpu_period },
        memory: MemoryLimits {
            memory: wire.memory_limit,
            swap: wire.swap_limit,
            swap_as_written: wire.swap_limit_as_written,
            reservation: wire.memory_reservation,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_agent::protocol::messages::measured;

    #[test]
    fn what_a_guest_tells_of_itself_has_an_end_and_no_strange_names() {
        let named = |name: &str| measured::Interface { name: name.into(), ..Default::default() };
        for name in ["", "sixteen-letters-", "a b", "a/b", "a\nb", "\u{1b}[0m", "\u{e4}"] {
            assert!(interface(&named(name)).is_none(), "{name:?}");
        }
        assert!(interface(&named("fifteen-letters")).is_some());
        let page = |size: String| wire::Hugepages { size, ..Default::default() };
        let mut told = CgroupUsage {
            io: vec![wire::DeviceIo::default(); 10_000],
            hugepages: (0..10_000).map(|number| page(format!("{number}kB"))).collect(),
            ..Default::default()
        };
        told.hugepages.insert(0, page("with a space".into()));
        told.hugepages.insert(0, page("far-too-long-to-be-a-size".into()));
        let believed = usage(&told);
        assert_eq!((believed.io.len(), believed.hugepages.len()), (DEVICES, SIZES));
        assert_eq!(believed.hugepages[0].size, "0kB");
        let limits = (0..100_u64).map(|number| (format!("limit_{}", "x".repeat(number as usize)), number));
        assert_eq!(ulimits(&limits.collect()).len(), 16);
    }
}
