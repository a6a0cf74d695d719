//! The pipeline around a conversion. Three threads share the work: this one converts, one decompresses, one hashes both
//! sides of the decompressor. They pass buffers of a fixed pool, which bounds memory and keeps them in step.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::compression::{Compression, MAGIC_LEN};
use super::convert::{Converted, Target, write};
use super::error::LayerError;
use super::id::LayerId;
use super::limits::Limits;
use crate::digest::{Algorithm, Digest, Hasher};

// Together 2 MiB for a layer: no thread waits for another's moment, and what one writes the next finds in the cache.
const BLOB_BUFFER: usize = 64 << 10;
const BLOB_BUFFERS: usize = 8;
const TAR_BUFFER: usize = 192 << 10;
const TAR_BUFFERS: usize = 8;

/// What the manifest and the image configuration say about a layer.
#[derive(Debug, Clone)]
pub struct BlobExpectation {
    /// Of the compressed bytes.
    pub digest: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// Of the uncompressed archive.
    pub diff_id: LayerId,
    /// The layer's media type, which decides how it is decompressed.
    pub media_type: String,
}

/// Reads a layer blob, checks its digest and size and the diffID of what is in it, and converts it as
/// [`convert`](super::convert) does.
///
/// Blocking; the blob is read on a thread of its own, at most 64 KiB beyond its expected size. The super block is written only
/// when everything has been verified, so a file left by an error cannot be mounted. Where damage on the way can have
/// caused an error, the rest of the blob is read first and a wrong digest or size is reported instead.
pub fn ingest<'f>(
    blob: impl Read + Send,
    expected: &BlobExpectation,
    out: impl Into<Target<'f>>,
    limits: &Limits,
) -> Result<Converted, LayerError> {
    let out = out.into();
    let compression = Compression::from_media_type(&expected.media_type)?;
    let verify_rest = AtomicBool::new(false);
    thread::scope(|scope| {
        let (to_convert, tar) = mpsc::channel();
        let (to_hash, pieces) = mpsc::channel();
        let producer = Producer { compression, expected, limits, to_convert, verify_rest: &verify_rest };
        let hashing = spawn(scope, "layer-hash", move || hash(&pieces, expected, compression))?;
        let producing = spawn(scope, "layer-decompress", move || producer.run(blob, to_hash))?;

        let mut reader = TarStream { chunks: tar, current: None, position: 0, is_complete: false };
        let written = write(&mut reader, out, limits);
        verify_rest.store(written.as_ref().is_err_and(LayerError::may_be_damage), Ordering::Release);
        drop(reader);
        let produced = join(producing);
        let hashes = join(hashing);
        let written = verdict(written, produced, &hashes, expected)?;
        written.seal(hashes.diff_id)
    })
}

// The most telling of what the three threads found.
fn verdict<T>(
    written: Result<T, LayerError>,
    produced: Result<Produced, LayerError>,
    hashes: &Hashes,
    expected: &BlobExpectation,
) -> Result<T, LayerError> {
    let blob_is_whole = match &produced {
        Ok(Produced { is_whole }) => *is_whole,
        // Damage: the rest was read so that the digest can tell.
        Err(error) => error.may_be_damage(),
    };
    if blob_is_whole && hashes.blob != expected.digest {
        return Err(LayerError::DigestMismatch {
            expected: expected.digest.to_string(),
            actual: hashes.blob.to_string(),
        });
    }
    produced?;
    let written = written?;
    if hashes.diff_id != expected.diff_id {
        return Err(LayerError::DiffIdMismatch {
            expected: expected.diff_id.to_string(),
            actual: hashes.diff_id.to_string(),
        });
    }
    Ok(written)
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> Result<thread::ScopedJoinHandle<'scope, T>, LayerError> {
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, run).map_err(LayerError::ReadBlob)
}

