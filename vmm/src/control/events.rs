use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::protocol::messages::event::Kind;

/// Events that may wait for the main thread; a guest that makes more (it can panic once, the rest are few) loses some.
const WAITING: usize = 64;

/// Most faults in so much time: a guest can make them as fast as it can write to a register.
const FAULTS: u32 = 8;
const WHILE: Duration = Duration::from_secs(10);

/// Tells the main thread, from any thread, what hulld should know. Never waits.
#[derive(Clone, Debug)]
pub struct Events {
    queue: SyncSender<Message>,
    wake: Arc<EventFd>,
    faults: Arc<Mutex<Allowance>>,
}

/// Faults that may still be told of until the while is over.
#[derive(Debug)]
struct Allowance {
    begun: Instant,
    told: u32,
}

/// What the main thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// An event for hulld.
    Event(Kind),
    /// The machine has ended: the last message.
    Ended(String),
}

/// The main thread's end.
#[derive(Debug)]
pub struct EventReceiver {
    pub(super) queue: Receiver<Message>,
    pub(super) wake: Arc<EventFd>,
}

impl Events {
    /// Both ends.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn channel() -> io::Result<(Self, EventReceiver)> {
        let (sender, receiver) = sync_channel(WAITING);
        let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
        let faults = Arc::new(Mutex::new(Allowance { begun: Instant::now(), told: 0 }));
        Ok((Self { queue: sender, wake: wake.clone(), faults }, EventReceiver { queue: receiver, wake }))
    }

    /// Reports an event.
    pub fn send(&self, event: Kind) {
        self.put(Message::Event(event));
    }

    /// A device failed for good.
    pub fn fault(&self, device: &str, message: impl Into<String>) {
        self.tell_fault(device, message.into(), false);
    }

    /// Requests to a device fail, which may succeed later.
    pub fn passing_fault(&self, device: &str, message: impl Into<String>) {
        self.tell_fault(device, message.into(), true);
    }

    fn tell_fault(&self, device: &str, message: String, passing: bool) {
        if self.faults.lock().unwrap_or_else(PoisonError::into_inner).takes_one() {
            let device = device.to_owned();
            self.send(Kind::Fault(crate::protocol::messages::Fault { device, message, passing }));
        }
    }

    /// The machine ends; `reason` is for people ("the guest powered off"). hulld gets ShutDown, then the main thread
    /// leaves [`super::serve`].
    pub fn end(&self, reason: impl Into<String>) {
        self.put(Message::Ended(reason.into()));
    }

    fn put(&self, message: Message) {
        let message = match self.queue.try_send(message) {
            // The main thread has gone: the process is ending.
            Ok(()) | Err(TrySendError::Disconnected(_)) => None,
            Err(TrySendError::Full(message)) => Some(message),
        };
        // Only the last message must not be lost, and whoever sends it has nothing else to do.
        if let Some(ended @ Message::Ended(_)) = message {
            let _ = self.wake.write(1);
            let _ = self.queue.send(ended);
        }
        // Fails only if nobody has read for 2^64 writes.
        let _ = self.wake.write(1);
    }
}

impl Allowance {
    fn takes_one(&mut self) -> bool {
        if self.begun.elapsed() >= WHILE {
            *self = Self { begun: Instant::now(), told: 0 };
        }
        self.told = self.told.saturating_add(1);
        self.told <= FAULTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_makes_faults_without_end_floods_nobody_and_cannot_hide_the_end() {
        let (events, receiver) = Events::channel().unwrap();
        (0..10_000).for_each(|_| events.fault("virtio", "a driver's nonsense"));
        events.end("the guest powered off");
        let told: Vec<_> = receiver.queue.try_iter().collect();
        assert_eq!(told.len(), FAULTS as usize + 1);
        assert!(matches!(told.last(), Some(Message::Ended(_))));
    }
}
