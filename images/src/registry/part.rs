//! Parts of a blob that are fetched before their turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::downloads::AheadPermit;
use super::error::RegistryError;
use super::span::Span;

/// Pieces smaller than this are put together: each costs memory of its own.
const MIN_PIECE: usize = 32 << 10;

/// A part and what has come of it. Dropped, it is no longer fetched.
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) end: u64,
    /// The host that was asked first.
    pub(super) host: usize,
    /// Not bounded: all pieces together are no more than the part, whose size is.
    pieces: mpsc::UnboundedReceiver<Result<Bytes, RegistryError>>,
    is_open: Arc<AtomicBool>,
    task: JoinHandle<()>,
    _memory: OwnedSemaphorePermit,
}

/// What is known of a part whose host may not serve ranges.
pub(super) enum PartState {
    /// Nothing yet.
    Asked,
    /// It comes.
    Open,
    /// It does not.
    Failed,
}

impl Part {
    /// Begins to fetch `span`, which is from `start` to `end`.
    pub(super) fn fetch(mut span: Span, start: u64, end: u64, permit: AheadPermit) -> Self {
        let (sender, pieces) = mpsc::unbounded_channel();
        let is_open = Arc::new(AtomicBool::new(false));
        let opened = is_open.clone();
        let AheadPermit { stream, memory } = permit;
        let host = span.host();
        let task = tokio::spawn(async move {
            if let Err(error) = receive(&mut span, &sender, &opened).await {
                let _ = sender.send(Err(error));
            }
            drop(stream);
        });
        Self { start, end, host, pieces, is_open, task, _memory: memory }
    }

    pub(super) fn state(&self) -> PartState {
        // In this order: a task that ends has opened before if it ever did.
        let is_finished = self.task.is_finished();
        match self.is_open.load(Ordering::Acquire) {
            true => PartState::Open,
            false if is_finished => PartState::Failed,
            false => PartState::Asked,
        }
    }

    /// The next bytes; None when there are no more, whether all came or not.
    pub(super) async fn piece(&mut self) -> Result<Option<Bytes>, RegistryError> {
        self.pieces.recv().await.transpose()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn receive(
    span: &mut Span,
    sender: &mpsc::UnboundedSender<Result<Bytes, RegistryError>>,
    opened: &AtomicBool,
) -> Result<(), RegistryError> {
    span.connect().await?;
    opened.store(true, Ordering::Release);
    let mut small = BytesMut::new();
    while let Some(chunk) = span.chunk().await? {
        if small.is_empty() && chunk.len() >= MIN_PIECE {
            let _ = sender.send(Ok(chunk));
            continue;
        }
        small.extend_from_slice(&chunk);
        if small.len() >= MIN_PIECE {
            let _ = sender.send(Ok(std::mem::take(&mut small).freeze()));
        }
    }
    if !small.is_empty() {
        let _ = sender.send(Ok(small.freeze()));
    }
    Ok(())
}