fn join<T>(handle: thread::ScopedJoinHandle<'_, T>) -> T {
    handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

// A buffer of a pool, which goes back when its last user drops it.
struct Chunk {
    bytes: Vec<u8>,
    length: usize,
    home: Sender<Vec<u8>>,
}

impl Chunk {
    fn content(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // Fails only when the producer has ended and wants it no more.
        let _ = self.home.send(std::mem::take(&mut self.bytes));
    }
}

struct Pool {
    free: Receiver<Vec<u8>>,
    home: Sender<Vec<u8>>,
}

impl Pool {
    fn new(buffers: usize, size: usize) -> Self {
        let (home, free) = mpsc::channel();
        for _ in 0..buffers {
            let _ = home.send(vec![0; size]);
        }
        Self { free, home }
    }

    // Waits for a free buffer. It cannot wait for ever: each is dropped by its users, whatever becomes of them.
    fn take(&self) -> Chunk {
        let bytes = self.free.recv().unwrap_or_default();
        Chunk { bytes, length: 0, home: self.home.clone() }
    }
}

// What the hashing thread gets.
enum Piece {
    Blob(Arc<Chunk>),
    Tar(Arc<Chunk>),
}

struct Hashes {
    blob: Digest,
    diff_id: LayerId,
}

fn hash(pieces: &Receiver<Piece>, expected: &BlobExpectation, compression: Compression) -> Hashes {
    let mut blob = Hasher::new(expected.digest.algorithm());
    let mut tar = Sha256::new();
    // Without compression both are the same bytes: one hash is enough when it is of the right kind.
    let is_same = compression == Compression::None && expected.digest.algorithm() == Algorithm::Sha256;
    while let Ok(piece) = pieces.recv() {
        match piece {
            Piece::Blob(chunk) => blob.update(chunk.content()),
            Piece::Tar(_) if is_same => {}
            Piece::Tar(chunk) => tar.update(chunk.content()),
        }
    }
    let blob = blob.finish();
    let same = is_same.then(|| blob.to_string().parse().ok()).flatten();
    Hashes { diff_id: same.unwrap_or_else(|| LayerId::of(tar)), blob }
}

// What the converting thread gets; the channel closing without an end means failure.
enum Tar {
    Chunk(Arc<Chunk>),
    End,
}

struct Produced {
    // Whether all of the blob has been read, and so its digest is known.
    is_whole: bool,
}

struct Producer<'e> {
    compression: Compression,
    expected: &'e BlobExpectation,
    limits: &'e Limits,
    to_convert: Sender<Tar>,
    verify_rest: &'e AtomicBool,
}

impl Producer<'_> {
    fn run(self, blob: impl Read, to_hash: Sender<Piece>) -> Result<Produced, LayerError> {
        let mut blob = Blob {
            inner: blob,
            pool: Pool::new(BLOB_BUFFERS, BLOB_BUFFER),
            to_hash: to_hash.clone(),
            current: None,
            position: 0,
            size: self.expected.size,
            read: 0,
            failure: None,
        };
        let result = self.decompress(&mut blob, to_hash);
        // What made the blob unreadable is the cause of whatever the decompressor made of it.
        if let Some(failure) = blob.failure.take() {
            return Err(failure);
        }
        let read_on = match &result {
            Ok(true) => true,
            // The converter gave up and says whether the digest matters.
            Ok(false) => self.verify_rest.load(Ordering::Acquire),
            Err(error) => error.may_be_damage(),
        };
        if read_on {
            blob.drain()?;
        }
        result.map(|_| Produced { is_whole: read_on })
    }

    // True when the stream came to its end, false when nobody wants it any more.
    fn decompress<R: Read>(&self, blob: &mut Blob<R>, to_hash: Sender<Piece>) -> Result<bool, LayerError> {
        let failed = |source| LayerError::Decompress { compression: self.compression, source };
        let start = blob.fill_buf().map_err(failed)?;
        self.compression.check(&start[..start.len().min(MAGIC_LEN)], &self.expected.media_type)?;
        match self.compression {
            Compression::None => self.pump(blob, to_hash),
            Compression::Gzip => self.pump(&mut MultiGzDecoder::new(blob), to_hash),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(blob).map_err(failed)?;
                decoder.window_log_max(self.limits.max_zstd_window_log).map_err(failed)?;
                self.pump(&mut decoder, to_hash)
            }
        }
    }

    fn pump(&self, tar: &mut impl Read, to_hash: Sender<Piece>) -> Result<bool, LayerError> {
        let pool = Pool::new(TAR_BUFFERS, TAR_BUFFER);
        let mut total = 0_u64;
        loop {
            let mut chunk = pool.take();
            let failure = fill(tar, &mut chunk).err();
            let length = chunk.length;
            total += length as u64;
            if total > self.limits.max_uncompressed {
                let limit = self.limits.max_uncompressed;
                return Err(LayerError::Limit { what: "uncompressed bytes", limit });
            }
            let chunk = Arc::new(chunk);
            let _ = to_hash.send(Piece::Tar(Arc::clone(&chunk)));
            if self.to_convert.send(Tar::Chunk(chunk)).is_err() {
                return Ok(false);
            }
            if let Some(source) = failure {
                return Err(LayerError::Decompress { compression: self.compression, source });
            }
            if length < TAR_BUFFER {
                let _ = self.to_convert.send(Tar::End);
                return Ok(true);
            }
        }
    }
}

