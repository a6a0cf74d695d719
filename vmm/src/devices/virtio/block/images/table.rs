use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::IMAGES_BLOCK;
use crate::devices::virtio::block::guest_buffers::{GuestBuffers, Patience};
use crate::devices::virtio::block::leased::{Lease, Leased};

/// Extents begin at multiples of this; a huge page of the guest's cache, and room to round lengths up.
const ALIGNMENT: u64 = 2 << 20;

/// Most extents at a time: each is an open file.
const MOST: usize = 4096;

const LONGEST_KEY: usize = 256;

/// A layer's place on the images disk, in bytes. What lies between `length` and the next multiple of 4096 reads as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// A multiple of 2 MiB, not 0.
    pub offset: u64,
    /// As long as the file was said to be.
    pub length: u64,
}

/// A layer could not be put on the images disk or taken off it.
#[derive(Debug, Error)]
pub enum ImagesError {
    /// The key is empty or too long.
    #[error("add an extent: a key of {0} bytes; it must have 1 to 256")]
    Key(usize),
    /// The file may not be on the disk.
    #[error("add the extent {key}: {reason}")]
    File {
        /// Of the extent.
        key: String,
        /// What is wrong with the file.
        reason: String,
    },
    /// The key is in use with another length.
    #[error("add the extent {key} of {asked} bytes: there is one already, of {present} bytes")]
    Differs {
        /// Of both.
        key: String,
        /// The length asked for.
        asked: u64,
        /// The length of the present one.
        present: u64,
    },
    /// Too many extents, or the machine has used up all offsets.
    #[error("add the extent {key}: the images disk is full: {reason}")]
    Full {
        /// Of the extent.
        key: String,
        /// What has run out.
        reason: &'static str,
    },
    /// Reads of a removed extent wait for the disk.
    #[error("remove the extent {key}: reads of it are still waiting for the disk")]
    StillRead {
        /// Of the extent.
        key: String,
    },
}

/// What is at an offset of the disk.
pub(super) enum Place {
    /// Zeros, for so many bytes.
    Zeros {
        left: u64,
    },
    /// A layer.
    Extent(Lease<Mapped>),
    Nothing,
}

/// The extents. Reading looks one up under a lock that nobody holds for long.
pub(super) struct Table {
    capacity: u64,
    entries: Mutex<Entries>,
}

struct Entries {
    by_offset: BTreeMap<u64, Arc<Leased<Mapped>>>,
    /// Removed but still being read.
    leaving: Vec<Arc<Leased<Mapped>>>,
    /// Offsets below were given out: they are never used again.
    next: u64,
}

/// An extent and its file.
pub(super) struct Mapped {
    key: String,
    extent: Extent,
    /// None after a restore, until it is given anew.
    file: Option<File>,
    /// The file system cannot say beforehand whether a read would have to wait.
    cannot_ask: AtomicBool,
}

impl Table {
    pub(super) fn new(capacity: u64) -> Self {
        // The first unit stays empty and reads as zeros.
        let entries = Entries { by_offset: BTreeMap::new(), leaving: Vec::new(), next: ALIGNMENT };
        Self { capacity, entries: Mutex::new(entries) }
    }

    pub(super) fn add(&self, key: &str, file: File, length: u64) -> Result<Extent, ImagesError> {
        if key.is_empty() || key.len() > LONGEST_KEY {
            return Err(ImagesError::Key(key.len()));
        }
        check(&file, length).map_err(|reason| ImagesError::File { key: key.to_owned(), reason })?;
        let mut entries = self.lock();
        if let Some(present) = entries.by_key(key).cloned() {
            if present.extent.length != length {
                let (asked, present) = (length, present.extent.length);
                return Err(ImagesError::Differs { key: key.to_owned(), asked, present });
            }
            if present.file.is_none() {
                entries.put(Mapped::new(key, present.extent, Some(file)));
            }
            return Ok(present.extent);
        }
        let full = |reason| ImagesError::Full { key: key.to_owned(), reason };
        if entries.by_offset.len() + entries.leaving.len() >= MOST {
            return Err(full("4096 extents at a time"));
        }
        let offset = entries.next;
        let end = offset.checked_add(length).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        let end = end.filter(|end| *end <= self.capacity).ok_or_else(|| full("no offsets are left"))?;
        let extent = Extent { offset, length };
        entries.next = end;
        entries.put(Mapped::new(key, extent, Some(file)));
        Ok(extent)
    }

    pub(super) fn remove(&self, key: &str, patience: Duration) -> Result<(), ImagesError> {
        let leaving: Vec<_> = {
            let mut entries = self.lock();
            if let Some(mapped) = entries.by_key(key).cloned() {
                entries.by_offset.remove(&mapped.extent.offset);
                entries.leaving.push(mapped);
            }
            entries.leaving.iter().filter(|mapped| mapped.key == key).cloned().collect()
        };
        let deadline = Instant::now() + patience;
        for mapped in leaving {
            if !mapped.wait(deadline.saturating_duration_since(Instant::now())) {
                return Err(ImagesError::StillRead { key: key.to_owned() });
            }
            self.lock().leaving.retain(|other| !Arc::ptr_eq(other, &mapped));
        }
        Ok(())
    }

