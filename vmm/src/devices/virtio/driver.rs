//! The driver's side of queues: what tests of devices put into guest memory and take out of it.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Memory};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) length: u32,
    /// The device writes it.
    pub(crate) writable: bool,
}

/// A queue as its driver sees it: the descriptor table at `base`, then the rings.
pub(crate) struct Ring {
    memory: Memory,
    index: u16,
    size: u16,
    base: u64,
    event_idx: bool,
    kick: EventFd,
    free: Vec<u16>,
    added: u16,
    taken: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, index: u16, size: u16, base: u64) -> Self {
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let free = (0..size).rev().collect();
        Self { memory: memory.clone(), index, size, base, event_idx: true, kick, free, added: 0, taken: 0 }
    }

    fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The queue for the device's activation.
    pub(crate) fn queue(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used());
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue::new(self.index, queue, self.kick.try_clone().unwrap())
    }

    /// Where a restored queue gets its kicks from.
    pub(crate) fn kick_event(&self) -> EventFd {
        self.kick.try_clone().unwrap()
    }

    /// Tells the device.
    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Number of free descriptors.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// The descriptor that the next buffer gets.
    pub(crate) fn next_free(&self) -> u16 {
        *self.free.last().expect("a free descriptor")
    }

    pub(crate) fn write_descriptor(&self, number: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(number);
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &length.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Makes a chain available; returns its head.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let numbers: Vec<u16> = buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (place, (number, buffer)) in numbers.iter().zip(buffers).enumerate() {
            let next = numbers.get(place + 1);
            let flags = if next.is_some() { NEXT } else { 0 } | if buffer.writable { WRITE } else { 0 };
            self.write_descriptor(*number, buffer.address, buffer.length, flags, next.copied().unwrap_or(0));
        }
        self.offer(numbers[0]);
        numbers[0]
    }

    /// Makes whatever begins at this descriptor available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.write(self.available() + 4 + 2 * u64::from(self.added % self.size), &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        self.set_available_index(self.added);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        fence(Ordering::SeqCst);
        self.write(self.available() + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// The next chain that the device has given back: its head, and what was written. Its descriptors are free again.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        fence(Ordering::SeqCst);
        if index == self.taken {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.taken % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.taken = self.taken.wrapping_add(1);
        // Interrupts are wanted for each.
        self.write(self.available() + 4 + 2 * u64::from(self.size), &self.taken.to_le_bytes());
        let mut number = head as u16;
        loop {
            self.free.push(number);
            let at = self.base + 16 * u64::from(number);
            let flags: u16 = self.memory.read_obj(GuestAddress(at + 12)).unwrap();
            if flags & NEXT == 0 || self.free.len() >= usize::from(self.size) {
                break;
            }
            number = self.memory.read_obj(GuestAddress(at + 14)).unwrap();
        }
        Some((head as u16, length))
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}
