//! One layer of a pull: found on the node, shared with another pull, or downloaded and converted.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::layer::{BlobExpectation, LayerError, LayerId};
use crate::registry::{Blob, Descriptor, Registry, RegistryDownloads, RegistryError};

use super::ImageStore;
use super::error::StoreError;
use super::progress::{Board, PullProgress};
use super::staged::{StageError, Staged};

/// Chunks between download and conversion.
const CHUNKS_AHEAD: usize = 16;
/// Bytes in these, if it is more than one. A chunk is what one read of the connection gave: some 400 KiB where the
/// registry is near.
const BYTES_AHEAD: usize = 1 << 20;
/// Least time between two progress events of one layer.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How often to start over when another pull's attempt at the same layer, which was joined, failed.
const MAX_JOINS: u32 = 3;

/// The result of a conversion, shared by all pulls that wait for it.
pub(super) type Outcome = Result<Arc<Staged>, LayerFailure>;

/// Why a layer is not there.
#[derive(Clone)]
pub(super) enum LayerFailure {
    Download(RegistryError),
    Content(Arc<LayerError>),
    Store(StoreError),
    Cancelled,
}

impl ImageStore {
    /// Sees to it that the layer is on the node: None if it is committed already, else the staged file. The caller
    /// holds the layer.
    pub(super) async fn obtain_layer(
        self: &Arc<Self>,
        registry: &Registry,
        descriptor: &Descriptor,
        layer: &LayerId,
        board: &Board,
    ) -> Result<Option<Arc<Staged>>, LayerFailure> {
        let mut joins = 0;
        loop {
            if self.read().layers.contains_key(layer) {
                board.tell(PullProgress::LayerExists { layer: descriptor.digest.clone() });
                return Ok(None);
            }
            if let Some(staged) = self.staged.get(layer) {
                board.tell(PullProgress::LayerDone { layer: descriptor.digest.clone() });
                return Ok(Some(staged));
            }
            let (flight, started) = self.conversions.join(layer, || {
                let (bytes, progress) = watch::channel(0);
                let arriving = Arriving { bytes, downloads: self.downloads.of(registry.domain()) };
                let blob = registry.blob(descriptor);
                (progress, self.clone().convert(blob, descriptor.clone(), layer.clone(), arriving))
            });
            let progress = flight.progress().clone();
            let outcome = tokio::select! {
                outcome = flight.result() => outcome,
                never = relay(progress, descriptor, board) => never,
            };
            match outcome.unwrap_or(Err(LayerFailure::Cancelled)) {
                Ok(staged) => {
                    board.tell(PullProgress::LayerDone { layer: descriptor.digest.clone() });
                    return Ok(Some(staged));
                }
                // The other pull may have used another registry or other credentials: try with our own.
                Err(_) if !started && joins < MAX_JOINS => joins += 1,
                Err(failure) => return Err(failure),
            }
        }
    }

    /// The layer from the first host that sends it as its digest promises. Its downloads wait for their turn.
    async fn convert(
        self: Arc<Self>,
        mut blob: Blob,
        descriptor: Descriptor,
        layer: LayerId,
        arriving: Arriving,
    ) -> Outcome {
        let _turn = arriving.downloads.begin().await.ok_or(LayerFailure::Cancelled)?;
        loop {
            let failure = match self.attempt(&mut blob, &descriptor, &layer, &arriving).await {
                Ok(staged) => {
                    self.staged.insert(&staged);
                    return Ok(staged);
                }
                Err(failure) => failure,
            };
            blob = match blob.elsewhere() {
                Some(other) if failure.is_by_host() => other,
                _ => return Err(failure),
            };
            tracing::warn!(layer = %descriptor.digest, error = %failure, "a mirror sent a wrong layer");
        }
    }

    /// Downloads and converts at the same time: this task reads the network, a blocking thread does the rest.
    async fn attempt(
        self: &Arc<Self>,
        blob: &mut Blob,
        descriptor: &Descriptor,
        layer: &LayerId,
        arriving: &Arriving,
    ) -> Outcome {
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        let expectation = BlobExpectation {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            diff_id: layer.clone(),
            media_type: descriptor.media_type.clone(),
        };
        let store = self.clone();
        let conversion = tokio::task::spawn_blocking(move || {
            let reader = ChunkReader { chunks, current: Bytes::new(), room: None, ended: false };
            store.stage_and_keep(reader, &expectation)
        });
        let download = arriving.receive(blob, sender).await;
        match (conversion.await.map_err(|_| LayerFailure::Cancelled)?, download) {
            (Ok(staged), _) => Ok(staged),
            (Err(StageError::Content(LayerError::ReadBlob(_))), Err(download)) => {
                Err(LayerFailure::Download(download))
            }
            (Err(StageError::Content(error)), _) => Err(LayerFailure::Content(Arc::new(error))),
            (Err(StageError::Store(error)), _) => Err(LayerFailure::Store(error)),
        }
    }
}

