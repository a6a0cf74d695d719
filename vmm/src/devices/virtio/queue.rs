use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Interrupt, Memory};

/// A chain of buffers, given by the driver. Its length is bounded by the queue's size, also through an indirect table.
pub type Chain = DescriptorChain<Memory>;

/// A queue that the driver has set up, checked: sizes and rings lie in guest memory.
pub struct ActiveQueue {
    /// Its number, from 0.
    pub index: u16,
    /// Readable when the driver has notified. Level-triggered: read it ([`ActiveQueue::take_kick`]) before looking into
    /// the queue.
    pub kick: EventFd,
    queue: Queue,
    ready: bool,
    /// The used index that the driver was last told of, or did not want to be told of.
    told: u16,
}

/// The driver broke a queue: nothing more can be served from it until the device is reset.
#[derive(Debug, Error)]
#[error("queue {index} is broken: {reason}")]
pub struct QueueError {
    /// The queue.
    pub index: u16,
    /// What is wrong with it.
    pub reason: String,
}

impl ActiveQueue {
    /// A queue whose addresses were checked, or, not ready, one that the driver has not set up.
    #[must_use]
    pub fn new(index: u16, queue: Queue, kick: EventFd) -> Self {
        let ready = queue.ready();
        let told = queue.next_used();
        Self { index, kick, queue, ready, told }
    }

    /// Whether the driver has set it up.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the notifications that are there; false if there is none (they may be spurious).
    pub fn take_kick(&self) -> bool {
        self.kick.read().is_ok()
    }

    /// Makes the queue's own worker look into it again, as if the driver had notified.
    pub fn kick_self(&self) {
        let _ = self.kick.write(1);
    }

    /// The next chain, if there is one. Give it back with [`ActiveQueue::push`], in any order.
    ///
    /// # Errors
    /// The ring makes no sense: see [`QueueError`]. Call [`Interrupt::needs_reset`] and leave the queue alone.
    pub fn pop(&mut self, memory: &Memory) -> Result<Option<Chain>, QueueError> {
        if !self.ready {
            return Ok(None);
        }
        let mut available = self.queue.iter(Memory::clone(memory)).map_err(|e| self_error(self.index, &e))?;
        Ok(available.next())
    }

    /// Puts the chain back that was popped last: the device has no room for it now.
    pub fn unpop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back: `length` bytes were written into it.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn push(&mut self, memory: &Memory, head: u16, length: u32) -> Result<(), QueueError> {
        self.queue.add_used(&**memory, head, length).map_err(|e| self_error(self.index, &e))
    }

