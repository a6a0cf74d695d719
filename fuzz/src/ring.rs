//! The driver's side of a queue, for fuzz targets of virtio devices: well-formed chains on request, and the memory is free
//! to be overwritten.

use std::sync::Arc;

use hull_vmm::devices::virtio::{ActiveQueue, Memory, SavedQueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of guest memory.
pub const MEMORY: u64 = 1 << 20;

/// Fresh memory for a machine.
pub fn memory() -> Memory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap())
}

/// A queue at `base`: descriptors, then the available and the used ring, each at a page of its own.
pub struct Ring {
    memory: Memory,
    base: u64,
    size: u16,
    added: u16,
    next: u16,
    pub kick: EventFd,
}

impl Ring {
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        let kick = EventFd::new(libc_nonblock()).unwrap();
        Self { memory: memory.clone(), base, size, added: 0, next: 0, kick }
    }

    pub fn queue(&self, index: u16, event_idx: bool) -> ActiveQueue {
        let saved: SavedQueue = serde_json::from_value(serde_json::json!({
            "max_size": self.size, "size": self.size, "ready": true, "event_idx": event_idx,
            "next_avail": 0, "next_used": 0,
            "descriptors": self.base, "available": self.base + 0x1000, "used": self.base + 0x2000,
        }))
        .unwrap();
        ActiveQueue::new(index, saved.restore(self.size).unwrap(), self.kick.try_clone().unwrap())
    }

    /// A chain of these buffers: address, length, whether the device writes it. Descriptors are used round and round,
    /// also those that are with the device.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) {
        let head = self.next;
        for (number, (address, length, writable)) in buffers.iter().enumerate() {
            let place = self.next;
            self.next = (self.next + 1) % self.size;
            let more = number + 1 < buffers.len();
            let flags = u16::from(more) | if *writable { 2 } else { 0 };
            self.write_descriptor(place, *address, *length, flags, self.next);
        }
        self.offer(head);
    }

    pub fn write_descriptor(&self, place: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(16 * u64::from(place % self.size), &bytes);
    }

    pub fn offer(&mut self, head: u16) {
        self.write(0x1004 + 2 * u64::from(self.added % self.size), &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        self.write(0x1002, &self.added.to_le_bytes());
    }

    pub fn kick(&self) {
        let _ = self.kick.write(1);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(self.base + offset));
    }
}

/// EFD_NONBLOCK.
fn libc_nonblock() -> i32 {
    0o4000
}

/// The bytes of an input, taken from the front; zeros when there are none left.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (now, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(now);
        self.0 = rest;
        bytes
    }

    pub fn u8(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// A small number mostly, any number sometimes.
    pub fn number(&mut self) -> u32 {
        match self.u8() {
            255 => self.u32(),
            254 => self.u16().into(),
            small => small.into(),
        }
    }
}
