use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Something that requests use and that may be taken away from them: whoever takes it away can wait until the last request
/// that still uses it has ended.
pub(super) struct Leased<T> {
    value: T,
    /// Requests that use it.
    leases: Mutex<usize>,
    /// Somebody is waiting, or was; set under the lock.
    waited_for: AtomicBool,
    ended: Condvar,
}

/// A use of something; it ends when this is dropped.
pub(super) struct Lease<T>(Arc<Leased<T>>);

impl<T> Leased<T> {
    pub(super) fn new(value: T) -> Arc<Self> {
        Arc::new(Self {
            value,
            leases: Mutex::new(0),
            waited_for: AtomicBool::new(false),
            ended: Condvar::new(),
        })
    }

    /// Uses it.
    pub(super) fn lease(self: &Arc<Self>) -> Lease<T> {
        *self.lock() += 1;
        Lease(Arc::clone(self))
    }

    /// Waits at most `patience` until nobody uses it; false if somebody still does. Whoever calls has seen to it that no
    /// new lease can be had.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut leases = self.lock();
        self.waited_for.store(true, Ordering::Relaxed);
        while *leases > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            leases = self.ended.wait_timeout(leases, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Leased<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Deref for Lease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        let mut leases = self.0.lock();
        *leases -= 1;
        if *leases == 0 && self.0.waited_for.load(Ordering::Relaxed) {
            self.0.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_away_waits_for_the_last_use_and_no_longer_than_it_may() {
        let leased = Leased::new(7);
        let (one, two) = (leased.lease(), leased.lease());
        assert_eq!((*one, **leased), (7, 7));
        drop(one);
        assert!(!leased.wait(Duration::from_millis(10)));
        let other = std::thread::spawn({
            let leased = Arc::clone(&leased);
            move || leased.wait(Duration::from_secs(60))
        });
        std::thread::sleep(Duration::from_millis(20));
        drop(two);
        assert!(other.join().unwrap());
        assert!(leased.wait(Duration::ZERO));
    }
}
