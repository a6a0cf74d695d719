//! Limits: in CRI 0 means "not given".

use std::collections::BTreeMap;

use hull_agent::protocol::messages;

use super::invalid;
use crate::api::runtime::LinuxContainerResources;
use crate::runtime::Error;

/// oom_score_adj's range (proc(5)).
const OOM_SCORE: std::ops::RangeInclusive<i64> = -1000..=1000;

/// CFS period where none is given, in microseconds (the kernel's default).
const CPU_PERIOD: i64 = 100_000;

/// Limits for the agent.
pub fn limits(cri: &LinuxContainerResources) -> Result<messages::Resources, Error> {
    let given = |value: i64| (value != 0).then_some(value);
    if cri.cpu_shares < 0 {
        return Err(invalid(format!("cpu_shares {} is negative", cri.cpu_shares)));
    }
    if cri.cpu_period < 0 || cri.cpu_quota < -1 || cri.memory_limit_in_bytes < -1 {
        return Err(invalid(
            "cpu_period, cpu_quota and memory_limit_in_bytes cannot be negative (-1: no limit)",
        ));
    }
    for name in cri.unified.keys() {
        if name.contains('/') || !name.contains('.') || name.starts_with('.') {
            return Err(invalid(format!("{name:?} is not a file of cgroup v2")));
        }
    }
    Ok(messages::Resources {
        cpu_period: given(cri.cpu_period),
        cpu_quota: given(cri.cpu_quota),
        cpu_shares: (cri.cpu_shares > 0).then_some(cri.cpu_shares as u64),
        cpuset_cpus: cri.cpuset_cpus.clone(),
        cpuset_mems: cri.cpuset_mems.clone(),
        memory_limit: given(cri.memory_limit_in_bytes),
        memory_swap_limit: given(cri.memory_swap_limit_in_bytes),
        hugepage_limits: cri
            .hugepage_limits
            .iter()
            .map(|limit| messages::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: cri.unified.clone(),
        pids_limit: None,
    })
}

/// oom_score_adj of a container: always set, or it would inherit the agent's protection.
pub fn oom_score_adj(cri: Option<&LinuxContainerResources>) -> Result<i32, Error> {
    let value = cri.map_or(0, |resources| resources.oom_score_adj);
    if !OOM_SCORE.contains(&value) {
        return Err(invalid(format!("oom_score_adj {value} is not between -1000 and 1000")));
    }
    Ok(value as i32)
}

/// What is in force after an update: what the update names replaces what was there.
pub fn merged(old: &LinuxContainerResources, update: &LinuxContainerResources) -> LinuxContainerResources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &String, new: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut unified: BTreeMap<String, String> = old.unified.clone();
    unified.extend(update.unified.clone());
    let mut hugepages = old.hugepage_limits.clone();
    for limit in &update.hugepage_limits {
        hugepages.retain(|known| known.page_size != limit.page_size);
        hugepages.push(limit.clone());
    }
    LinuxContainerResources {
        cpu_period: number(old.cpu_period, update.cpu_period),
        cpu_quota: number(old.cpu_quota, update.cpu_quota),
        cpu_shares: number(old.cpu_shares, update.cpu_shares),
        memory_limit_in_bytes: number(old.memory_limit_in_bytes, update.memory_limit_in_bytes),
        oom_score_adj: number(old.oom_score_adj, update.oom_score_adj),
        cpuset_cpus: text(&old.cpuset_cpus, &update.cpuset_cpus),
        cpuset_mems: text(&old.cpuset_mems, &update.cpuset_mems),
        hugepage_limits: hugepages,
        unified,
        memory_swap_limit_in_bytes: number(old.memory_swap_limit_in_bytes, update.memory_swap_limit_in_bytes),
    }
}

/// The limits of a pod's cgroup: what its containers may use, and what the sandbox itself does. No limit on the
/// containers is no limit at all.
pub fn with_overhead(
    resources: &LinuxContainerResources,
    overhead: &LinuxContainerResources,
) -> LinuxContainerResources {
    let sum = |limit: i64, more: i64| if limit > 0 { limit.saturating_add(more.max(0)) } else { limit };
    // The overhead's share of the processors, in the period of the containers.
    let period = |cri: &LinuxContainerResources| if cri.cpu_period > 0 { cri.cpu_period } else { CPU_PERIOD };
    let quota =
        i128::from(overhead.cpu_quota.max(0)) * i128::from(period(resources)) / i128::from(period(overhead));
    LinuxContainerResources {
        cpu_quota: sum(resources.cpu_quota, i64::try_from(quota).unwrap_or(i64::MAX)),
        cpu_shares: sum(resources.cpu_shares, overhead.cpu_shares),
        memory_limit_in_bytes: sum(resources.memory_limit_in_bytes, overhead.memory_limit_in_bytes),
        memory_swap_limit_in_bytes: sum(resources.memory_swap_limit_in_bytes, overhead.memory_limit_in_bytes),
        ..resources.clone()
    }
}