    /// Gives several chains back at once, each with the number of bytes that were written into it: the driver sees all
    /// of them or none (virtio 1.2, 5.1.6.4.1: a frame in several buffers).
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn push_together(&mut self, memory: &Memory, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, length), earlier)) = used.split_last() else { return Ok(()) };
        let first = self.queue.next_used();
        for (number, (head, length)) in (0..).zip(earlier) {
            let place = u64::from(first.wrapping_add(number) % self.queue.size());
            // struct virtq_used: le16 flags, le16 idx, then pairs of le32 id and le32 len.
            let address = GuestAddress(self.queue.used_ring().saturating_add(4 + 8 * place));
            let pair = u64::from(*head) | u64::from(*length) << 32;
            let written = memory.write_slice(&pair.to_le_bytes(), address);
            written.map_err(|e| self_error(self.index, &virtio_queue::Error::GuestMemory(e)))?;
        }
        // The last one makes the index, and with it all of them, visible.
        self.queue.set_next_used(first.wrapping_add(earlier.len() as u16));
        self.push(memory, *head, *length)
    }

    /// Tells the driver about the chains given back, if it wants to know.
    pub fn signal(&mut self, memory: &Memory, interrupt: &Interrupt) {
        if self.wants_signal(memory) {
            interrupt.queue(self.index);
        }
    }

    /// virtio 1.2, 2.7.10: with an event index, only when the used index passes it. Not the crate's own
    /// `needs_notification`, which does not know of what `push_together` gave back.
    fn wants_signal(&mut self, memory: &Memory) -> bool {
        let (before, now) = (self.told, self.queue.next_used());
        self.told = now;
        // What was given back is visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            return true;
        }
        // struct virtq_avail: le16 flags, le16 idx, the ring, le16 used_event.
        let offset = 4 + 2 * u64::from(self.queue.size());
        let address = GuestAddress(self.queue.avail_ring().saturating_add(offset));
        let Ok(event) = memory.load::<u16>(address, Ordering::Relaxed) else { return true };
        now.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// Whether chains are waiting.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn has_available(&self, memory: &Memory) -> Result<bool, QueueError> {
        if !self.ready {
            return Ok(false);
        }
        let index =
            self.queue.avail_idx(&**memory, Ordering::Acquire).map_err(|e| self_error(self.index, &e))?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Asks the driver to notify from now on; true if chains came meanwhile, which nobody will notify of.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn enable_notification(&mut self, memory: &Memory) -> Result<bool, QueueError> {
        if !self.ready {
            return Ok(false);
        }
        self.queue.enable_notification(&**memory).map_err(|e| self_error(self.index, &e))
    }

    /// Tells the driver that it need not notify for now.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn disable_notification(&mut self, memory: &Memory) -> Result<(), QueueError> {
        if !self.ready {
            return Ok(());
        }
        self.queue.disable_notification(&**memory).map_err(|e| self_error(self.index, &e))
    }

    /// Serves what is waiting: `serve` gets each chain and returns the number of bytes that it wrote, the chain goes
    /// back, and the driver is told once. For devices whose requests end at once.
    ///
    /// At most one queue full is served per call, so that a driver that never stops does not starve the other devices of
    /// the thread; if more waits, the queue kicks itself.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`]; what was served until then is given back.
    pub fn serve(
        &mut self,
        memory: &Memory,
        interrupt: &Interrupt,
        mut serve: impl FnMut(Chain) -> u32,
    ) -> Result<(), QueueError> {
        let mut served = 0;
        let result = self.serve_some(memory, &mut served, &mut serve);
        if served > 0 {
            self.signal(memory, interrupt);
        }
        result
    }

    fn serve_some(
        &mut self,
        memory: &Memory,
        served: &mut u16,
        serve: &mut impl FnMut(Chain) -> u32,
    ) -> Result<(), QueueError> {
        self.disable_notification(memory)?;
        while *served < self.size() {
            let Some(chain) = self.pop(memory)? else {
                if !self.enable_notification(memory)? {
                    return Ok(());
                }
                // More came between the last look and the enabling. If there is nothing still, the ring lies.
                let Some(chain) = self.pop(memory)? else {
                    let reason = "chains are announced that are not there".to_owned();
                    return Err(QueueError { index: self.index, reason });
                };
                self.serve_one(memory, chain, served, serve)?;
                continue;
            };
            self.serve_one(memory, chain, served, serve)?;
        }
        if self.enable_notification(memory)? {
            self.kick_self();
        }
        Ok(())
    }

    fn serve_one(
        &mut self,
        memory: &Memory,
        chain: Chain,
        served: &mut u16,
        serve: &mut impl FnMut(Chain) -> u32,
    ) -> Result<(), QueueError> {
        let head = chain.head_index();
        let length = serve(chain);
        self.push(memory, head, length)?;
        *served += 1;
        Ok(())
    }

    /// Where its rings are and where it stands, for another process that is to serve it.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Goes on where another process has stopped: indices into the available and the used ring.
    pub fn continue_at(&mut self, next_available: u16, next_used: u16) {
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_used);
    }

    /// What is saved of it.
    #[must_use]
    pub fn save(&self) -> SavedQueue {
        SavedQueue::from(&self.queue)
    }
}

impl AsRawFd for ActiveQueue {
    /// The kick's descriptor.
    fn as_raw_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }
}

fn self_error(index: u16, error: &virtio_queue::Error) -> QueueError {
    QueueError { index, reason: error.to_string() }
}

/// The state of a queue between its driver and a paused device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl From<&Queue> for SavedQueue {
    fn from(queue: &Queue) -> Self {
        Self {
            max_size: queue.max_size(),
            size: queue.size(),
            ready: queue.ready(),
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
        }
    }
}

impl SavedQueue {
    /// The queue again, its sizes and alignments checked, for a device whose queue has at most `max_size` descriptors.
    ///
    /// # Errors
    /// The state came from a file and is none.
    pub fn restore(&self, max_size: u16) -> io::Result<Queue> {
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        if self.max_size != max_size {
            return Err(invalid(format!(
                "a queue of {} descriptors was saved, not {max_size}",
                self.max_size
            )));
        }
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .map_err(|e| invalid(e.to_string()))
    }
}
