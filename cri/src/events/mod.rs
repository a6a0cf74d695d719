//! Changes, told in order to everybody who listens.
//!
//! A [`Board`] takes each change when it has been committed, under the lock that ordered the commit, and gives it a
//! time of its own: later than that of every change before. A task of hulld's turns changes into messages and
//! publishes them; every [`Subscription`] gets all that are published after it began, in that order. A listener that
//! does not keep up is let go with a clear status rather than fed from an ever longer queue: it lists and subscribes
//! again, which it must be able to do anyway.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;
use tonic::Status;

/// Messages that wait for one listener. Each is shared by all listeners, so a slow one holds at most these.
const BACKLOG: usize = 1024;
/// Listeners at the same time; kubelet is one, people with `crictl events` are some.
const MAX_LISTENERS: usize = 64;

/// A committed change with its time.
#[derive(Debug)]
pub struct Stamped<C> {
    /// Nanoseconds since 1970, strictly growing from change to change: also the change's number.
    pub at: i64,
    /// What changed.
    pub change: C,
}

/// Where changes are posted and messages read.
pub struct Board<C, M> {
    posts: Mutex<Posts<C>>,
    listeners: Arc<Mutex<Listeners<M>>>,
    /// How many there are, to be looked at without a lock.
    count: AtomicUsize,
}

struct Posts<C> {
    last: i64,
    sender: mpsc::UnboundedSender<Stamped<C>>,
    receiver: Option<mpsc::UnboundedReceiver<Stamped<C>>>,
}

struct Listeners<M> {
    open: Vec<Listener<M>>,
    closed: bool,
}

struct Listener<M> {
    sender: mpsc::Sender<Arc<M>>,
    end: Arc<Mutex<Option<Status>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C, M> Default for Board<C, M> {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            posts: Mutex::new(Posts { last: 0, sender, receiver: Some(receiver) }),
            listeners: Arc::new(Mutex::new(Listeners { open: Vec::new(), closed: false })),
            count: AtomicUsize::new(0),
        }
    }
}

impl<C, M> fmt::Debug for Board<C, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").field("listeners", &self.count).finish_non_exhaustive()
    }
}

impl<C, M> Board<C, M> {
    /// Posts a change that was committed `now` (nanoseconds since 1970). `change` is made only if somebody listens, so
    /// nothing piles up and nothing is copied for nobody. Call it under the lock that ordered the commit; it does not
    /// block.
    pub fn post(&self, now: i64, change: impl FnOnce() -> C) {
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut posts = lock(&self.posts);
        let at = now.max(posts.last + 1);
        posts.last = at;
        // Nobody takes them only while hulld ends.
        let _ = posts.sender.send(Stamped { at, change: change() });
    }

    /// The changes, for the one task that makes messages of them; `None` if it has them already.
    pub fn changes(&self) -> Option<mpsc::UnboundedReceiver<Stamped<C>>> {
        lock(&self.posts).receiver.take()
    }

    /// Gives a message to every listener.
    pub fn publish(&self, message: M) {
        let message = Arc::new(message);
        let mut listeners = lock(&self.listeners);
        listeners.open.retain(|listener| match listener.sender.try_send(Arc::clone(&message)) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                let reason = format!(
                    "more than {BACKLOG} events waited for this client, which does not read them fast enough; list \
                     what there is and subscribe again"
                );
                *lock(&listener.end) = Some(Status::resource_exhausted(reason));
                false
            }
        });
        self.count.store(listeners.open.len(), Ordering::SeqCst);
    }

    /// Listens from now on.
    pub fn subscribe(&self) -> Result<Subscription<M>, Status> {
        let mut listeners = lock(&self.listeners);
        if listeners.closed {
            return Err(stopping());
        }
        // Those whose client went away are noticed at the next message only.
        listeners.open.retain(|listener| !listener.sender.is_closed());
        if listeners.open.len() >= MAX_LISTENERS {
            return Err(Status::resource_exhausted(format!(
                "{MAX_LISTENERS} clients listen to events already"
            )));
        }
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let end = Arc::new(Mutex::new(None));
        listeners.open.push(Listener { sender, end: Arc::clone(&end) });
        self.count.store(listeners.open.len(), Ordering::SeqCst);
        Ok(Subscription { receiver, end })
    }

    /// Lets all listeners go: hulld stops.
    pub fn close(&self) {
        let mut listeners = lock(&self.listeners);
        listeners.closed = true;
        for listener in listeners.open.drain(..) {
            *lock(&listener.end) = Some(stopping());
        }
        self.count.store(0, Ordering::SeqCst);
    }
}

