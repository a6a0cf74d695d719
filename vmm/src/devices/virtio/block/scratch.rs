use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;

use super::counters::BlockStats;
use super::device::{BlockDevice, Kept};
use super::faults::OnFault;
use super::guest_buffers::{GuestBuffers, Patience};
use super::protocol::{SECTOR, Traits};
use super::ranges::{RangeError, WritableRanges};
use super::raw_file::RawFile;
use super::request::Range;
use super::service::Service;
use super::storage::Storage;
use super::threads::BlockThreads;

const TRAITS: Traits = Traits {
    queue_size: 128,
    block_size: 4096,
    read_only: false,
    // The disk dies with its pod, so no write of it ever needs the host's disk: a completed write lasts as long as the
    // disk does. A driver that knows this sends no FLUSH at all, which makes every fsync in a container cheaper; one that
    // comes nevertheless is answered at once.
    flush: false,
    discard: Some(4096),
};

/// The scratch disk could not be made.
#[derive(Debug, Error)]
pub enum ScratchError {
    /// The file may not be the disk.
    #[error("scratch disk: its file cannot be used: {0}")]
    File(String),
    /// The capacity makes no sense.
    #[error("scratch disk: a capacity of {0} bytes: it must be a multiple of 4096, not 0, at most 8 EiB")]
    Capacity(u64),
    /// The file could not be made as long as the disk.
    #[error("scratch disk: make its file {capacity} bytes long: {source}")]
    Resize {
        /// Bytes.
        capacity: u64,
        /// Why.
        source: io::Error,
    },
}

/// The scratch disk: `capacity` bytes in a sparse `file`, which is made that long. What the guest writes takes space of the
/// host's file system, what it discards or makes zeros gives it back. It can write where [`ScratchHandle::open`] says so
/// and nowhere else: so the ranges are the most of the host's disk that a guest can take. A full host file system is an I/O error for the guest, a count in
/// the stats and a fault for the operator.
///
/// # Errors
/// See [`ScratchError`].
pub fn scratch(
    file: File,
    capacity: u64,
    threads: &BlockThreads,
    on_fault: OnFault,
) -> Result<(BlockDevice, ScratchHandle), ScratchError> {
    if capacity == 0 || !capacity.is_multiple_of(4096) || i64::try_from(capacity).is_err() {
        return Err(ScratchError::Capacity(capacity));
    }
    let stat = rustix::fs::fstat(file.as_fd()).map_err(|e| ScratchError::File(format!("stat: {e}")))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(ScratchError::File("it is not a regular file".to_owned()));
    }
    if u64::try_from(stat.st_size) != Ok(capacity) {
        file.set_len(capacity).map_err(|source| ScratchError::Resize { capacity, source })?;
    }
    let file = RawFile::new(file, false).map_err(ScratchError::File)?;
    let disk = Arc::new(Scratch { file, ranges: WritableRanges::default() });
    let device = BlockDevice::new("scratch", TRAITS, &disk, threads, on_fault);
    let service = device.service().clone();
    Ok((device, ScratchHandle { disk, service }))
}

/// Tells of the scratch disk. Cheap to clone; any thread.
#[derive(Clone)]
pub struct ScratchHandle {
    disk: Arc<Scratch>,
    service: Arc<Service>,
}

impl ScratchHandle {
    /// The guest may write to these bytes from now on. A range that is open already stays open.
    ///
    /// # Errors
    /// See [`RangeError`].
    pub fn open(&self, offset: u64, length: u64) -> Result<(), RangeError> {
        self.disk.ranges.open(offset, length, self.disk.file.size())
    }

    /// The guest may not write to the range that begins here any more; waits up to 5 s for writes that are under way.
    /// Harmless if there is none.
    ///
    /// # Errors
    /// [`RangeError::StillWritten`]: no write begins any more, but one may still end.
    pub fn close(&self, offset: u64) -> Result<(), RangeError> {
        self.disk.ranges.close(offset)
    }

    /// Bytes of the host's disk that the scratch disk takes now: the pod's ephemeral storage.
    ///
    /// # Errors
    /// `fstat` failed.
    pub fn allocated(&self) -> io::Result<u64> {
        self.disk.file.allocated()
    }

    /// What the device has done.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        self.service.counters().read()
    }
}

struct Scratch {
    file: RawFile,
    ranges: WritableRanges,
}

impl Storage for Scratch {
    fn capacity(&self) -> u64 {
        self.file.size() / SECTOR * SECTOR
    }

    fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        self.file.read(at, into, patience)
    }

    fn write(&self, at: u64, from: &mut GuestBuffers) -> io::Result<()> {
        let _leases = self.ranges.lease(at, from.done() + from.remaining())?;
        self.file.write(at, from)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, range: &Range) -> io::Result<()> {
        let _leases = self.ranges.lease(range.at, range.length)?;
        self.file.discard(range)
    }

    /// Always without space: zeros that keep theirs would take all of the host's disk with a few requests.
    fn write_zeroes(&self, range: &Range) -> io::Result<()> {
        let _leases = self.ranges.lease(range.at, range.length)?;
        self.file.punch(range)
    }
}

impl Kept for Scratch {
    fn keep(&self) -> Value {
        serde_json::json!({ "capacity": self.file.size(), "ranges": self.ranges.all() })
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        let capacity = kept.get("capacity").and_then(Value::as_u64);
        if capacity != Some(self.file.size()) {
            return Err(format!("a capacity of {capacity:?}, and the file has {}", self.file.size()));
        }
        let ranges = kept.get("ranges").cloned().unwrap_or(Value::Array(Vec::new()));
        let ranges: Vec<(u64, u64)> = serde_json::from_value(ranges).map_err(|e| format!("ranges: {e}"))?;
        ranges.iter().try_for_each(|(offset, length)| {
            self.ranges.open(*offset, *length, self.file.size()).map_err(|e| e.to_string())
        })
    }
}
