//! Limits, written in an order that no intermediate state breaks.

use std::io;

use rustix::io::Errno;

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, convert, files};
use crate::protocol::messages::Resources;

/// Most lines of one `unified` value (io.max has one for each disk).
const MAX_UNIFIED_LINES: usize = 256;

pub(super) fn apply(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    if !resources.unified.is_empty() {
        check_unified(control, resources)?;
    }
    cpu(control, resources)?;
    cpuset(control, resources)?;
    memory(control, resources)?;
    pids(control, resources)?;
    hugepages(control, resources)?;
    // Last: where both say something, the file that was named is meant.
    unified(control, resources)
}

/// CRI's 0 is "not given".
fn given(value: Option<i64>) -> Option<i64> {
    value.filter(|value| *value != 0)
}

/// −1 is "no limit"; anything lower is a mistake.
fn check_limit(limit: &str, value: Option<i64>) -> Result<(), CgroupError> {
    match value {
        Some(value) if value < -1 => Err(CgroupError::InvalidLimit {
            limit: limit.to_owned(),
            reason: format!("{value} is neither an amount nor -1 for \"no limit\""),
        }),
        _ => Ok(()),
    }
}

fn cpu(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    let shares = resources.cpu_shares.filter(|shares| *shares != 0);
    let (quota, period) = (given(resources.cpu_quota), given(resources.cpu_period));
    check_limit("the CPU quota", quota)?;
    if let Some(period @ ..0) = period {
        let reason = format!("{period} microseconds is no period");
        return Err(CgroupError::InvalidLimit { limit: "the CPU period".into(), reason });
    }
    if shares.is_none() && quota.is_none() && period.is_none() {
        return Ok(());
    }
    let Some(version) = control.version_of("cpu") else {
        // "No quota" asks for nothing.
        let harmless = shares.is_none() && quota.is_none_or(|quota| quota < 0);
        return if harmless { Ok(()) } else { Err(control.missing("cpu", "the CPU limits")) };
    };
    match version {
        Version::V1(_) => {
            if let Some(shares) = shares {
                control.set("cpu", version, "cpu.shares", &shares.to_string())?;
            }
            cfs_v1(control, version, quota, period)
        }
        Version::V2 => {
            if let Some(shares) = shares {
                let weight = convert::weight_of_shares(shares).to_string();
                control.set("cpu", version, "cpu.weight", &weight)?;
            }
            let present = || control.read(version, "cpu.max");
            match convert::cpu_max(quota, period, present)? {
                Some(text) => control.set("cpu", version, "cpu.max", &text),
                None => Ok(()),
            }
        }
    }
}

/// Quota and period are two files of which the kernel checks the quotient against parent and children at each write:
/// where the new period is refused beside the old quota, the quota goes first.
fn cfs_v1(
    control: &Control,
    version: Version,
    quota: Option<i64>,
    period: Option<i64>,
) -> Result<(), CgroupError> {
    let set_quota = || match quota {
        Some(quota) => control.set("cpu", version, "cpu.cfs_quota_us", &quota.to_string()),
        None => Ok(()),
    };
    let Some(period) = period else { return set_quota() };
    let text = period.to_string();
    match control.try_write(version, "cpu.cfs_period_us", &text) {
        Ok(()) => set_quota(),
        Err(error) if is_errno(&error, Errno::INVAL) && quota.is_some() => {
            set_quota()?;
            control.set("cpu", version, "cpu.cfs_period_us", &text)
        }
        Err(_) => control.set("cpu", version, "cpu.cfs_period_us", &text),
    }
}

fn cpuset(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    for (file, value) in [("cpuset.cpus", &resources.cpuset_cpus), ("cpuset.mems", &resources.cpuset_mems)] {
        if value.is_empty() {
            continue;
        }
        if !value.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'-')) {
            let shown: String = value.chars().take(80).collect();
            let reason = format!("{shown:?} is not a list such as 0-3,7");
            return Err(CgroupError::InvalidLimit { limit: file.into(), reason });
        }
        let version = control.version_of("cpuset").ok_or_else(|| control.missing("cpuset", file))?;
        control.set("cpuset", version, file, value)?;
    }
    Ok(())
}

fn memory(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    let (limit, swap) = (given(resources.memory_limit), given(resources.memory_swap_limit));
    check_limit("the memory limit", limit)?;
    check_limit("the swap limit", swap)?;
    if limit.is_none() && swap.is_none() {
        return Ok(());
    }
    let Some(version) = control.version_of("memory") else {
        let harmless = limit.is_none_or(|limit| limit < 0);
        return if harmless { Ok(()) } else { Err(control.missing("memory", "the memory limit")) };
    };
    match version {
        Version::V1(_) => memory_v1(control, version, limit, swap),
        Version::V2 => {
            // The two do not constrain each other. Swap goes first, so that a container that loses memory and swap
            // does not fill the swap that it is about to lose.
            let present = || control.read(version, "memory.max");
            if let Some(text) = convert::swap_max(limit, swap, present)? {
                ignore_missing(control.try_write(version, "memory.swap.max", &text))
                    .map_err(|error| control.failed_write("memory.swap.max", &text, error))?;
            }
            match limit {
                Some(limit) => control.set("memory", version, "memory.max", &convert::max_or(limit)),
                None => Ok(()),
            }
        }
    }
}

