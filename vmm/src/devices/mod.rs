//! The devices of a machine. The set is fixed: what differs between pods is poured in through these.

/// Virtio 1.2 devices: what they share, and one module for each.
pub mod virtio;
