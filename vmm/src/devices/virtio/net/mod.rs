//! virtio-net (virtio 1.2, 5.1): one NIC, between a tap device and a pair of queues.
//!
//! Frames go straight between guest memory and the tap (readv, writev), with the virtio-net header in front, so that
//! checksums and segmentation are left to whoever needs them last: nobody, between pods of a node.
//!
//! * A frame leaves only with the device's own MAC as its source. The headers are copied before they are looked at: what
//!   the guest changes afterwards goes nowhere.
//! * Frames have at most [`MAX_FRAME`] bytes. What the tap has for a guest without buffers stays there, and is dropped
//!   there when its queue is full, as on any wire.
//! * Without a tap the link is down, and what is sent is gone.
//!
//! The MAC, MTU and addresses of the pod are set in the guest by the agent: the driver reads this configuration only once,
//! in a machine that may then be cloned for another pod.

/// The device.
mod device;
/// The queues and the tap, on the worker's thread.
mod pump;
/// Receive buffers of the driver, until frames fill them.
mod stock;
#[cfg(test)]
mod tests;

pub use device::{Net, NetHandle, NetMetrics, Port};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Length of the header before each frame (struct virtio_net_hdr_v1).
pub(crate) const HEADER: usize = 12;
/// Longest frame, without the virtio-net header: 64 KiB of IP in one segment to be cut, with an Ethernet header.
pub const MAX_FRAME: usize = 65_550;
