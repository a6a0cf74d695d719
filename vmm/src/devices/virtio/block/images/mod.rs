/// Where which file is on the disk.
mod table;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

pub use table::{Extent, ImagesError};
use table::{Place, Table};

use super::counters::BlockStats;
use super::device::{BlockDevice, Kept};
use super::faults::OnFault;
use super::guest_buffers::{GuestBuffers, Patience};
use super::protocol::Traits;
use super::request::Range;
use super::service::Service;
use super::storage::{Storage, read_only};
use super::threads::BlockThreads;

/// Bytes of the images disk: room for two million layers of at most 8 MiB, or one of 16 TiB.
pub const IMAGES_CAPACITY: u64 = 16 << 40;

/// Block size of the images disk, and of EROFS as hull writes it.
pub const IMAGES_BLOCK: u64 = 4096;

/// How long [`ImagesHandle::remove`] waits for reads of the extent to end.
const DRAIN: Duration = Duration::from_secs(5);

const TRAITS: Traits = Traits {
    queue_size: 128,
    block_size: IMAGES_BLOCK as u32,
    read_only: true,
    // Nothing is ever written.
    flush: false,
    discard: None,
};

/// The images disk: read-only, very large and empty at birth. Layers are put on it while the machine runs, as extents;
/// reading where nothing was put is an I/O error. The first 2 MiB read as zeros: the guest's kernel looks for partitions
/// there, in more than the first block, and each line that it would print of errors costs the start an exit for each letter.
///
/// `threads` serve it; no other device should be in that group.
#[must_use]
pub fn images(threads: &BlockThreads, on_fault: OnFault) -> (BlockDevice, ImagesHandle) {
    let disk = Arc::new(Images { table: Table::new(IMAGES_CAPACITY) });
    let device = BlockDevice::new("images", TRAITS, &disk, threads, on_fault);
    let service = device.service().clone();
    (device, ImagesHandle { disk, service })
}

/// Puts layers on the images disk and takes them off. Cheap to clone; any thread.
#[derive(Clone)]
pub struct ImagesHandle {
    disk: Arc<Images>,
    service: Arc<Service>,
}

impl ImagesHandle {
    /// Puts the first `length` bytes of `file` on the disk. A repeated call with the same key answers with the same extent
    /// (and closes the file); after a restore, which keeps extents but no files, it gives the extent its file again.
    ///
    /// `key` is the caller's name for it, a layer's digest, say; 1 to 256 bytes. The file has to be a regular one that was
    /// opened for reading only.
    ///
    /// # Errors
    /// See [`ImagesError`]; nothing has changed then.
    pub fn add(&self, key: &str, file: File, length: u64) -> Result<Extent, ImagesError> {
        self.disk.table.add(key, file, length)
    }

    /// Takes an extent off the disk: reads of it are errors from now on, and its place is never used again. Waits up to
    /// 5 s for reads that are under way; afterwards the file is closed. Harmless if there is no such key.
    ///
    /// # Errors
    /// [`ImagesError::StillRead`]: it is off the disk, but the file is still open; a repeated call waits again.
    pub fn remove(&self, key: &str) -> Result<(), ImagesError> {
        self.disk.table.remove(key, DRAIN)
    }

    /// What is on the disk, by offset: the keys and extents.
    #[must_use]
    pub fn list(&self) -> Vec<(String, Extent)> {
        self.disk.table.list()
    }

    /// What the device has done.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        self.service.counters().read()
    }
}

pub(super) struct Images {
    table: Table,
}

impl Storage for Images {
    fn capacity(&self) -> u64 {
        IMAGES_CAPACITY
    }

    fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        while into.remaining() > 0 {
            let here = at + into.done();
            match self.table.find(here) {
                Place::Zeros { left } => into.zero(left),
                Place::Extent(extent) => extent.read(here, into, patience)?,
                Place::Nothing => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(())
    }

    fn write(&self, _: u64, _: &mut GuestBuffers) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: &Range) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _: &Range) -> io::Result<()> {
        Err(read_only())
    }
}

impl Kept for Images {
    fn keep(&self) -> Value {
        self.table.keep()
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        self.table.take_over(kept)
    }
}
