//! Virtio 1.2: what a device is to its transport, and what every device is built of.
//!
//! A device is written once and knows no transport: the transport ([`mmio`](self)) negotiates, hands over the queues in
//! [`VirtioDevice::activate`], and the device serves them on the thread of a [`Worker`]. All that the guest puts into
//! queues and registers is hostile.

/// The balloon: memory that the guest gives back.
pub mod balloon;
/// Block devices: images, scratch, slots for raw volumes.
pub mod block;
/// The driver's side of queues, for tests of devices.
#[cfg(test)]
pub(crate) mod driver;
/// Volumes: a device whose queues another process serves.
pub mod fs;
/// Devices whose requests end at once.
mod instant;
/// Interrupts of a device, towards the driver.
mod interrupt;
/// Memory that comes and goes.
pub mod mem;
/// The MMIO transport.
pub mod mmio;
/// A NIC on a tap.
pub mod net;
/// A queue that the driver has set up, and how chains are taken from it and given back.
mod queue;
/// Guest memory given back to the host.
mod release;
/// Random numbers.
pub mod rng;
/// The buffers of a chain, and system calls straight into and out of guest memory.
mod vectored;
/// Streams between the host and the guest.
pub mod vsock;
/// Threads that serve devices: an epoll loop each.
mod worker;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use interrupt::Interrupt;
pub use queue::{ActiveQueue, Chain, QueueError, SavedQueue};
pub use worker::{Attached, Handler, Registrar, Worker};

/// The guest's memory, as one process sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// A share in the guest's memory. All of it, with the region of virtio-mem, is mapped at birth: it never changes.
pub type Memory = Arc<GuestMemory>;

/// A virtio device, without its transport.
///
/// The transport calls it under a lock, from vCPU threads and from the control thread: no method may wait for a disk, a
/// peer or the guest (`pause` and `reset` wait for requests that are under way, and only for those).
pub trait VirtioDevice: Send {
    /// For messages: "images", "net".
    fn name(&self) -> &str;

    /// Virtio 1.2, section 5: the device type.
    fn device_type(&self) -> u32;

    /// The most descriptors of each queue, powers of two; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// The device's own feature bits, and those of the ring that it can serve (`VIRTIO_RING_F_EVENT_IDX`,
    /// `VIRTIO_RING_F_INDIRECT_DESC`). The transport adds `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// Fills `data` from the configuration space at `offset`; beyond its end with zeros. Any offset and length may come.
    /// The transport finds by itself that a configuration has changed (`ConfigGeneration`).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A write of the driver to the configuration space; what is not writable is ignored. Any offset and length may come.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: serve its queues from now on, also what is in them already. After [`VirtioDevice::restore`]
    /// the queues continue where the saved ones stood.
    ///
    /// # Errors
    /// The device then is marked as needing a reset, and the machine lives on.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving, forgets the queues and what was negotiated. Harmless on a device that is not active; the device
    /// may be activated again. When it returns, no request of the device touches guest memory any more.
    fn reset(&mut self);

    /// Stops serving: when it returns, no request is under way, the queues are as [`VirtioDevice::save`] tells, and
    /// guest memory is not touched until [`VirtioDevice::resume`]. Harmless on a device that is not active.
    ///
    /// # Errors
    /// The device could not be drained; it goes on serving.
    fn pause(&mut self) -> Result<(), StateError>;

    /// Serves again after [`VirtioDevice::pause`], beginning with what has come meanwhile.
    ///
    /// # Errors
    /// The worker could not take the device back.
    fn resume(&mut self) -> Result<(), StateError>;

    /// The state of a paused device: numbers only, no paths, nothing of the host's resources, which a restored device is
    /// given anew by its constructor.
    ///
    /// # Errors
    /// The device is active and not paused.
    fn save(&mut self) -> Result<DeviceState, StateError>;

    /// Takes over the `inner` part of a saved state, before it is activated with the saved queues.
    ///
    /// # Errors
    /// The state is not one of this device. It may be hostile: it came from a file.
    fn restore(&mut self, inner: serde_json::Value) -> Result<(), StateError>;
}

/// All that a device needs to serve its driver.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// What driver and device agreed upon, with the transport's bits.
    pub features: u64,
    /// One for each of [`VirtioDevice::queue_sizes`], in that order. A queue that the driver did not set up is there,
    /// and [`ActiveQueue::ready`] says so: its kicks are ignored.
    pub queues: Vec<ActiveQueue>,
    /// How the driver is told.
    pub interrupt: Interrupt,
}

impl Activation {
    /// Whether driver and device agreed upon this feature bit.
    #[must_use]
    pub fn has(&self, bit: u32) -> bool {
        bit < 64 && self.features & (1 << bit) != 0
    }
}

/// What a paused device is, as saved with its machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceState {
    /// The queues of an active device, in order; empty if it is not active.
    pub queues: Vec<SavedQueue>,
    /// Whatever else the device needs; `null` if nothing.
    pub inner: serde_json::Value,
}

/// A device could not begin to serve.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// Its thread could not take it.
    #[error("{device}: cannot serve its queues: {source}")]
    Worker {
        /// The device.
        device: String,
        /// Why.
        source: std::io::Error,
    },
    /// The driver set the device up in a way that cannot work.
    #[error("{device}: the driver's set-up cannot be served: {reason}")]
    Setup {
        /// The device.
        device: String,
        /// What is wrong.
        reason: String,
    },
}

/// A device could not be paused, resumed, saved or restored.
#[derive(Debug, Error)]
pub enum StateError {
    /// Its state can only be told when it rests.
    #[error("{device}: cannot be saved while it serves: pause it first")]
    NotPaused {
        /// The device.
        device: String,
    },
    /// A system call failed.
    #[error("{device}: cannot {doing}: {source}")]
    Io {
        /// The device.
        device: String,
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A saved state that is none.
    #[error("{device}: this is not a state of it: {reason}")]
    Invalid {
        /// The device.
        device: String,
        /// What is wrong.
        reason: String,
    },
}
