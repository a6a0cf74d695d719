//! How much is downloaded at the same time, over all pulls.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Parts of blobs that may be in memory at the same time because they were fetched before their turn. With the size of a
/// part this bounds what reading ahead costs.
const MAX_AHEAD: usize = 4;

/// The permits of one store. Each connection that receives a blob has one.
#[derive(Clone, Debug)]
pub(crate) struct Downloads {
    streams: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
}

/// What a part that is fetched before its turn needs.
pub(super) struct AheadPermit {
    /// Until it is received.
    pub(super) stream: OwnedSemaphorePermit,
    /// Until it is no longer in memory.
    pub(super) memory: OwnedSemaphorePermit,
}

impl Downloads {
    /// At most so many at a time, at least one.
    pub(crate) fn new(streams: usize) -> Self {
        let streams = streams.clamp(1, Semaphore::MAX_PERMITS);
        Self { streams: Arc::new(Semaphore::new(streams)), ahead: Arc::new(Semaphore::new(MAX_AHEAD)) }
    }

    /// Waits for a turn, in order. None only when the store is being torn down.
    pub(crate) async fn begin(&self) -> Option<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.ok()
    }

    /// A permit to read ahead, if nothing that has not begun is kept waiting by it.
    pub(super) fn try_ahead(&self) -> Option<AheadPermit> {
        let memory = self.ahead.clone().try_acquire_owned().ok()?;
        let stream = self.streams.clone().try_acquire_owned().ok()?;
        Some(AheadPermit { stream, memory })
    }
}
