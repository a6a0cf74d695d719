use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use vmm_sys_util::eventfd::EventFd;

use crate::protocol::messages::event::Kind;

/// Events that may wait for the main thread; a guest that makes more (it can panic once, the rest are few) loses some.
const WAITING: usize = 64;

/// Tells the main thread, from any thread, what hulld should know. Never waits.
#[derive(Clone, Debug)]
pub struct Events {
    queue: SyncSender<Message>,
    wake: Arc<EventFd>,
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
        Ok((Self { queue: sender, wake: wake.clone() }, EventReceiver { queue: receiver, wake }))
    }

    /// Reports an event.
    pub fn send(&self, event: Kind) {
        self.put(Message::Event(event));
    }

    /// A device failed for good.
    pub fn fault(&self, device: &str, message: impl Into<String>) {
        let fault = crate::protocol::messages::Fault { device: device.to_owned(), message: message.into() };
        self.send(Kind::Fault(fault));
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