/// What has to be sent so that an update changes only what it names. An agent takes a memory limit without a swap limit
/// as "no swap"; a container that has some keeps as much of it beside its new memory.
pub fn update(old: &LinuxContainerResources, update: &LinuxContainerResources) -> LinuxContainerResources {
    let mut sent = update.clone();
    let (memory, swap) = (update.memory_limit_in_bytes, update.memory_swap_limit_in_bytes);
    if memory > 0 && swap == 0 {
        sent.memory_swap_limit_in_bytes = match old.memory_swap_limit_in_bytes {
            old_swap @ ..0 => old_swap,
            0 => 0,
            old_swap => memory.saturating_add((old_swap - old.memory_limit_in_bytes.max(0)).max(0)),
        };
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_not_a_limit() {
        let limits = limits(&LinuxContainerResources::default()).unwrap();
        assert_eq!(limits, messages::Resources::default());
    }

    #[test]
    fn limits_are_carried_over() {
        let cri = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 30,
            cpuset_cpus: "0-1".into(),
            ..Default::default()
        };
        let limits = limits(&cri).unwrap();
        assert_eq!(
            (limits.cpu_period, limits.cpu_quota, limits.cpu_shares),
            (Some(100_000), Some(-1), Some(512))
        );
        assert_eq!((limits.memory_limit, limits.cpuset_cpus.as_str()), (Some(1 << 30), "0-1"));
    }

    #[test]
    fn nonsense_is_refused() {
        for cri in [
            LinuxContainerResources { cpu_shares: -1, ..Default::default() },
            LinuxContainerResources { memory_limit_in_bytes: -2, ..Default::default() },
            LinuxContainerResources {
                unified: [("../cgroup.procs".to_owned(), "1".to_owned())].into(),
                ..Default::default()
            },
        ] {
            assert!(limits(&cri).is_err(), "{cri:?}");
        }
        let cri = LinuxContainerResources { oom_score_adj: 1001, ..Default::default() };
        assert!(oom_score_adj(Some(&cri)).is_err());
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let old = LinuxContainerResources { cpu_shares: 2, cpu_quota: 5000, ..Default::default() };
        let update = LinuxContainerResources { cpu_shares: 1024, ..Default::default() };
        let new = merged(&old, &update);
        assert_eq!((new.cpu_shares, new.cpu_quota), (1024, 5000));
    }

    #[test]
    fn more_memory_leaves_a_container_the_swap_that_it_had() {
        let old = LinuxContainerResources {
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: 130,
            ..Default::default()
        };
        let sent = |memory, swap| {
            let asked = LinuxContainerResources {
                memory_limit_in_bytes: memory,
                memory_swap_limit_in_bytes: swap,
                ..Default::default()
            };
            update(&old, &asked).memory_swap_limit_in_bytes
        };
        assert_eq!(sent(200, 0), 230);
        assert_eq!(sent(200, 200), 200, "what is named is meant");
        assert_eq!(sent(0, 0), 0);
        let unlimited = LinuxContainerResources { memory_swap_limit_in_bytes: -1, ..Default::default() };
        let asked = LinuxContainerResources { memory_limit_in_bytes: 5, ..Default::default() };
        assert_eq!(update(&unlimited, &asked).memory_swap_limit_in_bytes, -1);
        assert_eq!(update(&LinuxContainerResources::default(), &asked).memory_swap_limit_in_bytes, 0);
    }

    #[test]
    fn overhead_comes_on_top_of_limits_and_makes_none() {
        let resources = LinuxContainerResources {
            cpu_period: 50_000,
            cpu_quota: 25_000,
            memory_limit_in_bytes: 100,
            ..Default::default()
        };
        let overhead = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 10_000,
            cpu_shares: 10,
            memory_limit_in_bytes: 7,
            ..Default::default()
        };
        let pod = with_overhead(&resources, &overhead);
        assert_eq!((pod.cpu_period, pod.cpu_quota, pod.memory_limit_in_bytes), (50_000, 30_000, 107));
        assert_eq!(pod.cpu_shares, 0);
        let unlimited = LinuxContainerResources { cpu_quota: -1, ..Default::default() };
        let pod = with_overhead(&unlimited, &overhead);
        assert_eq!((pod.cpu_quota, pod.memory_limit_in_bytes), (-1, 0));
    }
}
