//! The driver's side of queues, honest or not: what tests of devices put into guest memory and take out of it.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, GuestMemory, Interrupt, Memory};

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
    kick: EventFd,
    free: Vec<u16>,
    added: u16,
    taken: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, index: u16, size: u16, base: u64) -> Self {
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let free = (0..size).rev().collect();
        Self { memory: memory.clone(), index, size, base, kick, free, added: 0, taken: 0 }
    }

    fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// Where the used ring is.
    pub(crate) fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The queue for the device's activation, with event index.
    pub(crate) fn queue(&self) -> ActiveQueue {
        self.queue_as(true)
    }

    fn queue_as(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used());
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
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
        self.write_descriptor_at(self.base, number, (address, length, flags, next));
    }

    /// Into the table at `table`.
    fn write_descriptor_at(&self, table: u64, number: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = descriptor;
        let at = table + 16 * u64::from(number);
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

/// Where a [`Driver`] puts its rings; buffers go anywhere else.
const RINGS: u64 = 0x1_0000;

/// Guest memory of this many bytes from address 0.
pub(crate) fn memory(bytes: usize) -> Memory {
    Memory::new(GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// A [`Ring`] at a place of its own, whose driver asks one thing after the other and reuses descriptors in turn.
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    pub(crate) interrupt: Interrupt,
    ring: Ring,
    next_descriptor: u16,
}

impl Driver {
    /// Queue number `index` of a device that interrupts by `interrupt`.
    pub(crate) fn new(memory: &Memory, interrupt: &Interrupt, index: u16, size: u16) -> Self {
        let at = RINGS * (u64::from(index) + 1);
        memory.write_slice(&[0; RINGS as usize], GuestAddress(at)).unwrap();
        let ring = Ring::new(memory, index, size, at);
        Self { memory: memory.clone(), interrupt: interrupt.clone(), ring, next_descriptor: 0 }
    }

    /// A device's only queue, and what activates the device with it.
    pub(crate) fn only(memory: &Memory, size: u16, features: u64) -> (Self, Activation) {
        let interrupt = interrupt();
        let driver = Self::new(memory, &interrupt, 0, size);
        let activation = activation(memory, &interrupt, features, std::slice::from_ref(&driver));
        (driver, activation)
    }

    pub(crate) fn queue(&self, event_idx: bool) -> ActiveQueue {
        self.ring.queue_as(event_idx)
    }

    /// Writes one descriptor of the table at `table`.
    pub(crate) fn descriptor_at(&self, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.ring.write_descriptor_at(table, index, descriptor);
    }

    pub(crate) fn descriptor(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.descriptor_at(self.ring.base, index, descriptor);
    }

    /// Makes the chain that begins at a descriptor available and notifies.
    pub(crate) fn offer(&mut self, head: u16) {
        self.offer_silently(head);
        self.ring.kick();
    }

    pub(crate) fn offer_silently(&mut self, head: u16) {
        self.ring.offer(head);
    }

    /// Writes an arbitrary index of the available ring and notifies.
    pub(crate) fn lie(&mut self, index: u16) {
        self.ring.set_available_index(index);
        self.ring.kick();
    }

    /// Writes a chain of buffers `(address, length, flags)` into the table and returns its head.
    pub(crate) fn chain(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        if usize::from(self.next_descriptor) + buffers.len() > usize::from(self.ring.size) {
            self.next_descriptor = 0;
        }
        let head = self.next_descriptor;
        for (i, (address, length, flags)) in buffers.iter().enumerate() {
            let index = head + i as u16;
            let next = if i + 1 < buffers.len() { NEXT } else { 0 };
            self.descriptor(index, (*address, *length, flags | next, index + 1));
        }
        self.next_descriptor = head + buffers.len() as u16;
        head
    }

    /// Sends a chain and waits for it: the bytes that the device says it wrote.
    pub(crate) fn request(&mut self, buffers: &[(u64, u32, u16)]) -> u32 {
        let head = self.chain(buffers);
        self.offer(head);
        let (used, length) = self.wait();
        assert_eq!(used, u32::from(head));
        length
    }

    /// The next chain that came back, if there is one: its head and what was written into it.
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        self.ring.take().map(|(head, length)| (u32::from(head), length))
    }

    /// Waits for the next chain to come back.
    pub(crate) fn wait(&mut self) -> (u32, u32) {
        let mut got = None;
        until("a chain comes back", || {
            got = self.used();
            got.is_some()
        });
        got.unwrap()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

pub(crate) fn interrupt() -> Interrupt {
    Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

/// What activates a device with these queues, in this order.
pub(crate) fn activation(
    memory: &Memory,
    interrupt: &Interrupt,
    features: u64,
    drivers: &[Driver],
) -> Activation {
    let event_idx = features & 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
    let queues = drivers.iter().map(|driver| driver.queue(event_idx)).collect();
    Activation { memory: memory.clone(), features, queues, interrupt: interrupt.clone() }
}

/// Waits until something is so, for at most 20 s.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
