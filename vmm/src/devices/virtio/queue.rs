use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
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
        Self { index, kick, queue, ready }
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

    /// Tells the driver about the chains given back, if it wants to know.
    pub fn signal(&mut self, memory: &Memory, interrupt: &Interrupt) {
        if self.queue.needs_notification(&**memory).unwrap_or(true) {
            interrupt.queue(self.index);
        }
    }

    /// Whether chains are waiting.
    ///
    /// # Errors
    /// As [`ActiveQueue::pop`].
    pub fn has_available(&self, memory: &Memory) -> Result<bool, QueueError> {
        if !self.ready {
            return Ok(false);
        }
        let index = self
            .queue
            .avail_idx(&**memory, std::sync::atomic::Ordering::Acquire)
            .map_err(|e| self_error(self.index, &e))?;
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
