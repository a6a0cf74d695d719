//! The host's user ids of pods' machines: 65,536 for each pod, from one range that nothing else on a host uses.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// First of all; below it lies what useradd, systemd's containers and kubelet's pods take.
const FIRST: u32 = 1_879_048_192;
/// Ids of one pod.
pub(super) const COUNT: u32 = 65_536;
/// Pods that fit below 0x7FFE0000, where systemd has its foreign ids.
const PODS: u32 = 4094;

/// Which ranges are taken.
#[derive(Debug, Default)]
pub struct IdRanges(Mutex<BTreeSet<u32>>);

impl IdRanges {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeSet<u32>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes a free range and returns its first id; None if there are as many pods as ranges.
    pub(super) fn take(&self) -> Option<u32> {
        self.change(|taken| {
            let number = (0..PODS).find(|number| !taken.contains(number))?;
            taken.insert(number);
            Some(FIRST + number * COUNT)
        })
    }

    /// A machine of a former hulld has it.
    pub(super) fn hold(&self, base: u32) {
        self.change(|taken| taken.insert(number_of(base)));
    }

    /// Nobody has it any more.
    pub(super) fn give_back(&self, base: u32) {
        self.change(|taken| taken.remove(&number_of(base)));
    }
}

fn number_of(base: u32) -> u32 {
    base.wrapping_sub(FIRST) / COUNT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_pods_have_an_id_in_common_and_none_passes_the_middle() {
        let ranges = IdRanges::default();
        ranges.hold(FIRST + COUNT);
        assert_eq!((ranges.take(), ranges.take()), (Some(FIRST), Some(FIRST + 2 * COUNT)));
        ranges.give_back(FIRST);
        assert_eq!(ranges.take(), Some(FIRST));
        let last = std::iter::from_fn(|| ranges.take()).last().unwrap();
        assert!(u64::from(last) + u64::from(COUNT) <= 1 << 31);
    }
}
