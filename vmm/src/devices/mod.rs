//! The devices of a machine. The set is fixed: what differs between pods is poured in through these.

/// Where the guest's serial console goes.
pub mod console;
/// Devices on I/O ports.
pub mod legacy;
/// Virtio 1.2 devices: what they share, and one module for each.
pub mod virtio;
