//! The virtual machine monitor of microVM pods: one process per pod, a fixed device set, confined.
//!
//! Every pod's machine is the same: what differs is poured in through devices that it was born with. The guest, with all
//! that it writes into memory, queues and registers, is hostile.
#![deny(unsafe_code)]

/// x86-64.
#[cfg(feature = "machine")]
pub mod arch;
/// Volumes from the host, attached to hull-virtiofsd by hulld.
pub mod attach;
/// Kernel, initramfs and command line in guest memory.
#[cfg(feature = "machine")]
pub mod boot;
/// Where accesses of the guest go.
#[cfg(feature = "machine")]
pub mod bus;
/// The control socket: hulld's requests to a machine.
#[cfg(feature = "machine")]
pub mod control;
/// The devices of a machine.
#[cfg(feature = "machine")]
pub mod devices;
/// How hull-vmm and hull-virtiofsd are confined.
#[cfg(feature = "machine")]
pub mod jail;
/// The log files of the guest's containers.
#[cfg(feature = "machine")]
pub mod logs;
/// A machine, put together.
#[cfg(feature = "machine")]
pub mod machine;
/// The guest's memory.
#[cfg(feature = "machine")]
pub mod memory;
/// Whether this host can run machines at all.
pub mod probe;
/// The control protocol, between hulld, hull-vmm and hull-virtiofsd.
pub mod protocol;
/// Virtual processors and their threads.
#[cfg(feature = "machine")]
pub mod vcpu;
/// hull-virtiofsd, the server of volumes.
#[cfg(feature = "virtiofs")]
pub mod volumes;
