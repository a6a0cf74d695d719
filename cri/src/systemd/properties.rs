//! Limits as properties of a unit. systemd writes them itself, and again whenever it sees fit (daemon-reload, a new
//! sibling), so whatever hull writes into a cgroup must be known to systemd, too, or it is gone one day.

use hull_agent::cgroup::weight_of_shares;
use hull_agent::protocol::messages::Resources;

use super::wire::{Properties, Value};

/// "infinity"
const UNLIMITED: u64 = u64::MAX;
/// CFS period where none is given, in microseconds.
const PERIOD: i64 = 100_000;
/// systemd keeps quotas in steps of 10 ms of a second.
const QUOTA_STEP: u64 = 10_000;
/// Most CPUs or memory nodes in a list.
const MAX_BIT: usize = 8192;

/// What `resources` names; the rest is not mentioned.
pub fn of_limits(resources: &Resources, v2: bool) -> Properties {
    let mut all = Properties::new();
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    if let Some(shares) = resources.cpu_shares.filter(|shares| *shares != 0) {
        all.push(match v2 {
            true => ("CPUWeight", Value::U64(weight_of_shares(shares))),
            false => ("CPUShares", Value::U64(shares)),
        });
    }
    if let Some(quota) = given(resources.cpu_quota) {
        let period = given(resources.cpu_period).unwrap_or(PERIOD);
        all.push(("CPUQuotaPerSecUSec", Value::U64(quota_per_second(quota, period))));
        if period != PERIOD {
            all.push(("CPUQuotaPeriodUSec", Value::U64(period.unsigned_abs())));
        }
    }
    let memory = given(resources.memory_limit);
    if let Some(limit) = memory {
        all.push((if v2 { "MemoryMax" } else { "MemoryLimit" }, Value::U64(amount(limit))));
    }
    if v2 && (memory.is_some() || given(resources.memory_swap_limit).is_some()) {
        let swap = match (memory, given(resources.memory_swap_limit)) {
            (_, Some(..0)) => Some(UNLIMITED),
            (Some(memory), Some(sum)) => Some(u64::try_from(sum - memory).unwrap_or(0)),
            (Some(..0), None) => Some(UNLIMITED),
            (Some(_), None) => Some(0),
            (None, _) => None,
        };
        all.extend(swap.map(|swap| ("MemorySwapMax", Value::U64(swap))));
    }
    if let Some(limit) = given(resources.pids_limit) {
        all.push(("TasksMax", Value::U64(amount(limit))));
    }
    if v2 {
        for (name, list) in
            [("AllowedCPUs", &resources.cpuset_cpus), ("AllowedMemoryNodes", &resources.cpuset_mems)]
        {
            all.extend(bits(list).map(|bits| (name, Value::Bytes(bits))));
        }
        all.extend(resources.unified.iter().filter_map(|(file, value)| of_file(file, value)));
    }
    all
}

fn amount(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(UNLIMITED)
}

fn quota_per_second(quota: i64, period: i64) -> u64 {
    if quota < 0 {
        return UNLIMITED;
    }
    let quota = quota.unsigned_abs().saturating_mul(1_000_000) / period.unsigned_abs().max(1);
    quota.next_multiple_of(QUOTA_STEP)
}

/// The files of cgroup v2 that have a property of their own.
fn of_file(file: &str, value: &str) -> Option<(&'static str, Value)> {
    let name = match file {
        "memory.max" => "MemoryMax",
        "memory.high" => "MemoryHigh",
        "memory.low" => "MemoryLow",
        "memory.min" => "MemoryMin",
        "memory.swap.max" => "MemorySwapMax",
        "cpu.weight" => "CPUWeight",
        "pids.max" => "TasksMax",
        _ => return None,
    };
    let value = value.trim();
    Some((name, Value::U64(if value == "max" { UNLIMITED } else { value.parse().ok()? })))
}

/// `0-3,7` as a bit mask, lowest byte first; None for what is no list, or none.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_BIT {
            return None;
        }
        for bit in first..=last {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0);
            }
            mask[bit / 8] |= 1 << (bit % 8);
        }
    }
    (!mask.is_empty()).then_some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_the_properties_of_their_version() {
        let limits = Resources {
            cpu_shares: Some(1024),
            cpu_quota: Some(25_000),
            cpu_period: Some(50_000),
            memory_limit: Some(100),
            memory_swap_limit: Some(150),
            cpuset_cpus: "0-1,9".into(),
            ..Resources::default()
        };
        let v2 = of_limits(&limits, true);
        assert_eq!(
            v2,
            [
                ("CPUWeight", Value::U64(100)),
                ("CPUQuotaPerSecUSec", Value::U64(500_000)),
                ("CPUQuotaPeriodUSec", Value::U64(50_000)),
                ("MemoryMax", Value::U64(100)),
                ("MemorySwapMax", Value::U64(50)),
                ("AllowedCPUs", Value::Bytes(vec![3, 2])),
            ]
        );
        let v1 = of_limits(&limits, false);
        assert!(
            v1.contains(&("CPUShares", Value::U64(1024))) && v1.contains(&("MemoryLimit", Value::U64(100)))
        );
        assert!(of_limits(&Resources::default(), true).is_empty());
    }

    #[test]
    fn no_limit_is_infinity_and_quotas_are_rounded_up() {
        let limits = Resources { cpu_quota: Some(-1), memory_limit: Some(-1), ..Resources::default() };
        let all = of_limits(&limits, true);
        assert!(all.iter().all(|(_, value)| *value == Value::U64(UNLIMITED)), "{all:?}");
        assert_eq!(quota_per_second(1001, 100_000), 20_000);
    }

    #[test]
    fn lists_that_are_none_are_left_to_the_kernel() {
        for bad in ["", "a", "3-1", "0-9999999", "1-"] {
            assert_eq!(bits(bad), None, "{bad}");
        }
    }
}
