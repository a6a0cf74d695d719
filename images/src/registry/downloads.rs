//! How much is downloaded at the same time, over all pulls.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Parts of blobs that may be in memory at the same time because they were fetched before their turn. With the size of a
/// part this bounds what reading ahead costs.
const MAX_AHEAD: usize = 4;
/// One stream in so many is left for registries from which nothing is received yet.
const RESERVED: usize = 4;

/// The streams of one store. Each connection that receives a blob is one.
#[derive(Clone, Debug)]
pub(crate) struct Downloads {
    streams: Arc<Mutex<Streams>>,
    ahead: Arc<Semaphore>,
}

/// The same for what comes from one registry.
#[derive(Clone, Debug)]
pub(crate) struct RegistryDownloads {
    all: Downloads,
    registry: Arc<str>,
}

/// What a part that is fetched before its turn needs.
pub(super) struct AheadPermit {
    /// Until it is received.
    pub(super) stream: Stream,
    /// Until it is no longer in memory.
    pub(super) memory: OwnedSemaphorePermit,
}

/// The right to receive over one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Stream {
    streams: Arc<Mutex<Streams>>,
    registry: Arc<str>,
}

/// Who receives and who waits. Nobody waits who could begin.
#[derive(Debug)]
struct Streams {
    free: usize,
    /// Of those that are free, so many are for registries that have none.
    reserve: usize,
    used: HashMap<Arc<str>, usize>,
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    registry: Arc<str>,
    turn: oneshot::Sender<Stream>,
}

impl Downloads {
    /// At most so many at a time, at least one. A registry that has a stream leaves a quarter of them to others, so that one
    /// that is slow does not keep all others waiting.
    pub(crate) fn new(streams: usize) -> Self {
        let free = streams.max(1);
        let reserve = free / RESERVED;
        let streams = Streams { free, reserve, used: HashMap::new(), waiting: VecDeque::new() };
        Self { streams: Arc::new(Mutex::new(streams)), ahead: Arc::new(Semaphore::new(MAX_AHEAD)) }
    }

    /// For what comes from this registry.
    pub(crate) fn of(&self, registry: &str) -> RegistryDownloads {
        RegistryDownloads { all: self.clone(), registry: registry.into() }
    }
}

impl RegistryDownloads {
    /// Waits for a turn, in order. None only when the store is being torn down.
    pub(crate) async fn begin(&self) -> Option<Stream> {
        let turn = {
            let mut streams = lock(&self.all.streams);
            if streams.may_begin(&self.registry) {
                return Some(self.take(&mut streams));
            }
            let (turn, receiver) = oneshot::channel();
            streams.waiting.retain(|waiting| !waiting.turn.is_closed());
            streams.waiting.push_back(Waiting { registry: self.registry.clone(), turn });
            receiver
        };
        turn.await.ok()
    }

    /// A permit to read ahead, if nothing that has not begun is kept waiting by it.
    pub(super) fn try_ahead(&self) -> Option<AheadPermit> {
        let memory = self.all.ahead.clone().try_acquire_owned().ok()?;
        let mut streams = lock(&self.all.streams);
        // Then nobody waits.
        let is_left = streams.free > streams.reserve;
        is_left.then(|| AheadPermit { stream: self.take(&mut streams), memory })
    }

    fn take(&self, streams: &mut Streams) -> Stream {
        streams.count(&self.registry);
        Stream { streams: self.all.streams.clone(), registry: self.registry.clone() }
    }
}

impl Streams {
    fn may_begin(&self, registry: &Arc<str>) -> bool {
        self.free > self.reserve || (self.free > 0 && !self.used.contains_key(registry))
    }

    fn count(&mut self, registry: &Arc<str>) {
        self.free -= 1;
        *self.used.entry(registry.clone()).or_default() += 1;
    }

    fn discount(&mut self, registry: &Arc<str>) {
        self.free += 1;
        if let Some(used) = self.used.get_mut(registry) {
            *used -= 1;
            if *used == 0 {
                self.used.remove(registry);
            }
        }
    }

