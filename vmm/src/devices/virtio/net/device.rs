use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::Mac;
use super::pump::Pump;
use crate::devices::virtio::{
    ActivateError, Activation, Attached, DeviceState, StateError, VirtioDevice, Worker,
};

const NAME: &str = "net";
/// receiveq, transmitq.
const QUEUES: [u16; 2] = [256, 256];
/// The least and the most that Linux and the specification take (virtio 1.2, 5.1.4.1).
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_535;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the NIC is plugged into.
#[derive(Debug)]
pub struct Port {
    /// A tap device with virtio-net headers (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR); `None`: the link is down.
    pub tap: Option<OwnedFd>,
    /// The only source address that may leave.
    pub mac: Mac,
    /// Longest IP packet, 68 to 65535 bytes.
    pub mtu: u32,
}

/// The device. See the [module](super).
pub struct Net {
    worker: Worker,
    tap: Option<Arc<OwnedFd>>,
    mtu: u16,
    shared: Arc<Shared>,
    running: Option<Attached<Pump>>,
}

/// What the worker, the configuration space and the control share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The MAC, its first byte lowest.
    mac: AtomicU64,
    pub(super) to_guest: Count,
    pub(super) from_guest: Count,
    pub(super) dropped_to_guest: AtomicU64,
    pub(super) dropped_from_guest: AtomicU64,
    pub(super) spoofed: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct Count {
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Count {
    pub(super) fn add(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn mac(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        [a, b, c, d, e, f]
    }

    fn set_mac(&self, [a, b, c, d, e, f]: Mac) {
        self.mac.store(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), Ordering::Relaxed);
    }
}

/// Counts since the machine's birth. Frames of 64 KiB that are cut later count once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetMetrics {
    /// Frames to the guest.
    pub frames_to_guest: u64,
    /// Bytes to the guest, with Ethernet headers.
    pub bytes_to_guest: u64,
    /// Frames from the guest that left.
    pub frames_from_guest: u64,
    /// Bytes from the guest that left, with Ethernet headers.
    pub bytes_from_guest: u64,
    /// Frames that did not fit the guest's buffers.
    pub dropped_to_guest: u64,
    /// Frames of the guest that were malformed, that the tap refused, or that had no tap to go to.
    pub dropped_from_guest: u64,
    /// Frames of the guest with somebody else's MAC as their source.
    pub spoofed: u64,
}

/// What can be asked and changed while the device runs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// What has passed so far.
    #[must_use]
    pub fn metrics(&self) -> NetMetrics {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let shared = &self.shared;
        NetMetrics {
            frames_to_guest: read(&shared.to_guest.frames),
            bytes_to_guest: read(&shared.to_guest.bytes),
            frames_from_guest: read(&shared.from_guest.frames),
            bytes_from_guest: read(&shared.from_guest.bytes),
            dropped_to_guest: read(&shared.dropped_to_guest),
            dropped_from_guest: read(&shared.dropped_from_guest),
            spoofed: read(&shared.spoofed),
        }
    }

    /// From now on this is the only source address that may leave (a clone gets its pod's).
    pub fn set_mac(&self, mac: Mac) {
        self.shared.set_mac(mac);
    }
}

impl Net {
    /// A NIC plugged into `port`, served on `worker`'s thread.
    ///
    /// # Errors
    /// An MTU or a MAC that is none, or the tap cannot be made non-blocking.
    pub fn new(worker: Worker, port: Port) -> io::Result<Self> {
        let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let mtu = u16::try_from(port.mtu).ok().filter(|mtu| MTUS.contains(&u32::from(*mtu)));
        let mtu = mtu.ok_or_else(|| invalid("the MTU of a NIC is between 68 and 65535"))?;
        if port.mac[0] & 1 != 0 || port.mac == [0; 6] {
            return Err(invalid("the MAC of a NIC is one of one station"));
        }
        if let Some(tap) = &port.tap {
            rustix::io::ioctl_fionbio(tap, true)?;
        }
        let shared = Shared::default();
        shared.set_mac(port.mac);
        Ok(Self { worker, tap: port.tap.map(Arc::new), mtu, shared: Arc::new(shared), running: None })
    }

    /// For questions while it runs.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle { shared: self.shared.clone() }
    }

    fn failed(doing: &'static str) -> impl Fn(io::Error) -> StateError {
        move |source| StateError::Io { device: NAME.to_owned(), doing, source }
    }

    /// struct virtio_net_config: mac, le16 status, le16 max_virtqueue_pairs, le16 mtu.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.shared.mac());
        let status = if self.tap.is_some() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        NAME
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// The same with and without a tap: all machines are alike.
    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let failed = |source| ActivateError::Worker { device: NAME.to_owned(), source };
        let pump = Pump::new(activation, self.tap.clone(), self.mtu, self.shared.clone()).map_err(failed)?;
        self.running = Some(self.worker.attach(pump).map_err(failed)?);
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

    fn save(&mut self) -> Result<DeviceState, StateError> {
        let queues = match &self.running {
            None => Vec::new(),
            Some(running) if running.is_paused() => running.lock().save_queues(),
            Some(_) => return Err(StateError::NotPaused { device: NAME.to_owned() }),
        };
        // MAC, MTU and tap are the host's: a clone is given its own.
        Ok(DeviceState { queues, inner: serde_json::Value::Null })
    }

    fn restore(&mut self, inner: serde_json::Value) -> Result<(), StateError> {
        if inner.is_null() {
            return Ok(());
        }
        let reason = "nothing was saved of it but its queues".to_owned();
        Err(StateError::Invalid { device: NAME.to_owned(), reason })
    }
}
