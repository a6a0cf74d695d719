//! Compiled programs, kept for the next container with the same profile.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Program, SeccompError};

/// Most programs kept: a node uses a handful of profiles with a handful of capability sets. Bounds the memory too, as
/// the keys hold profiles of up to 1 MiB.
const CAPACITY: usize = 32;

/// What a program depends on. The whole text stands for itself: no digest can make two profiles the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    RuntimeDefault { caps: u64 },
    File { text: Arc<[u8]>, caps: u64 },
}

/// The most recently used programs, the latest first.
pub(super) struct Cache {
    programs: Mutex<VecDeque<(Key, Arc<Program>)>>,
}

impl Cache {
    pub(super) const fn new() -> Self {
        Self { programs: Mutex::new(VecDeque::new()) }
    }

    /// The program for `key`, from `make` if it is not there. Two callers may make the same one at the same time;
    /// neither waits for the other. Failures are not kept.
    pub(super) fn get_or_make(
        &self,
        key: Key,
        make: impl FnOnce() -> Result<Program, SeccompError>,
    ) -> Result<Arc<Program>, SeccompError> {
        if let Some(found) = self.find(&key) {
            return Ok(found);
        }
        let program = Arc::new(make()?);
        // A panic cannot leave the queue half changed, so a poisoned lock is as good.
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        programs.retain(|(known, _)| *known != key);
        programs.push_front((key, program.clone()));
        programs.truncate(CAPACITY);
        Ok(program)
    }

    fn find(&self, key: &Key) -> Option<Arc<Program>> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        let place = programs.iter().position(|(known, _)| known == key)?;
        let entry = programs.remove(place)?;
        let program = entry.1.clone();
        programs.push_front(entry);
        Some(program)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(flags: u32) -> Program {
        Program { bpf: vec![], flags }
    }

    #[test]
    fn a_program_is_made_once_for_each_key() {
        let cache = Cache::new();
        let key = |caps| Key::File { text: Arc::from(&b"{}"[..]), caps };
        let first = cache.get_or_make(key(1), || Ok(program(1))).unwrap();
        let again = cache.get_or_make(key(1), || panic!("it is kept")).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        assert_eq!(cache.get_or_make(key(2), || Ok(program(2))).unwrap().flags, 2);
    }

    #[test]
    fn the_longest_unused_ones_are_dropped() {
        let cache = Cache::new();
        for caps in 0..=CAPACITY as u64 {
            cache.get_or_make(Key::RuntimeDefault { caps }, || Ok(program(0))).unwrap();
            // Used all the time, so kept.
            cache.get_or_make(Key::RuntimeDefault { caps: 0 }, || panic!("it is kept")).unwrap();
        }
        assert!(cache.find(&Key::RuntimeDefault { caps: 1 }).is_none());
        assert!(cache.find(&Key::RuntimeDefault { caps: 2 }).is_some());
    }

    #[test]
    fn a_failure_is_not_kept() {
        let cache = Cache::new();
        let key = Key::RuntimeDefault { caps: 7 };
        assert!(cache.get_or_make(key.clone(), || Err(SeccompError::Notify)).is_err());
        assert!(cache.get_or_make(key, || Ok(program(0))).is_ok());
    }
}
