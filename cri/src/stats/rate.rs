//! How fast processor time is used, from samples that come whenever somebody asks.

use std::sync::{Mutex, PoisonError};

/// A younger sample is no base: over so short a time the rate would be noise.
const MIN_SPAN: i64 = 500_000_000;

/// The last samples of one container or pod.
#[derive(Debug, Default)]
pub struct Rate(Mutex<Samples>);

#[derive(Debug, Default)]
struct Samples {
    base: Option<Sample>,
    latest: Option<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Nanoseconds.
    at: i64,
    /// Nanoseconds of processor time.
    usage: u64,
}

impl Rate {
    /// Takes a sample, and gives the rate since the one before in billionths of a processor. `None` while there is no
    /// other sample that is old enough: kubelet then computes its own. Several clients that ask one right after the
    /// other get the same rate.
    pub fn sample(&self, at: i64, usage: u64) -> Option<u64> {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match samples.latest {
            Some(latest) if at.saturating_sub(latest.at) < MIN_SPAN => {}
            // A counter that went back is another start of the same container.
            Some(latest) if latest.usage > usage => {
                *samples = Samples { base: None, latest: Some(Sample { at, usage }) };
            }
            latest => *samples = Samples { base: latest, latest: Some(Sample { at, usage }) },
        }
        let base = samples.base?;
        let span = u128::try_from(at.saturating_sub(base.at)).ok().filter(|span| *span > 0)?;
        let used = u128::from(usage.checked_sub(base.usage)?);
        u64::try_from(used * 1_000_000_000 / span).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn two_samples_make_a_rate() {
        let rate = Rate::default();
        assert_eq!(rate.sample(SECOND, 100), None);
        assert_eq!(rate.sample(3 * SECOND, 1_000_000_100), Some(500_000_000));
        assert_eq!(rate.sample(5 * SECOND, 1_000_000_100), Some(0));
    }

    #[test]
    fn a_question_right_after_another_is_answered_with_the_same_base() {
        let rate = Rate::default();
        rate.sample(0, 0);
        assert_eq!(rate.sample(SECOND, 500_000_000), Some(500_000_000));
        assert_eq!(rate.sample(SECOND + 1, 500_000_000), Some(499_999_999));
    }

    #[test]
    fn a_counter_that_went_back_starts_anew() {
        let rate = Rate::default();
        rate.sample(0, 1000);
        assert_eq!(rate.sample(SECOND, 10), None);
        assert_eq!(rate.sample(2 * SECOND, 510), Some(500));
        assert_eq!(rate.sample(SECOND, 0), None, "nor does a clock that was set back do harm");
    }
}
