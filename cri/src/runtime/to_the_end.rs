//! Operations that are finished even if whoever asked for them goes away.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::{BoxFuture, CatchUnwind};
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// An operation that its caller runs. If the caller stops waiting, a task of its own takes it to its end. A task from the
/// beginning would cost a change of threads, there and back.
pub(super) struct ToTheEnd<T: Send + 'static> {
    operation: Option<CatchUnwind<AssertUnwindSafe<BoxFuture<'static, T>>>>,
    tracker: TaskTracker,
    /// Whoever waits for all operations waits for this one.
    _counted: TaskTrackerToken,
}

impl<T: Send + 'static> ToTheEnd<T> {
    pub(super) fn new(tracker: &TaskTracker, operation: impl Future<Output = T> + Send + 'static) -> Self {
        let operation = AssertUnwindSafe(operation.boxed()).catch_unwind();
        Self { operation: Some(operation), tracker: tracker.clone(), _counted: tracker.token() }
    }
}

impl<T: Send + 'static> Future for ToTheEnd<T> {
    /// What the operation came to, or what it panicked with.
    type Output = Result<T, Box<dyn Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(operation) = &mut self.operation else { return Poll::Pending };
        let result = std::task::ready!(operation.poll_unpin(cx));
        self.operation = None;
        Poll::Ready(result)
    }
}

impl<T: Send + 'static> Drop for ToTheEnd<T> {
    fn drop(&mut self) {
        let Some(operation) = self.operation.take() else { return };
        // Without a runtime, hulld itself is at its end.
        if let Ok(runtime) = Handle::try_current() {
            self.tracker.spawn_on(operation, &runtime);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn an_operation_whose_caller_goes_away_is_finished_and_waited_for() {
        let (tracker, go_on, steps) =
            (TaskTracker::new(), Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let (wait, count) = (Arc::clone(&go_on), Arc::clone(&steps));
        let operation = async move {
            count.fetch_add(1, Ordering::Relaxed);
            wait.notified().await;
            count.fetch_add(1, Ordering::Relaxed);
        };
        let caller = tokio::time::timeout(Duration::from_millis(10), ToTheEnd::new(&tracker, operation));
        assert!(caller.await.is_err(), "it waits");
        assert_eq!(steps.load(Ordering::Relaxed), 1);
        tracker.close();
        assert!(tracker.wait().now_or_never().is_none(), "it is under way");
        go_on.notify_one();
        tokio::time::timeout(Duration::from_secs(10), tracker.wait()).await.expect("it ends");
        assert_eq!(steps.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn one_that_nobody_ever_waited_for_is_done_all_the_same() {
        let (tracker, done) = (TaskTracker::new(), Arc::new(Notify::new()));
        let tell = Arc::clone(&done);
        drop(ToTheEnd::new(&tracker, async move { tell.notify_one() }));
        tokio::time::timeout(Duration::from_secs(10), done.notified()).await.expect("it is done");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn work_in_place_that_panics_is_an_error() {
        use super::super::blocking_here;
        let done = tokio::spawn(async { blocking_here(|| 7).await });
        assert_eq!(done.await.unwrap().unwrap(), 7);
        let broken = tokio::spawn(async { blocking_here(|| -> u8 { panic!("on purpose") }).await });
        let error = broken.await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "an operation broke off: on purpose");
    }

    #[tokio::test]
    async fn a_panic_ends_the_operation_and_not_the_caller() {
        let tracker = TaskTracker::new();
        let broken = ToTheEnd::new(&tracker, async { panic!("on purpose") });
        let reason: Box<dyn Any + Send> = broken.await.map(|(): ()| "no panic").unwrap_err();
        assert_eq!(reason.downcast_ref(), Some(&"on purpose"));
        tracker.close();
        tracker.wait().await;
    }
}
