use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::ring::Ring;
use crate::protocol::messages::{self, QueuePosition};
use crate::protocol::{DescriptorError, Descriptors};

/// The guest's memory; the type that `virtiofsd` wants.
pub(super) type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// Most parts of memory, and queues; a machine has three and two.
const MAX_REGIONS: usize = 16;
const MAX_QUEUES: usize = 8;
/// Most entries of a queue.
const MAX_QUEUE_SIZE: u16 = 1024;

/// Why queues cannot be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("other queues are being served")]
    Busy,
    #[error("{0}")]
    Descriptor(#[from] DescriptorError),
    #[error("there are too many or no parts of memory, or queues")]
    Count,
    #[error("cannot map the guest's memory: {0}")]
    Memory(String),
    #[error("queue {index} makes no sense: {reason}")]
    Queue { index: usize, reason: String },
    #[error("cannot make an eventfd: {0}")]
    Event(io::Error),
}

/// Guest memory and queues, until the VMM wants them back.
pub(super) struct Session {
    pub(super) memory: Arc<Memory>,
    /// In the order of the device; `None` is one that the driver did not set up.
    rings: Vec<(QueuePosition, Option<Ring>)>,
    /// Readable once the threads are to leave.
    stop: OwnedFd,
}

impl Session {
    pub(super) fn new(call: &messages::ServeQueues, mut fds: Descriptors) -> Result<Self, SessionError> {
        let count = |length: usize, most: usize| {
            if length == 0 || length > most { Err(SessionError::Count) } else { Ok(()) }
        };
        count(call.regions.len(), MAX_REGIONS)?;
        count(call.queues.len(), MAX_QUEUES)?;
        let memory = Arc::new(map(&call.regions, &mut fds)?);
        let event_idx = call.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut rings = Vec::new();
        for (index, queue) in call.queues.iter().enumerate() {
            let position = queue.position.unwrap_or_default();
            let kick = fds.take(queue.kick, "kick of a queue")?;
            let line = fds.take(queue.call, "interrupt of a queue")?;
            let ring = if queue.size == 0 {
                None
            } else {
                let invalid = |reason: String| SessionError::Queue { index, reason };
                let queue = restore(queue, event_idx).map_err(invalid)?;
                if !queue.is_valid(&*memory) {
                    return Err(invalid("its rings are not in the guest's memory".to_owned()));
                }
                Some(Ring::new(queue, kick, line))
            };
            rings.push((position, ring));
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self { memory, rings, stop: stop.map_err(|errno| SessionError::Event(errno.into()))? })
    }

    /// The queue with this number, if it is there, and what tells its threads to leave.
    pub(super) fn ring(&self, index: usize) -> Option<(&Ring, &OwnedFd)> {
        let ring = self.rings.get(index)?.1.as_ref()?;
        Some((ring, &self.stop))
    }

    /// Tells the threads to leave; they finish the requests that they are at.
    pub(super) fn stop(&self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        self.rings.iter().map(|(given, ring)| ring.as_ref().map_or(*given, Ring::position)).collect()
    }
}

fn map(regions: &[messages::MemoryRegion], fds: &mut Descriptors) -> Result<Memory, SessionError> {
    let failed = |error: &dyn std::fmt::Display| SessionError::Memory(error.to_string());
    let mut files: BTreeMap<u32, Arc<File>> = BTreeMap::new();
    let mut mapped = Vec::new();
    for region in regions {
        let file = match files.get(&region.file) {
            Some(file) => Arc::clone(file),
            None => {
                let file = Arc::new(File::from(fds.take(region.file, "file of the guest's memory")?));
                files.insert(region.file, Arc::clone(&file));
                file
            }
        };
        check_within(&file, region).map_err(|error| failed(&error))?;
        let size = usize::try_from(region.size).map_err(|error| failed(&error))?;
        let mapping = MmapRegion::from_file(FileOffset::from_arc(file, region.offset), size);
        let mapping = mapping.map_err(|error| failed(&error))?;
        let placed = GuestRegionMmap::new(mapping, GuestAddress(region.address));
        mapped.push(placed.ok_or_else(|| failed(&"a part ends beyond the address space"))?);
    }
    Memory::from_regions(mapped).map_err(|error| failed(&error))
}

/// Touching a page beyond a file's end would kill the process.
fn check_within(file: &File, region: &messages::MemoryRegion) -> io::Result<()> {
    let end = region.offset.checked_add(region.size);
    if end.is_some_and(|end| file.metadata().is_ok_and(|metadata| end <= metadata.len())) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "a part lies beyond the end of its file"))
}

fn restore(queue: &messages::Queue, event_idx: bool) -> Result<Queue, String> {
    let narrow = |number: u32| u16::try_from(number).map_err(|error| error.to_string());
    let position = queue.position.unwrap_or_default();
    let size = narrow(queue.size)?;
    if size > MAX_QUEUE_SIZE {
        return Err(format!("it has {size} entries"));
    }
    let state = QueueState {
        max_size: MAX_QUEUE_SIZE,
        next_avail: narrow(position.next_available)?,
        next_used: narrow(position.next_used)?,
        event_idx_enabled: event_idx,
        size,
        ready: true,
        desc_table: queue.descriptor_table,
        avail_ring: queue.available_ring,
        used_ring: queue.used_ring,
    };
    Queue::try_from(state).map_err(|error| error.to_string())
}
