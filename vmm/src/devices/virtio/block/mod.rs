//! Block devices (virtio 1.2, 5.2): the images disk, the scratch disk and the slots for raw volumes.
//!
//! One [`BlockDevice`] serves them all; they differ in what is behind it. A request is taken out of its chain and checked
//! once (`request`), carried out (`service`) straight between guest memory and a file (`guest_buffers`), by one of the
//! threads of its group (`threads`). Images have a group of their own: a cold layer must not delay a write.

/// What devices count.
mod counters;
/// The virtio device.
mod device;
/// What operators hear of.
mod faults;
/// Data buffers in guest memory, and the system calls that fill them.
mod guest_buffers;
/// The images disk.
mod images;
/// What requests use and others may take away.
mod leased;
/// Numbers and layouts of the specification.
mod protocol;
/// Where the scratch disk can be written.
mod ranges;
/// A file that is a disk.
mod raw_file;
/// A request, checked.
mod request;
/// The scratch disk.
mod scratch;
/// The serving of a queue.
mod service;
/// Slots for raw volumes.
mod slot;
/// What is behind a device.
mod storage;
/// The threads of a group of devices.
mod threads;

pub use counters::BlockStats;
pub use device::BlockDevice;
pub use faults::OnFault;
pub use images::{Extent, IMAGES_BLOCK, IMAGES_CAPACITY, ImagesError, ImagesHandle, images};
pub use ranges::RangeError;
pub use scratch::{ScratchError, ScratchHandle, scratch};
pub use slot::{SlotError, SlotHandle, slot};
pub use threads::{BlockThreads, Confine};

#[cfg(test)]
mod tests;
