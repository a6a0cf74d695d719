//! The host's user ids of pods' machines: 65,536 for each pod, from one range that nothing else on a host uses.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// First of all; below it lies what useradd, systemd's containers and kubelet's pods take.
const FIRST: u32 = 1_879_048_192;
/// Ids of one pod.
pub(super) const COUNT: u32 = 65_536;
/// Pods that fit below 0x7FFE0000, where systemd has its foreign ids.
const PODS: u32 = 4094;

/// Which ranges are taken, and by which pod.
#[derive(Debug, Default)]
pub struct IdRanges(Mutex<BTreeMap<u32, String>>);

impl IdRanges {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<u32, String>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes a free range for the pod and returns its first id; None if there are as many pods as ranges.
    pub(super) fn take(&self, pod: &str) -> Option<u32> {
        self.change(|taken| {
            let number = (0..PODS).find(|number| !taken.contains_key(number))?;
            taken.insert(number, pod.to_owned());
            Some(FIRST + number * COUNT)
        })
    }

    /// A machine of a former hulld has it.
    pub(super) fn hold(&self, base: u32, pod: &str) {
        self.change(|taken| taken.insert(number_of(base), pod.to_owned()));
    }

    /// The pod has it no more. Said again, it changes nothing: another pod may have it by then.
    pub(super) fn give_back(&self, base: u32, pod: &str) {
        self.change(|taken| {
            let number = number_of(base);
            if taken.get(&number).is_some_and(|holder| holder == pod) {
                taken.remove(&number);
            }
        });
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
        ranges.hold(FIRST + COUNT, "old");
        assert_eq!((ranges.take("a"), ranges.take("b")), (Some(FIRST), Some(FIRST + 2 * COUNT)));
        ranges.give_back(FIRST, "a");
        assert_eq!(ranges.take("c"), Some(FIRST));
        let last = std::iter::from_fn(|| ranges.take("more")).last().unwrap();
        assert!(u64::from(last) + u64::from(COUNT) <= 1 << 31);
    }

    #[test]
    fn what_is_given_back_twice_is_not_taken_from_its_next_holder() {
        let ranges = IdRanges::default();
        ranges.take("a");
        ranges.give_back(FIRST, "a");
        assert_eq!(ranges.take("b"), Some(FIRST));
        ranges.give_back(FIRST, "a");
        assert_eq!(ranges.take("c"), Some(FIRST + COUNT));
    }
}
