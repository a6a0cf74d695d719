use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use super::counters::BlockStats;
use super::device::{BlockDevice, Kept};
use super::faults::OnFault;
use super::guest_buffers::{GuestBuffers, Patience};
use super::leased::{Lease, Leased};
use super::protocol::Traits;
use super::raw_file::RawFile;
use super::request::Range;
use super::service::Service;
use super::storage::Storage;
use super::threads::BlockThreads;

const TRAITS: Traits = Traits {
    queue_size: 64,
    // Whatever the volume's own block size is: the host's page cache is in between.
    block_size: 512,
    // Fixed at birth, when nobody knows what will come; a read-only volume refuses writes by itself.
    read_only: false,
    flush: true,
    discard: Some(4096),
};

/// How long [`SlotHandle::clear`] waits for requests under way.
const DRAIN: Duration = Duration::from_secs(5);

/// A volume could not be put into a slot or taken out of it.
#[derive(Debug, Error)]
pub enum SlotError {
    /// The file may not be a volume.
    #[error("{slot}: the volume cannot be used: {reason}")]
    File {
        /// The slot's name.
        slot: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another volume is in it.
    #[error("{slot}: another volume is in it")]
    Occupied {
        /// The slot's name.
        slot: String,
    },
    /// Requests of the guest wait for the disk.
    #[error("{slot}: the volume is out of it, but requests are still waiting for the disk")]
    StillUsed {
        /// The slot's name.
        slot: String,
    },
}

/// A slot for a raw block volume: a disk of capacity zero until it is filled. Its name, and serial number, is `slotN`.
///
/// A slot can be written to, as far as its driver knows (that is fixed at birth); a volume put in as read-only refuses
/// writes with an I/O error, on the host.
#[must_use]
pub fn slot(number: u32, threads: &BlockThreads, on_fault: OnFault) -> (BlockDevice, SlotHandle) {
    let name = format!("slot{number}");
    let slot = Arc::new(Slot { volume: Mutex::default() });
    let device = BlockDevice::new(&name, TRAITS, &slot, threads, on_fault);
    let service = device.service().clone();
    (device, SlotHandle { name, slot, service })
}

/// Fills a slot and clears it. Cheap to clone; any thread.
#[derive(Clone)]
pub struct SlotHandle {
    name: String,
    slot: Arc<Slot>,
    service: Arc<Service>,
}

impl SlotHandle {
    /// Puts a volume in: a regular file or a block device, opened for reading and, unless it is `read_only`, for writing.
    /// The guest is told of the new capacity, which is returned, in bytes. Putting the same volume in again changes
    /// nothing.
    ///
    /// # Errors
    /// See [`SlotError`]; nothing has changed then.
    pub fn fill(&self, file: File, read_only: bool) -> Result<u64, SlotError> {
        let volume = RawFile::new(file, read_only)
            .map_err(|reason| SlotError::File { slot: self.name.clone(), reason })?;
        let size = volume.size();
        {
            let mut present = self.slot.lock();
            if let Some(present) = &*present {
                if present.identity() == volume.identity() && present.writable() != read_only {
                    return Ok(present.size());
                }
                return Err(SlotError::Occupied { slot: self.name.clone() });
            }
            *present = Some(Leased::new(volume));
        }
        self.service.configuration_changed();
        Ok(size)
    }

    /// Takes the volume out: the capacity is zero again, requests are errors. Waits up to 5 s for those under way;
    /// afterwards nothing uses the volume's file. Harmless on an empty slot.
    ///
    /// # Errors
    /// [`SlotError::StillUsed`]: the guest can no longer use it, but the file is still open.
    pub fn clear(&self) -> Result<(), SlotError> {
        let volume = self.slot.lock().take();
        let Some(volume) = volume else { return Ok(()) };
        self.service.configuration_changed();
        if volume.wait(DRAIN) { Ok(()) } else { Err(SlotError::StillUsed { slot: self.name.clone() }) }
    }

    /// The volume's size in bytes and whether it is read-only; None if the slot is empty.
    #[must_use]
    pub fn volume(&self) -> Option<(u64, bool)> {
        self.slot.lock().as_ref().map(|volume| (volume.size(), !volume.writable()))
    }

    /// What the device has done.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        self.service.counters().read()
    }
}

struct Slot {
    volume: Mutex<Option<Arc<Leased<RawFile>>>>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Leased<RawFile>>>> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.volume.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume, if there is one that reaches to `end`: what was checked against one capacity may meet another volume.
    fn volume(&self, at: u64, length: u64) -> io::Result<Lease<RawFile>> {
        // Under the lock: whoever takes the volume out then waits for this lease.
        let volume = self.lock().as_ref().ok_or(io::ErrorKind::NotFound)?.lease();
        let end = at.checked_add(length).filter(|end| *end <= volume.size());
        end.map(|_| volume).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Storage for Slot {
    fn capacity(&self) -> u64 {
        self.lock().as_ref().map_or(0, |volume| volume.size())
    }

    fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        self.volume(at, into.done() + into.remaining())?.read(at, into, patience)
    }

    fn write(&self, at: u64, from: &mut GuestBuffers) -> io::Result<()> {
        self.volume(at, from.remaining())?.write(at, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.volume(0, 0)?.sync()
    }

    fn discard(&self, range: &Range) -> io::Result<()> {
        self.volume(range.at, range.length)?.discard(range)
    }

    fn write_zeroes(&self, range: &Range) -> io::Result<()> {
        self.volume(range.at, range.length)?.write_zeroes(range)
    }
}

impl Kept for Slot {
    /// Nothing: what is in a slot is the host's, and is put in again.
    fn keep(&self) -> Value {
        Value::Null
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        if kept.is_null() { Ok(()) } else { Err("a slot keeps nothing".to_owned()) }
    }
}