    /// The first that may begin now, counted.
    fn next(&mut self) -> Option<Waiting> {
        let position = self.waiting.iter().position(|waiting| self.may_begin(&waiting.registry))?;
        let waiting = self.waiting.remove(position)?;
        self.count(&waiting.registry);
        Some(waiting)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        lock(&self.streams).discount(&self.registry);
        loop {
            let Some(Waiting { registry, turn }) = lock(&self.streams).next() else { return };
            // To one that has given up waiting meanwhile it is not sent: dropped, it goes to the next.
            let _ = turn.send(Stream { streams: self.streams.clone(), registry });
        }
    }
}

fn lock(streams: &Mutex<Streams>) -> MutexGuard<'_, Streams> {
    streams.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// What a future that nobody wakes has to say now.
    fn now<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    fn begun(downloads: &RegistryDownloads) -> Option<Stream> {
        now(pin!(downloads.begin())).flatten()
    }

    #[test]
    fn a_registry_that_is_slow_leaves_some_to_others() {
        let downloads = Downloads::new(8);
        let (slow, one, two) = (downloads.of("slow"), downloads.of("one"), downloads.of("two"));
        let taken: Vec<Stream> = (0..6).map_while(|_| begun(&slow)).collect();
        assert_eq!(taken.len(), 6);
        assert!(begun(&slow).is_none(), "two of eight are for others");
        let (first, second) = (begun(&one).expect("one has none"), begun(&two).expect("two has none"));
        assert!(begun(&downloads.of("three")).is_none(), "there are eight");
        assert!(begun(&one).is_none());
        drop((first, second));
        assert!(begun(&slow).is_none(), "what others give back is for others");
        drop(taken);
        assert_eq!((0..9).map_while(|_| begun(&one)).collect::<Vec<_>>().len(), 6);
        assert!(lock(&downloads.streams).used.is_empty());
    }

    #[test]
    fn turns_come_in_order_and_nobody_waits_who_could_begin() {
        let downloads = Downloads::new(1);
        let (one, two) = (downloads.of("one"), downloads.of("two"));
        let held = begun(&one).unwrap();
        let (mut first, mut second) = (pin!(two.begin()), pin!(one.begin()));
        assert!(now(first.as_mut()).is_none() && now(second.as_mut()).is_none());
        drop(held);
        assert!(now(second.as_mut()).is_none(), "it came later");
        let held = now(first).flatten().expect("its turn");
        drop(held);
        assert!(now(second).flatten().is_some());
        // One whose registry has enough does not keep the next one waiting.
        let downloads = Downloads::new(4);
        let (slow, other) = (downloads.of("slow"), downloads.of("other"));
        let taken: Vec<Stream> = (0..3).map_while(|_| begun(&slow)).collect();
        let mut waiting = pin!(slow.begin());
        assert!(now(waiting.as_mut()).is_none() && taken.len() == 3);
        assert!(begun(&other).is_some());
        assert!(now(waiting.as_mut()).is_none());
        drop(taken);
        assert!(now(waiting).flatten().is_some());
    }

    #[test]
    fn who_gives_up_waiting_costs_nobody_a_turn() {
        let downloads = Downloads::new(1);
        let one = downloads.of("one");
        let held = begun(&one).unwrap();
        let mut last = pin!(one.begin());
        {
            // Before its turn and, with the turn already sent, after it.
            let (mut before, mut after) = (Box::pin(one.begin()), Box::pin(one.begin()));
            assert!(now(before.as_mut()).is_none() && now(after.as_mut()).is_none());
            assert!(now(last.as_mut()).is_none());
            drop(before);
            drop(held);
        }
        assert!(now(last).flatten().is_some());
        assert!(begun(&one).is_some());
    }

    #[test]
    fn reading_ahead_takes_what_is_left_only() {
        let downloads = Downloads::new(4);
        let one = downloads.of("one");
        let first = begun(&one).unwrap();
        let ahead: Vec<AheadPermit> = (0..5).map_while(|_| one.try_ahead()).collect();
        assert_eq!(ahead.len(), 2, "one of four is for others");
        assert!(downloads.of("other").try_ahead().is_none(), "that is to begin with");
        assert!(begun(&downloads.of("other")).is_some());
        drop((first, ahead));
        let many = Downloads::new(64).of("one");
        assert_eq!((0..64).map_while(|_| many.try_ahead()).collect::<Vec<_>>().len(), MAX_AHEAD);
    }
}
