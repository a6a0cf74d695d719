//! Processor time.

use super::super::CgroupError;
use super::super::convert;
use super::super::hierarchies::Version;
use super::{Reader, field};

/// `cpuacct.stat` counts in USER_HZ, which is 100 on every architecture that hull runs on.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

/// Processor time used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// All of it, in nanoseconds.
    pub usage: u64,
    /// In user mode, in nanoseconds.
    pub user: u64,
    /// In the kernel, in nanoseconds.
    pub system: u64,
    /// Enforcement periods of the quota that have passed.
    pub periods: u64,
    /// Those in which it ran out.
    pub throttled_periods: u64,
    /// Time spent waiting for the next period, in nanoseconds.
    pub throttled: u64,
}

/// Limits of processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// Weight in the units of v1 (1024 is the default), whatever the version.
    pub shares: Option<u64>,
    /// Microseconds of processor time in each period; `None` for no limit.
    pub quota: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
}

pub(super) fn usage(reader: Reader<'_>) -> Result<Option<Cpu>, CgroupError> {
    let mut cpu = match reader.version("cpuacct") {
        Some(version @ Version::V1(_)) => match v1(reader, version)? {
            Some(cpu) => cpu,
            None => return Ok(None),
        },
        // cpu.stat of the unified hierarchy has the times even where the controller is not enabled.
        _ => match reader.text(Version::V2, "cpu.stat")? {
            Some(text) => Cpu {
                usage: field(&text, "usage_usec").unwrap_or(0).saturating_mul(1000),
                user: field(&text, "user_usec").unwrap_or(0).saturating_mul(1000),
                system: field(&text, "system_usec").unwrap_or(0).saturating_mul(1000),
                ..Cpu::default()
            },
            None => return Ok(None),
        },
    };
    if let Some(version) = reader.version("cpu")
        && let Some(text) = reader.text(version, "cpu.stat")?
    {
        cpu.periods = field(&text, "nr_periods").unwrap_or(0);
        cpu.throttled_periods = field(&text, "nr_throttled").unwrap_or(0);
        cpu.throttled = match version {
            Version::V1(_) => field(&text, "throttled_time").unwrap_or(0),
            Version::V2 => field(&text, "throttled_usec").unwrap_or(0).saturating_mul(1000),
        };
    }
    Ok(Some(cpu))
}

fn v1(reader: Reader<'_>, version: Version) -> Result<Option<Cpu>, CgroupError> {
    let Some(usage) = reader.number_in(version, "cpuacct.usage")? else { return Ok(None) };
    let user = reader.number_in(version, "cpuacct.usage_user")?;
    let system = reader.number_in(version, "cpuacct.usage_sys")?;
    let (user, system) = match (user, system) {
        (Some(user), Some(system)) => (user, system),
        // Before 4.7 only in ticks.
        _ => {
            let text = reader.text(version, "cpuacct.stat")?.unwrap_or_default();
            let ticks = |key| field(&text, key).unwrap_or(0).saturating_mul(NANOSECONDS_PER_TICK);
            (ticks("user"), ticks("system"))
        }
    };
    Ok(Some(Cpu { usage, user, system, ..Cpu::default() }))
}

pub(super) fn limits(reader: Reader<'_>) -> Result<CpuLimits, CgroupError> {
    match reader.version("cpu") {
        None => Ok(CpuLimits::default()),
        Some(version @ Version::V1(_)) => Ok(CpuLimits {
            shares: reader.number_in(version, "cpu.shares")?,
            // -1 for none is no u64.
            quota: reader.number_in(version, "cpu.cfs_quota_us")?,
            period: reader.number_in(version, "cpu.cfs_period_us")?,
        }),
        Some(version @ Version::V2) => {
            let text = reader.text(version, "cpu.max")?.unwrap_or_default();
            let mut words = text.split_ascii_whitespace();
            Ok(CpuLimits {
                quota: words.next().and_then(|word| word.parse().ok()),
                period: words.next().and_then(|word| word.parse().ok()),
                shares: reader.number_in(version, "cpu.weight")?.map(convert::shares_of_weight),
            })
        }
    }
}
