use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::session::Memory;
use crate::protocol::messages::QueuePosition;

/// A request in guest memory.
pub(super) type Chain = DescriptorChain<Arc<Memory>>;

/// A queue and the threads that share it: one of them, the leader, waits for the driver; when it has taken a request it
/// leaves the place to the next and carries the request out.
pub(super) struct Ring {
    leader: Mutex<()>,
    queue: Mutex<Queue>,
    /// The driver broke it: nothing is taken any more.
    broken: AtomicBool,
    kick: OwnedFd,
    call: OwnedFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ring {
    /// A queue whose rings lie in the memory that it will be used with.
    pub(super) fn new(queue: Queue, kick: OwnedFd, call: OwnedFd) -> Self {
        let broken = AtomicBool::new(false);
        Self { leader: Mutex::new(()), queue: Mutex::new(queue), broken, kick, call }
    }

    /// Waits for the next request; `None` once `stop` is readable.
    pub(super) fn next(&self, memory: &Arc<Memory>, stop: &OwnedFd) -> Option<Chain> {
        let _leader = lock(&self.leader);
        loop {
            let mut stopping = [PollFd::new(stop, PollFlags::IN)];
            if poll(&mut stopping, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0) {
                return None;
            }
            match self.take(memory) {
                Ok(Some(chain)) => return Some(chain),
                Ok(None) => {}
                // Only a reset of the device mends it, and that comes as a stop.
                Err(_) => self.broken.store(true, Ordering::SeqCst),
            }
            self.wait(stop);
        }
    }

    fn take(&self, memory: &Arc<Memory>) -> Result<Option<Chain>, virtio_queue::Error> {
        if self.broken.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let mut queue = lock(&self.queue);
        if let Some(chain) = queue.iter(Arc::clone(memory))?.next() {
            return Ok(Some(chain));
        }
        // Nothing there: ask to be told of the next, and look again at what came before that was asked.
        if queue.enable_notification(&**memory)? {
            return Ok(queue.iter(Arc::clone(memory))?.next());
        }
        Ok(None)
    }

    fn wait(&self, stop: &OwnedFd) {
        let mut ready = [PollFd::new(stop, PollFlags::IN), PollFd::new(&self.kick, PollFlags::IN)];
        // A broken queue may be kicked as often as the driver likes.
        let count = if self.broken.load(Ordering::SeqCst) { 1 } else { 2 };
        // Interrupted is as good as woken.
        let _ = poll(&mut ready[..count], None);
        if ready[1].revents().contains(PollFlags::IN) {
            // Not blocking: the VMM made it so.
            let _ = rustix::io::read(&self.kick, &mut [0; 8]);
        }
    }

    /// Gives a request back into which `length` bytes were written, and tells the driver if it wants to know.
    pub(super) fn give_back(&self, memory: &Memory, head: u16, length: u32) {
        let mut queue = lock(&self.queue);
        let told = queue.add_used(memory, head, length).and_then(|()| queue.needs_notification(memory));
        drop(queue);
        match told {
            Ok(false) => {}
            Ok(true) => {
                let _ = rustix::io::write(&self.call, &1_u64.to_ne_bytes());
            }
            Err(_) => self.broken.store(true, Ordering::SeqCst),
        }
    }

    pub(super) fn position(&self) -> QueuePosition {
        let queue = lock(&self.queue);
        QueuePosition { next_available: queue.next_avail().into(), next_used: queue.next_used().into() }
    }
}