/// The kernel keeps memory.limit ≤ memory.memsw.limit at every moment: a growing sum goes first, a shrinking one last.
fn memory_v1(
    control: &Control,
    version: Version,
    limit: Option<i64>,
    swap: Option<i64>,
) -> Result<(), CgroupError> {
    const LIMIT: &str = "memory.limit_in_bytes";
    const SUM: &str = "memory.memsw.limit_in_bytes";
    let sum = swap.or(limit);
    let set_limit = || match limit {
        Some(limit) => control.set("memory", version, LIMIT, &limit.to_string()),
        None => Ok(()),
    };
    let present: u64 = match control.try_read(version, SUM) {
        Ok(text) => text.trim().parse().unwrap_or(u64::MAX),
        // No swap accounting: kubelet sends a swap limit all the same, and without accounting there is none to keep.
        Err(error) if files::is_missing(&error) => return set_limit(),
        Err(error) => return Err(control.failed(format!("read {SUM}"), error)),
    };
    let Some(sum) = sum else { return Ok(()) };
    let unbounded_memory = limit.is_some_and(|limit| limit < 0) || limit.is_none();
    if sum >= 0 && limit.is_some_and(|limit| limit > sum) || sum >= 0 && limit.is_some() && unbounded_memory {
        let reason = format!("memory and swap together ({sum} bytes) cannot be less than memory alone");
        return Err(CgroupError::InvalidLimit { limit: "the swap limit".into(), reason });
    }
    let set_sum = || control.set("memory", version, SUM, &sum.to_string());
    let grows = sum < 0 || sum as u64 > present;
    if grows {
        set_sum()?;
        set_limit()
    } else {
        set_limit()?;
        set_sum()
    }
}

fn pids(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    let Some(limit) = given(resources.pids_limit) else { return Ok(()) };
    check_limit("the process limit", Some(limit))?;
    match control.version_of("pids") {
        Some(version) => control.set("pids", version, "pids.max", &convert::max_or(limit)),
        None if limit < 0 => Ok(()),
        None => Err(control.missing("pids", "pids.max")),
    }
}

/// kubelet limits every page size that the node has, to 0 where the pod asked for none.
fn hugepages(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    let version = control.version_of("hugetlb");
    for one in &resources.hugepage_limits {
        convert::check_page_size(&one.page_size)?;
        let size = &one.page_size;
        let (limit, reserved) = match version {
            Some(Version::V2) => (format!("hugetlb.{size}.max"), format!("hugetlb.{size}.rsvd.max")),
            _ => (format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.rsvd.limit_in_bytes")),
        };
        let value = one.limit.to_string();
        let written = match version {
            Some(version) => control.set("hugetlb", version, &limit, &value),
            None => Err(control.missing("hugetlb", &limit)),
        };
        match (written, version) {
            (Ok(()), Some(version)) => {
                // Since Linux 5.7: limits what is reserved by mmap too, else a fault beyond the limit is a SIGBUS.
                ignore_missing(control.try_write(version, &reserved, &value))
                    .map_err(|error| control.failed_write(&reserved, &value, error))?;
            }
            (Err(CgroupError::MissingController { .. }), _) if one.limit == 0 => {}
            (written, _) => written?,
        }
    }
    Ok(())
}

fn check_unified(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    if !control.directories.hierarchies.is_v2() {
        return Err(CgroupError::InvalidLimit {
            limit: "the unified limits".into(),
            reason: "this machine runs cgroup v1".into(),
        });
    }
    for (file, value) in &resources.unified {
        let shown = || file.chars().take(80).collect::<String>();
        let refuse = |reason: &str| CgroupError::InvalidLimit {
            limit: format!("the unified limit {:?}", shown()),
            reason: reason.to_owned(),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let Some((controller, rest)) = file.split_once('.') else {
            return Err(refuse("it is not the name of a controller's file"));
        };
        if rest.is_empty() || file.len() > 255 || !file.bytes().all(plain) {
            return Err(refuse("it is not the name of a controller's file"));
        }
        if value.lines().count() > MAX_UNIFIED_LINES {
            return Err(refuse("its value has too many lines"));
        }
        // Also keeps cgroup.procs and the like out of reach.
        if control.version_of(controller).is_none() {
            return Err(control.missing(controller, file));
        }
    }
    Ok(())
}

fn unified(control: &Control, resources: &Resources) -> Result<(), CgroupError> {
    for (file, value) in &resources.unified {
        let controller = file.split('.').next().unwrap_or_default();
        // Files with a line for each device take one line at a time.
        for line in value.lines() {
            control.set(controller, Version::V2, file, line)?;
        }
    }
    Ok(())
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if files::is_missing(&error) => Ok(()),
        other => other,
    }
}

fn is_errno(error: &io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}