fn stopping() -> Status {
    Status::unavailable("hulld stops; subscribe again when it is back")
}

/// What one listener gets: every message from its beginning on, and in the end the reason why there are no more.
#[derive(Debug)]
pub struct Subscription<M> {
    receiver: mpsc::Receiver<Arc<M>>,
    end: Arc<Mutex<Option<Status>>>,
}

impl<M: Clone> Stream for Subscription<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.receiver.poll_recv(context) {
            Poll::Ready(Some(message)) => Poll::Ready(Some(Ok(Arc::unwrap_or_clone(message)))),
            Poll::Ready(None) => Poll::Ready(lock(&self.end).take().map(Err)),
            Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tonic::Code;

    #[tokio::test]
    async fn every_listener_sees_all_from_its_beginning_on_in_order() {
        let board: Board<(), u32> = Board::default();
        let mut first = board.subscribe().unwrap();
        board.publish(1);
        let mut second = board.subscribe().unwrap();
        board.publish(2);
        board.close();
        assert_eq!(first.next().await.unwrap().unwrap(), 1);
        assert_eq!(first.next().await.unwrap().unwrap(), 2);
        assert_eq!(first.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert!(first.next().await.is_none());
        assert_eq!(second.next().await.unwrap().unwrap(), 2);
        assert_eq!(board.subscribe().unwrap_err().code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn a_listener_that_does_not_read_is_let_go_and_holds_up_nobody() {
        let board: Board<(), usize> = Board::default();
        let mut slow = board.subscribe().unwrap();
        let mut fast = board.subscribe().unwrap();
        for number in 0..=BACKLOG {
            board.publish(number);
            assert_eq!(fast.next().await.unwrap().unwrap(), number);
        }
        for number in 0..BACKLOG {
            assert_eq!(slow.next().await.unwrap().unwrap(), number, "what waited is still told");
        }
        assert_eq!(slow.next().await.unwrap().unwrap_err().code(), Code::ResourceExhausted);
        board.publish(7);
        assert_eq!(fast.next().await.unwrap().unwrap(), 7);
    }

    #[tokio::test]
    async fn times_grow_even_if_the_clock_does_not() {
        let board: Board<&str, ()> = Board::default();
        let mut changes = board.changes().unwrap();
        assert!(board.changes().is_none());
        board.post(10, || unreachable!("nobody listens"));
        let _listener = board.subscribe().unwrap();
        for (now, name) in [(10, "a"), (10, "b"), (5, "c"), (20, "d")] {
            board.post(now, || name);
        }
        let mut told = Vec::new();
        while let Ok(stamped) = changes.try_recv() {
            told.push((stamped.at, stamped.change));
        }
        assert_eq!(told, [(10, "a"), (11, "b"), (12, "c"), (20, "d")]);
    }

    #[test]
    fn clients_that_went_away_leave_room_for_others() {
        let board: Board<(), ()> = Board::default();
        let all: Vec<_> = (0..MAX_LISTENERS).map(|_| board.subscribe().unwrap()).collect();
        assert_eq!(board.subscribe().unwrap_err().code(), Code::ResourceExhausted);
        drop(all);
        board.subscribe().unwrap();
    }
}
