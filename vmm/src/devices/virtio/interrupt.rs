use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Virtio 1.2, 4.2.2 `InterruptStatus`: the device has used a buffer.
pub(crate) const USED_BUFFER: u32 = 1;
/// The configuration has changed.
pub(crate) const CONFIG_CHANGED: u32 = 2;
/// Virtio 1.2, 2.1 device status: the device has met an error that it cannot recover from by itself.
pub(crate) const NEEDS_RESET: u32 = 0x40;

/// How a device tells its driver. Cheap to clone; every clone is the same line. Never waits.
#[derive(Clone, Debug)]
pub struct Interrupt {
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    /// `InterruptStatus` of the transport.
    pending: AtomicU32,
    /// Bits that the device adds to the device status.
    status: AtomicU32,
    /// Bits of `InterruptStatus` that always read as set: another process raises the line.
    assumed: AtomicU32,
    /// An irqfd of the machine.
    event: EventFd,
}

impl Interrupt {
    /// A line that raises `event`, which the caller has registered as an irqfd.
    #[must_use]
    pub fn new(event: EventFd) -> Self {
        Self {
            line: Arc::new(Line {
                pending: AtomicU32::new(0),
                status: AtomicU32::new(0),
                assumed: AtomicU32::new(0),
                event,
            }),
        }
    }

    /// The queue of this number has used buffers. Use [`ActiveQueue::signal`](super::ActiveQueue::signal), which asks
    /// first whether the driver wants to know.
    pub fn queue(&self, index: u16) {
        // MMIO has one line for all queues.
        let _ = index;
        self.raise(USED_BUFFER);
    }

    /// The configuration space has changed (virtio 1.2, 2.5).
    pub fn config(&self) {
        self.raise(CONFIG_CHANGED);
    }

    /// The driver broke a queue: nothing can be served until it resets the device (virtio 1.2, 2.1.2).
    pub fn needs_reset(&self) {
        self.line.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    /// The eventfd behind the line: readable after an interrupt unless the kernel takes it (an irqfd). For tests.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn event(&self) -> io::Result<EventFd> {
        self.line.event.try_clone()
    }

    /// The line of a queue for another process that serves it: what it writes there interrupts the driver. Call
    /// [`Interrupt::served_elsewhere`] too.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn irqfd(&self, queue: u16) -> io::Result<EventFd> {
        let _ = queue;
        self.line.event.try_clone()
    }

    /// Another process serves the queues and raises the line: as it cannot say so here, every interrupt counts as one for
    /// used buffers. (The interrupt is edge-triggered, so nothing storms.)
    pub fn served_elsewhere(&self) {
        self.line.assumed.store(USED_BUFFER, Ordering::SeqCst);
    }

    /// What is pending: bit 0 a used buffer, bit 1 a change of the configuration.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.line.pending.load(Ordering::SeqCst) | self.line.assumed.load(Ordering::SeqCst)
    }

    /// Status bits that the device has raised by itself.
    pub(crate) fn device_status(&self) -> u32 {
        self.line.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.line.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// As if the device had never spoken.
    pub(crate) fn reset(&self) {
        self.line.assumed.store(0, Ordering::SeqCst);
        self.line.pending.store(0, Ordering::SeqCst);
        self.line.status.store(0, Ordering::SeqCst);
    }

    /// Takes over what was pending in a saved machine, and tells the driver again.
    pub(crate) fn restore(&self, pending: u32, status: u32) {
        self.line.status.store(status & NEEDS_RESET, Ordering::SeqCst);
        self.raise(pending & (USED_BUFFER | CONFIG_CHANGED));
    }

    fn raise(&self, bits: u32) {
        self.line.pending.fetch_or(bits, Ordering::SeqCst);
        if bits != 0 {
            // Fails only at 2^64 - 2 unread interrupts, and one is then pending anyway.
            let _ = self.line.event.write(1);
        }
    }
}
