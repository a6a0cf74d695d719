//! The virtual machine monitor of microVM pods: one process per pod, a fixed device set, confined.
//!
//! Every pod's machine is the same: what differs is poured in through devices that it was born with. The guest, with all
//! that it writes into memory, queues and registers, is hostile.
#![deny(unsafe_code)]

/// The devices of a machine.
#[cfg(feature = "machine")]
pub mod devices;
/// The control protocol, between hulld, hull-vmm and hull-virtiofsd.
pub mod protocol;