    pub(super) fn list(&self) -> Vec<(String, Extent)> {
        self.lock().by_offset.values().map(|mapped| (mapped.key.clone(), mapped.extent)).collect()
    }

    /// What is at byte `at` of the disk.
    pub(super) fn find(&self, at: u64) -> Place {
        if at < ALIGNMENT {
            return Place::Zeros { left: ALIGNMENT - at };
        }
        let entries = self.lock();
        match entries.by_offset.range(..=at).next_back() {
            Some((_, mapped)) if at < mapped.end() => Place::Extent(mapped.lease()),
            _ => Place::Nothing,
        }
    }

    pub(super) fn keep(&self) -> Value {
        let entries = self.lock();
        let extents = entries.by_offset.values().map(|m| Kept { key: m.key.clone(), extent: m.extent });
        serde_json::json!({ "next": entries.next, "extents": extents.collect::<Vec<_>>() })
    }

    /// Takes over extents, without files: reading them is an error until [`Table::add`] gives them theirs again.
    pub(super) fn take_over(&self, kept: Value) -> Result<(), String> {
        #[derive(Deserialize)]
        struct State {
            next: u64,
            extents: Vec<Kept>,
        }
        let state: State = serde_json::from_value(kept).map_err(|e| e.to_string())?;
        if state.extents.len() > MOST {
            return Err(format!("{} extents", state.extents.len()));
        }
        let mut by_offset = BTreeMap::new();
        let (mut free, mut keys) = (ALIGNMENT, std::collections::BTreeSet::new());
        for Kept { key, extent } in state.extents {
            let end =
                extent.offset.checked_add(extent.length).and_then(|e| e.checked_next_multiple_of(ALIGNMENT));
            let sound = extent.offset >= free && extent.offset.is_multiple_of(ALIGNMENT) && extent.length > 0;
            let end = end.filter(|end| sound && *end <= state.next);
            free = end.ok_or_else(|| format!("the extent {key} is out of place"))?;
            if key.is_empty() || key.len() > LONGEST_KEY || !keys.insert(key.clone()) {
                return Err(format!("the key {key:?}"));
            }
            by_offset.insert(extent.offset, Leased::new(Mapped::new(&key, extent, None)));
        }
        if state.next < free || state.next > self.capacity || !state.next.is_multiple_of(ALIGNMENT) {
            return Err(format!("the next offset {}", state.next));
        }
        *self.lock() = Entries { by_offset, leaving: Vec::new(), next: state.next };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    key: String,
    #[serde(flatten)]
    extent: Extent,
}

impl Entries {
    fn by_key(&self, key: &str) -> Option<&Arc<Leased<Mapped>>> {
        self.by_offset.values().find(|mapped| mapped.key == key)
    }

    fn put(&mut self, mapped: Mapped) {
        self.by_offset.insert(mapped.extent.offset, Leased::new(mapped));
    }
}

impl Mapped {
    fn new(key: &str, extent: Extent, file: Option<File>) -> Self {
        Self { key: key.to_owned(), extent, file, cannot_ask: AtomicBool::new(false) }
    }

    /// The end of what can be read: the length, rounded up to whole blocks.
    fn end(&self) -> u64 {
        self.extent.offset + self.extent.length.next_multiple_of(IMAGES_BLOCK)
    }
}

impl Mapped {
    /// Fills the buffers from byte `at` of the disk, which is in this extent, to its end at most.
    pub(super) fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let wanted = into.remaining().min(self.end() - at);
        let before = into.done();
        loop {
            let done = into.done() - before;
            let position = at - self.extent.offset + done;
            if done == wanted {
                return Ok(());
            }
            if position >= self.extent.length {
                into.zero(wanted - done);
                return Ok(());
            }
            let limit = (wanted - done).min(self.extent.length - position);
            if self.read_file(file, position, limit, into, patience)? == 0 {
                // Shorter than it was said to be.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn read_file(
        &self,
        file: &File,
        position: u64,
        limit: u64,
        into: &mut GuestBuffers,
        patience: Patience,
    ) -> io::Result<u64> {
        if patience == Patience::None && self.cannot_ask.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let result = into.read_from(file, position, limit, patience);
        match &result {
            Err(e) if patience == Patience::None && e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.cannot_ask.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => result,
        }
    }
}

/// Whether a file may be on the disk. hulld has opened and asserted it; this is the second look.
fn check(file: &File, length: u64) -> Result<(), String> {
    let stat = rustix::fs::fstat(file.as_fd()).map_err(|e| format!("stat of its file: {e}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("its file is not a regular one".to_owned());
    }
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(|e| format!("flags of its file: {e}"))?;
    if flags & OFlags::ACCMODE != OFlags::RDONLY || flags.contains(OFlags::PATH) {
        return Err("its file is not opened for reading only".to_owned());
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if length == 0 || length > size {
        return Err(format!("{length} bytes of a file that has {size}"));
    }
    Ok(())
}
