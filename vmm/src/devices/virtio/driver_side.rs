//! The driver's side of a queue, for tests: real rings in real guest memory, honest or not.

use std::num::Wrapping;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, GuestMemory, Interrupt, Memory};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where a driver puts its rings; buffers go anywhere else.
const RINGS: u64 = 0x1_0000;

/// Guest memory of this many bytes from address 0.
pub(crate) fn memory(bytes: usize) -> Memory {
    Memory::new(GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// One queue as its driver sees it.
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    pub(crate) interrupt: Interrupt,
    index: u16,
    size: u16,
    at: u64,
    kick: EventFd,
    next_descriptor: u16,
    available: Wrapping<u16>,
    seen: Wrapping<u16>,
}

impl Driver {
    /// Queue number `index` of a device that interrupts by `interrupt`.
    pub(crate) fn new(memory: &Memory, interrupt: &Interrupt, index: u16, size: u16) -> Self {
        let at = RINGS * (u64::from(index) + 1);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (memory, interrupt) = (memory.clone(), interrupt.clone());
        memory.write_slice(&[0; RINGS as usize], GuestAddress(at)).unwrap();
        let (available, seen) = Default::default();
        Self { memory, interrupt, index, size, at, kick, next_descriptor: 0, available, seen }
    }

    /// A device's only queue, and what activates the device with it.
    pub(crate) fn only(memory: &Memory, size: u16, features: u64) -> (Self, Activation) {
        let interrupt = interrupt();
        let driver = Self::new(memory, &interrupt, 0, size);
        let activation = activation(memory, &interrupt, features, std::slice::from_ref(&driver));
        (driver, activation)
    }

    pub(crate) fn queue(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.at as u32), None);
        queue.set_avail_ring_address(Some(self.available_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue::new(self.index, queue, self.kick.try_clone().unwrap())
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.at + 16 * u64::from(self.size)
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.at + 0x8000
    }

    /// Writes one descriptor of the table at `table`.
    pub(crate) fn descriptor_at(&self, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = descriptor;
        let at = table + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub(crate) fn descriptor(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.descriptor_at(self.at, index, descriptor);
    }

    /// Makes the chain that begins at a descriptor available and notifies.
    pub(crate) fn offer(&mut self, head: u16) {
        self.offer_silently(head);
        self.kick.write(1).unwrap();
    }

    pub(crate) fn offer_silently(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available.0 % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available += 1;
        let index = GuestAddress(self.available_ring() + 2);
        self.memory.store(self.available.0, index, std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// Writes an arbitrary index of the available ring and notifies.
    pub(crate) fn lie(&mut self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.available_ring() + 2)).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Writes a chain of buffers `(address, length, flags)` into the table and returns its head.
    pub(crate) fn chain(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        if usize::from(self.next_descriptor) + buffers.len() > usize::from(self.size) {
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
        let index = GuestAddress(self.used_ring() + 2);
        let index: u16 = self.memory.load(index, std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == self.seen.0 {
            return None;
        }
        let element = GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.seen.0 % self.size));
        self.seen += 1;
        // With the event index: tell me of the next.
        let event = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(self.seen.0, GuestAddress(event)).unwrap();
        let element: [u32; 2] = self.memory.read_obj(element).unwrap();
        Some((element[0], element[1]))
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
