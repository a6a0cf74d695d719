use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{TimerfdClockId, TimerfdFlags};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::pump::Pump;
use super::streams::{Services, Streams};
use super::{GUEST_CID, Service};
use crate::devices::virtio::{
    ActivateError, Activation, Attached, DeviceState, StateError, VirtioDevice, Worker,
};

const NAME: &str = "vsock";
/// rx, tx, event. Linux keeps the first one full of 4 KiB buffers: half a mebibyte of the guest's memory.
const QUEUES: [u16; 3] = [128, 128, 8];

/// The device. See the [module](super).
pub struct Vsock {
    worker: Worker,
    listener: Arc<OwnedFd>,
    /// Made here: whoever activates the device is confined and makes no descriptors.
    timer: Arc<OwnedFd>,
    services: Services,
    metrics: Arc<Shared>,
    /// What the driver must be told first, of a machine that was restored.
    reset: Reset,
    running: Option<Attached<Pump>>,
}

/// Where telling the driver of a transport reset stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reset {
    /// Nothing to tell.
    #[default]
    None,
    /// There was no buffer for the event yet.
    Due,
    /// The event is on its way; when it is taken, the driver gives its buffer back to the queue, which then has more
    /// than this many.
    Sent(u16),
}

#[derive(Serialize, Deserialize)]
struct State {
    reset: Reset,
}

/// Counts since the machine's birth, and what is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VsockMetrics {
    /// Streams now.
    pub streams: u64,
    /// Streams opened, by either side.
    pub opened: u64,
    /// Requests of the guest that were refused.
    pub refused: u64,
    /// Streams that were reset because the guest broke the protocol.
    pub violations: u64,
    /// Bytes to the guest.
    pub to_guest: u64,
    /// Bytes from the guest.
    pub from_guest: u64,
    /// Bytes from the guest that wait now for hosts to read.
    pub waiting: u64,
}

/// What the worker tells of itself, each in its place of [`VsockMetrics`].
#[derive(Debug, Default)]
pub(super) struct Shared([AtomicU64; 7]);

impl Shared {
    pub(super) fn store(&self, streams: &Streams) {
        let counts = streams.counts;
        let values = [
            streams.len() as u64,
            counts.opened,
            counts.refused,
            counts.violations,
            counts.to_guest,
            counts.from_guest,
            streams.waiting() as u64,
        ];
        for (place, value) in self.0.iter().zip(values) {
            place.store(value, Ordering::Relaxed);
        }
    }
}

/// What can be asked of the device while it runs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct VsockHandle {
    metrics: Arc<Shared>,
}

impl VsockHandle {
    /// What has passed so far.
    #[must_use]
    pub fn metrics(&self) -> VsockMetrics {
        let [streams, opened, refused, violations, to_guest, from_guest, waiting] = [0, 1, 2, 3, 4, 5, 6]
            .map(|place: usize| self.metrics.0.get(place).map_or(0, |value| value.load(Ordering::Relaxed)));
        VsockMetrics { streams, opened, refused, violations, to_guest, from_guest, waiting }
    }
}

impl Vsock {
    /// A device that takes connections from `listener` (a listening unix stream socket) and answers the guest at the
    /// ports of `services`, served on `worker`'s thread.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(
        worker: Worker,
        listener: OwnedFd,
        services: BTreeMap<u32, Arc<dyn Service>>,
    ) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self {
            worker,
            listener: Arc::new(listener),
            timer: Arc::new(timer),
            services,
            metrics: Arc::default(),
            reset: Reset::None,
            running: None,
        })
    }

    /// For questions while it runs.
    #[must_use]
    pub fn handle(&self) -> VsockHandle {
        VsockHandle { metrics: self.metrics.clone() }
    }

    fn failed(doing: &'static str) -> impl Fn(io::Error) -> StateError {
        move |source| StateError::Io { device: NAME.to_owned(), doing, source }
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        NAME
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_vsock_config: le64 guest_cid.
        let config = GUEST_CID.to_le_bytes();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let worker_failed = |source| ActivateError::Worker { device: NAME.to_owned(), source };
        let streams = Streams::new(GUEST_CID, self.services.clone());
        let reset = std::mem::take(&mut self.reset);
        let pump = Pump::new(
            activation,
            (self.listener.clone(), self.timer.clone()),
            streams,
            reset,
            self.metrics.clone(),
        )
        .map_err(worker_failed)?;
        self.running = Some(self.worker.attach(pump).map_err(worker_failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn pause(&mut self) -> Result<(), StateError> {
        self.running.as_mut().map_or(Ok(()), |running| running.pause().map_err(Self::failed("pause")))
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.running.as_mut().map_or(Ok(()), |running| running.resume().map_err(Self::failed("resume")))
    }

    /// Ends all streams, also for the machine that is saved.
    fn save(&mut self) -> Result<DeviceState, StateError> {
        let Some(running) = &self.running else {
            return Ok(DeviceState { queues: Vec::new(), inner: serde_json::Value::Null });
        };
        if !running.is_paused() {
            return Err(StateError::NotPaused { device: NAME.to_owned() });
        }
        let mut pump = running.lock();
        let reset = pump.reset_transport();
        let inner = serde_json::to_value(State { reset })
            .map_err(|error| StateError::Invalid { device: NAME.to_owned(), reason: error.to_string() })?;
        Ok(DeviceState { queues: pump.save_queues(), inner })
    }

    fn restore(&mut self, inner: serde_json::Value) -> Result<(), StateError> {
        if inner.is_null() {
            return Ok(());
        }
        let state: State = serde_json::from_value(inner)
            .map_err(|error| StateError::Invalid { device: NAME.to_owned(), reason: error.to_string() })?;
        self.reset = state.reset;
        Ok(())
    }
}
