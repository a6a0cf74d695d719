//! From CRI's units, which are those of v1, to those of v2. Pure.

use super::CgroupError;

/// Bounds of cpu.shares (linux/sched: MIN_SHARES, MAX_SHARES).
const SHARES: (u64, u64) = (2, 262_144);
/// Bounds of cpu.weight (cgroup-v2.rst).
const WEIGHT: (u64, u64) = (1, 10_000);

/// cpu.shares → cpu.weight by the curve through (2, 1), (1024, 100) and (262144, 10000), a quadratic in log2 space,
/// as runc, crun and kubelet have computed it since 2025 (kubernetes issue 131216): the default of one is the default
/// of the other, and small requests keep a resolution that the older linear rule lost.
pub fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(SHARES.0, SHARES.1);
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // The curve meets its ends up to rounding errors of floating point, which must not lift 1 to 2.
    let weight = (10_f64.powf(exponent) - 1e-9).ceil();
    (weight as u64).clamp(WEIGHT.0, WEIGHT.1)
}

/// cpu.weight → cpu.shares, the inverse of [`weight_of_shares`], so that limits read alike on both versions.
pub(super) fn shares_of_weight(weight: u64) -> u64 {
    let weight = weight.clamp(WEIGHT.0, WEIGHT.1) as f64;
    // log² + 125·log = 612·(log10(weight) + 7/34), solved for log.
    let right = 612.0 * (weight.log10() + 7.0 / 34.0);
    let log = (-125.0 + (125.0 * 125.0 + 4.0 * right).sqrt()) / 2.0;
    (log.exp2().round() as u64).clamp(SHARES.0, SHARES.1)
}

/// The text for cpu.max. A quota without a period keeps the period of before, as the file allows; a period alone
/// keeps the quota of before, given as the file's present text.
pub(super) fn cpu_max(
    quota: Option<i64>,
    period: Option<i64>,
    present: impl FnOnce() -> Result<String, CgroupError>,
) -> Result<Option<String>, CgroupError> {
    let quota = match quota {
        None if period.is_none() => return Ok(None),
        None => present()?.split_ascii_whitespace().next().unwrap_or("max").to_owned(),
        Some(quota) if quota < 0 => "max".to_owned(),
        Some(quota) => quota.to_string(),
    };
    Ok(Some(match period {
        Some(period) => format!("{quota} {period}"),
        None => quota,
    }))
}

/// `max` for "no limit" (−1), else the number.
pub(super) fn max_or(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// The text for memory.swap.max (v2: swap alone), from the limit of memory and swap together (v1, CRI). `present` is
/// the text of memory.max, needed when only the swap limit changes.
pub(super) fn swap_max(
    memory: Option<i64>,
    swap: Option<i64>,
    present: impl FnOnce() -> Result<String, CgroupError>,
) -> Result<Option<String>, CgroupError> {
    let refuse = |reason: String| CgroupError::InvalidLimit { limit: "the swap limit".into(), reason };
    let swap = match (memory, swap) {
        (None, None) => return Ok(None),
        (Some(memory), None) => return Ok(Some(if memory < 0 { "max" } else { "0" }.to_owned())),
        (_, Some(swap)) if swap < 0 => return Ok(Some("max".to_owned())),
        (_, Some(swap)) => swap,
    };
    let memory = match memory {
        Some(memory) => memory,
        None => present()?.trim().parse().unwrap_or(-1),
    };
    if memory < 0 {
        return Err(refuse(format!(
            "memory and swap together cannot be {swap} bytes while memory has no limit"
        )));
    }
    if swap < memory {
        return Err(refuse(format!(
            "memory and swap together ({swap} bytes) cannot be less than memory alone ({memory} bytes)"
        )));
    }
    Ok(Some((swap - memory).to_string()))
}

/// A huge page size as it stands in file names, e.g. `2MB` or `1GB`.
pub(super) fn check_page_size(size: &str) -> Result<(), CgroupError> {
    let digits =
        size.strip_suffix("KB").or_else(|| size.strip_suffix("MB")).or_else(|| size.strip_suffix("GB"));
    let good = digits.is_some_and(|digits| {
        !digits.is_empty() && digits.len() <= 6 && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    if good {
        return Ok(());
    }
    let shown: String = size.chars().take(40).collect();
    Err(CgroupError::InvalidLimit {
        limit: "a huge page limit".into(),
        reason: format!("{shown:?} is not a page size such as 2MB"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unread() -> Result<String, CgroupError> {
        panic!("the present value is not needed")
    }

    #[test]
    fn default_shares_are_the_default_weight() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 100);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn more_shares_never_weigh_less() {
        let weights: Vec<u64> = (2..20_000).map(weight_of_shares).collect();
        assert!(weights.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn cpu_max_keeps_what_is_not_given() {
        assert_eq!(cpu_max(None, None, unread).unwrap(), None);
        assert_eq!(cpu_max(Some(50_000), Some(100_000), unread).unwrap().unwrap(), "50000 100000");
        assert_eq!(cpu_max(Some(-1), Some(100_000), unread).unwrap().unwrap(), "max 100000");
        assert_eq!(cpu_max(Some(20_000), None, unread).unwrap().unwrap(), "20000");
        let present = || Ok("20000 100000\n".to_owned());
        assert_eq!(cpu_max(None, Some(50_000), present).unwrap().unwrap(), "20000 50000");
    }

    #[test]
    fn swap_is_what_is_left_beside_memory() {
        assert_eq!(swap_max(Some(100), Some(150), unread).unwrap().unwrap(), "50");
        assert_eq!(swap_max(Some(100), Some(100), unread).unwrap().unwrap(), "0");
        assert_eq!(swap_max(Some(100), Some(-1), unread).unwrap().unwrap(), "max");
        assert_eq!(swap_max(Some(100), None, unread).unwrap().unwrap(), "0");
        assert_eq!(swap_max(Some(-1), None, unread).unwrap().unwrap(), "max");
        assert_eq!(swap_max(None, Some(150), || Ok("100\n".into())).unwrap().unwrap(), "50");
        assert!(swap_max(Some(100), Some(99), unread).is_err());
        assert!(swap_max(Some(-1), Some(99), unread).is_err());
        assert!(swap_max(None, Some(99), || Ok("max\n".into())).is_err());
    }

    #[test]
    fn a_page_size_cannot_name_another_file() {
        assert!(check_page_size("2MB").is_ok());
        assert!(check_page_size("64KB").is_ok());
        for bad in ["", "MB", "2mb", "2MB.rsvd", "../2MB", "2", "12345678MB"] {
            assert!(check_page_size(bad).is_err(), "{bad}");
        }
    }
}
