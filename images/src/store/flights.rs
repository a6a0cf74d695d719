//! Operations in flight, joined by whoever asks for the same thing meanwhile.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Operations by key. `T` is the shared result, cheap to clone; `P` is where an operation shows its progress.
pub(super) struct Flights<K, T, P>(Mutex<HashMap<K, Weak<Flight<T, P>>>>);

/// One operation and everybody who waits for it. When the last one stops waiting it is aborted.
pub(super) struct Flight<T, P> {
    progress: P,
    result: watch::Receiver<Option<T>>,
    task: AbortHandle,
}

impl<K, T, P> Default for Flights<K, T, P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K, T, P> Flights<K, T, P>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the flight for `key`, or starts one with the future that `start` gives beside its progress. The bool says
    /// whether it started.
    pub(super) fn join<F>(&self, key: &K, start: impl FnOnce() -> (P, F)) -> (Arc<Flight<T, P>>, bool)
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A flight that was aborted or panicked has no sender and no result; one that has landed is history.
        if let Some(flight) = flights.get(key).and_then(Weak::upgrade).filter(|flight| flight.is_under_way())
        {
            return (flight, false);
        }
        let (sender, result) = watch::channel(None);
        let (progress, work) = start();
        let task = tokio::spawn(async move {
            let value = work.await;
            sender.send_replace(Some(value));
        });
        let flight = Arc::new(Flight { progress, result, task: task.abort_handle() });
        flights.retain(|_, flight| flight.strong_count() > 0);
        flights.insert(key.clone(), Arc::downgrade(&flight));
        (flight, true)
    }
}

impl<T: Clone, P> Flight<T, P> {
    /// Where the operation shows its progress.
    pub(super) fn progress(&self) -> &P {
        &self.progress
    }

    /// Waits for the result. None if the operation was torn down (its runtime ended, or it panicked).
    pub(super) async fn result(&self) -> Option<T> {
        let mut result = self.result.clone();
        let landed = result.wait_for(Option::is_some).await.ok()?;
        landed.clone()
    }

    fn is_under_way(&self) -> bool {
        self.result.borrow().is_none() && self.result.has_changed().is_ok()
    }
}

impl<T, P> Drop for Flight<T, P> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn those_who_ask_for_the_same_share_one_operation() {
        let flights: Arc<Flights<u8, u32, ()>> = Arc::default();
        let (go, wait) = oneshot::channel::<u32>();
        let (first, started) = flights.join(&1, || ((), async { wait.await.unwrap() }));
        let (second, started_again) = flights.join(&1, || ((), async { unreachable!() }));
        assert!(started && !started_again);
        drop(first);
        go.send(7).unwrap();
        assert_eq!(second.result().await, Some(7));
        let (_third, started) = flights.join(&1, || ((), async { 8 }));
        assert!(started, "a landed flight is not joined");
    }

    #[tokio::test]
    async fn the_last_who_leaves_ends_the_operation() {
        static ALIVE: AtomicUsize = AtomicUsize::new(0);
        struct Alive;
        impl Drop for Alive {
            fn drop(&mut self) {
                ALIVE.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let flights: Arc<Flights<u8, u32, ()>> = Arc::default();
        ALIVE.fetch_add(1, Ordering::SeqCst);
        let alive = Alive;
        let work = async move {
            let _alive = alive;
            std::future::pending().await
        };
        let (first, _) = flights.join(&1, || ((), work));
        let second = first.clone();
        drop(first);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(ALIVE.load(Ordering::SeqCst), 1);
        drop(second);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_panic_reaches_the_waiters_as_no_result() {
        let flights: Arc<Flights<u8, u32, ()>> = Arc::default();
        let (flight, _) = flights.join(&1, || ((), async { panic!("on purpose") }));
        assert_eq!(flight.result().await, None);
        let (again, started) = flights.join(&1, || ((), async { 3 }));
        assert!(started);
        assert_eq!(again.result().await, Some(3));
    }
}