/// A download that is under way.
struct Arriving {
    /// Told how many came.
    bytes: watch::Sender<u64>,
    downloads: RegistryDownloads,
}

impl Arriving {
    async fn receive(&self, blob: &mut Blob, sender: mpsc::Sender<Chunk>) -> Result<(), RegistryError> {
        let mut received = 0;
        let mut waits = Waits::default();
        let ahead = Arc::new(Semaphore::new(BYTES_AHEAD));
        loop {
            let asked = Instant::now();
            let Some(chunk) = blob.chunk().await? else {
                let _ = sender.send(Chunk::End).await;
                return Ok(());
            };
            let (arrived, length) = (Instant::now(), chunk.len() as u64);
            received += length;
            self.bytes.send_replace(received);
            let share = chunk.len().min(BYTES_AHEAD) as u32;
            let room = tokio::select! {
                room = ahead.clone().acquire_many_owned(share) => room,
                () = sender.closed() => return Ok(()),
            };
            let sent = match room {
                Ok(room) => sender.send(Chunk::Bytes(chunk, room)).await.is_ok(),
                Err(_) => false,
            };
            if !sent {
                // The conversion has ended: with its own error, or content beyond what it wanted.
                return Ok(());
            }
            waits.add(length, arrived - asked, arrived.elapsed());
            if waits.are_for_the_network() {
                blob.hurry(&self.downloads);
            }
        }
    }
}

/// What a download has waited for of late.
#[derive(Default)]
struct Waits {
    bytes: u64,
    network: Duration,
    conversion: Duration,
}

impl Waits {
    /// Bytes after which what was before counts half.
    const SPAN: u64 = 4 << 20;

    fn add(&mut self, bytes: u64, network: Duration, conversion: Duration) {
        self.bytes += bytes;
        self.network += network;
        self.conversion += conversion;
        if self.bytes > 2 * Self::SPAN {
            self.bytes /= 2;
            self.network /= 2;
            self.conversion /= 2;
        }
    }

    /// Whether it is clearly the network, after enough bytes to tell.
    fn are_for_the_network(&self) -> bool {
        self.bytes >= Self::SPAN / 4 && self.network > 2 * self.conversion
    }
}

impl LayerFailure {
    /// Whether another host may have the right bytes: what came is not what the digest promises.
    fn is_by_host(&self) -> bool {
        match self {
            LayerFailure::Download(error) => matches!(error, RegistryError::TooLarge { .. }),
            LayerFailure::Content(error) => matches!(
                **error,
                LayerError::DigestMismatch { .. }
                    | LayerError::BlobTooLong { .. }
                    | LayerError::BlobTooShort { .. }
                    // Found before the digest could tell.
                    | LayerError::CompressionMismatch { .. }
                    | LayerError::Limit { .. }
            ),
            LayerFailure::Store(_) | LayerFailure::Cancelled => false,
        }
    }
}

impl std::fmt::Display for LayerFailure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LayerFailure::Download(error) => error.fmt(formatter),
            LayerFailure::Content(error) => error.fmt(formatter),
            LayerFailure::Store(error) => error.fmt(formatter),
            LayerFailure::Cancelled => formatter.write_str("cancelled"),
        }
    }
}

/// Tells the board of arriving bytes until it is dropped.
async fn relay<T>(mut progress: watch::Receiver<u64>, descriptor: &Descriptor, board: &Board) -> T {
    loop {
        if progress.changed().await.is_err() {
            // The download is over; the result comes another way.
            std::future::pending::<()>().await;
        }
        let bytes = *progress.borrow_and_update();
        board.tell(PullProgress::Downloaded { layer: descriptor.digest.clone(), bytes });
        tokio::time::sleep_until(Instant::now() + PROGRESS_INTERVAL).await;
    }
}

enum Chunk {
    /// With its share of [`BYTES_AHEAD`].
    Bytes(Bytes, OwnedSemaphorePermit),
    /// The blob is complete, as far as the network can tell.
    End,
}

/// The network's chunks as a blocking reader. A channel that closes without an end is a failed or cancelled download.
struct ChunkReader {
    chunks: mpsc::Receiver<Chunk>,
    current: Bytes,
    /// What the current bytes take of the room ahead, for as long as they are here.
    room: Option<OwnedSemaphorePermit>,
    ended: bool,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            // Not kept while waiting.
            (self.current, self.room) = (Bytes::new(), None);
            match self.chunks.blocking_recv() {
                Some(Chunk::Bytes(bytes, room)) => (self.current, self.room) = (bytes, Some(room)),
                Some(Chunk::End) => self.ended = true,
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::ConnectionAborted,
                        "the download was given up",
                    ));
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
