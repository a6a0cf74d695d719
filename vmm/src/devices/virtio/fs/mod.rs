//! The virtio-fs device "volumes" (virtio 1.2, section 5.11), whose queues hull-virtiofsd serves.
//!
//! The device is born with the machine, the server comes with the pod's first volume from a path of the host, if there
//! ever is one. Until then nobody looks into the queues: FUSE_INIT and what follows waits there. The server has the
//! guest's memory and the eventfds of the queues; this process never touches a request.

/// The device's part on its worker's thread.
mod handler;
/// What is said to hull-virtiofsd.
mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{ActivateError, Activation, Attached, DeviceState, StateError, VirtioDevice, Worker};
use handler::{Handler, Shared};
pub use server::ServeError;

/// What the guest mounts.
pub const TAG: &str = "volumes";
/// Bytes of the tag in the configuration space.
const TAG_SIZE: usize = 36;
/// Descriptors of the queue for forgets and of the one for requests.
const QUEUES: [u16; 2] = [64, 512];
/// Request queues, as the configuration space tells.
const REQUEST_QUEUES: u32 = 1;

/// Told once when the server is gone: a sentence. Must not block.
pub type OnFault = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// The device.
pub struct Volumes {
    worker: Worker,
    shared: Arc<Shared>,
    running: Option<Attached<Handler>>,
}

/// What control requests do to the device. Cheap to clone.
#[derive(Clone)]
pub struct VolumesHandle {
    shared: Arc<Shared>,
}

impl Volumes {
    /// A device on this thread, which it hardly uses. `on_fault` gets the device's name and a sentence.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(worker: &Worker, on_fault: OnFault) -> io::Result<Self> {
        Ok(Self { worker: worker.clone(), shared: Arc::new(Shared::new(on_fault)?), running: None })
    }

    /// For control requests.
    #[must_use]
    pub fn handle(&self) -> VolumesHandle {
        VolumesHandle { shared: Arc::clone(&self.shared) }
    }
}

impl VolumesHandle {
    /// Lets the hull-virtiofsd at the other end of this connected unix socket serve the queues: now if the driver has
    /// set them up, else as soon as it does. Waits for the server, at most a few seconds.
    ///
    /// # Errors
    /// One serves already, or this one does not take the queues.
    pub fn serve(&self, server: OwnedFd) -> Result<(), ServeError> {
        self.shared.offer(server)
    }

    /// Whether a server has been handed over and is there still.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.shared.has_server()
    }
}

impl VirtioDevice for Volumes {
    fn name(&self) -> &str {
        TAG
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_SIZE + size_of::<u32>()];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let there = &config[start..];
        let length = there.len().min(data.len());
        data[..length].copy_from_slice(&there[..length]);
        data[length..].fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        activation.interrupt.served_elsewhere();
        let handler = Handler::new(Arc::clone(&self.shared), activation);
        let failed = |source| ActivateError::Worker { device: TAG.to_owned(), source };
        self.running = Some(self.worker.attach(handler).map_err(failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn pause(&mut self) -> Result<(), StateError> {
        let failed = |source| StateError::Io { device: TAG.to_owned(), doing: "pause", source };
        self.running.as_mut().map_or(Ok(()), |running| running.pause().map_err(failed))
    }

    fn resume(&mut self) -> Result<(), StateError> {
        let failed = |source| StateError::Io { device: TAG.to_owned(), doing: "resume", source };
        self.running.as_mut().map_or(Ok(()), |running| running.resume().map_err(failed))
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        let device = || TAG.to_owned();
        let queues = match &self.running {
            None => Vec::new(),
            Some(running) if !running.is_paused() => return Err(StateError::NotPaused { device: device() }),
            Some(running) => running.lock().saved_queues(),
        };
        // The guest's open files are descriptors of the server.
        if self.shared.has_served() {
            let reason = "volumes of the host have been served to the guest".to_owned();
            return Err(StateError::Invalid { device: device(), reason });
        }
        Ok(DeviceState { queues, inner: serde_json::Value::Null })
    }

    fn restore(&mut self, inner: serde_json::Value) -> Result<(), StateError> {
        if inner.is_null() {
            return Ok(());
        }
        let reason = "there is something where nothing is saved".to_owned();
        Err(StateError::Invalid { device: TAG.to_owned(), reason })
    }
}