// Until the buffer is full or the stream ends; what came before an error counts.
fn fill(input: &mut impl Read, chunk: &mut Chunk) -> io::Result<()> {
    while chunk.length < chunk.bytes.len() {
        match input.read(&mut chunk.bytes[chunk.length..]) {
            Ok(0) => break,
            Ok(length) => chunk.length += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

// The compressed bytes: sent to be hashed as they are read, counted against the expected size.
struct Blob<R> {
    inner: R,
    pool: Pool,
    to_hash: Sender<Piece>,
    current: Option<Arc<Chunk>>,
    position: usize,
    size: u64,
    read: u64,
    /// Kept here because a decompressor would only pass on its text.
    failure: Option<LayerError>,
}

impl<R: Read> Blob<R> {
    // Reads to the end and checks the size.
    fn drain(&mut self) -> Result<(), LayerError> {
        loop {
            let result = self.fill_buf().map(<[u8]>::len);
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            match result {
                Ok(0) => return Ok(()),
                Ok(length) => self.consume(length),
                Err(error) => return Err(LayerError::ReadBlob(error)),
            }
        }
    }

    fn next_chunk(&mut self) -> Result<Arc<Chunk>, LayerError> {
        let mut chunk = self.pool.take();
        fill(&mut self.inner, &mut chunk).map_err(LayerError::ReadBlob)?;
        self.read += chunk.length as u64;
        if self.read > self.size {
            return Err(LayerError::BlobTooLong { expected: self.size });
        }
        if chunk.length < BLOB_BUFFER && self.read < self.size {
            return Err(LayerError::BlobTooShort { expected: self.size, actual: self.read });
        }
        let chunk = Arc::new(chunk);
        let _ = self.to_hash.send(Piece::Blob(Arc::clone(&chunk)));
        Ok(chunk)
    }
}

impl<R: Read> BufRead for Blob<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let is_empty = self.current.as_ref().is_none_or(|chunk| self.position == chunk.length);
        let at_end = self.current.as_ref().is_some_and(|chunk| chunk.length == 0);
        if is_empty && !at_end {
            // Back to the pool before the next one is taken.
            self.current = None;
            self.position = 0;
            match self.next_chunk() {
                Ok(chunk) => self.current = Some(chunk),
                Err(failure) => {
                    self.failure = Some(failure);
                    return Err(io::Error::other("the blob could not be read"));
                }
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.content()[self.position..]))
    }

    fn consume(&mut self, length: usize) {
        self.position += length;
    }
}

impl<R: Read> Read for Blob<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

// The uncompressed archive as the converter reads it, without copying.
struct TarStream {
    chunks: Receiver<Tar>,
    current: Option<Arc<Chunk>>,
    position: usize,
    is_complete: bool,
}

impl BufRead for TarStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while !self.is_complete && self.current.as_ref().is_none_or(|chunk| self.position == chunk.length) {
            self.current = None;
            self.position = 0;
            match self.chunks.recv() {
                Ok(Tar::Chunk(chunk)) => self.current = Some(chunk),
                Ok(Tar::End) => self.is_complete = true,
                Err(_) => return Err(io::Error::other("the decompressor failed")),
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.content()[self.position..]))
    }

    fn consume(&mut self, length: usize) {
        self.position += length;
    }
}

impl Read for TarStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}
