//! How requests are served: several at once, paused, saved, restored.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use serde_json::Value;

use super::super::device::Kept;
use super::super::guest_buffers::{GuestBuffers, Patience};
use super::super::protocol::Traits;
use super::super::request::Range;
use super::super::storage::Storage;
use super::*;
use crate::devices::virtio::driver::until;

/// A disk whose odd sectors are on a slow medium: reading them waits until the gate is open.
#[derive(Default)]
struct Slow {
    gate: Mutex<bool>,
    opened: Condvar,
    asked: AtomicBool,
}

impl Slow {
    fn open(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Storage for Slow {
    fn capacity(&self) -> u64 {
        1 << 20
    }

    fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        if !(at / 512).is_multiple_of(2) {
            if patience == Patience::None {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.asked.store(true, Ordering::SeqCst);
            let mut gate = self.gate.lock().unwrap();
            while !*gate {
                gate = self.opened.wait(gate).unwrap();
            }
        }
        into.zero(u64::MAX);
        Ok(())
    }

    fn write(&self, _: u64, _: &mut GuestBuffers) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: &Range) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: &Range) -> io::Result<()> {
        Ok(())
    }
}

impl Kept for Slow {
    fn keep(&self) -> Value {
        Value::Null
    }

    fn take_over(&self, _: Value) -> Result<(), String> {
        Ok(())
    }
}

/// Opens the gate in the end, also of a test that fails: a device cannot be dropped while its disk is waited for.
struct Opener(Arc<Slow>);

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl std::ops::Deref for Opener {
    type Target = Arc<Slow>;

    fn deref(&self) -> &Arc<Slow> {
        &self.0
    }
}

/// The disk is dropped before the rig.
fn slow() -> (Rig, Opener) {
    let traits = Traits { queue_size: 64, block_size: 512, read_only: false, flush: true, discard: None };
    let disk = Arc::new(Slow::default());
    (Rig::new(BlockDevice::new("slow", traits, &disk, &threads(), no_faults())), Opener(disk))
}

/// Offers a read of one sector with a header and status of its own.
fn offer_read(rig: &mut Rig, number: u64, sector: u64) -> u16 {
    let header = HEADER + 0x100 * number;
    rig.driver.write(header, &[[0; 8], sector.to_le_bytes()].concat());
    let (data, status) = (DATA + 512 * number, header + 32);
    let head = rig.driver.chain(&[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    rig.driver.offer(head);
    head
}

#[test]
fn a_read_that_waits_for_the_disk_delays_no_other() {
    let (mut rig, disk) = slow();
    let waiting = [offer_read(&mut rig, 0, 1), offer_read(&mut rig, 1, 3)];
    until("both wait", || rig.device.stats().waited == 2);
    // Two of three threads wait; all that comes now is served by the third, writes too.
    for _ in 0..100 {
        assert_eq!(rig.read(2, 512).0, OK);
        assert_eq!(rig.write(1, &[1; 512]), OK);
    }
    assert_eq!(rig.device.stats().waited, 2);
    assert!(rig.driver.used().is_none());
    disk.open();
    let mut heads = [rig.driver.wait().0, rig.driver.wait().0].map(|head| head as u16);
    heads.sort_unstable();
    assert_eq!(heads, waiting);
}

#[test]
fn requests_beyond_the_threads_stay_in_the_ring_and_are_served_in_the_end() {
    let (mut rig, disk) = slow();
    for number in 0..16 {
        offer_read(&mut rig, number, 1);
    }
    until("all threads wait", || rig.device.stats().waited == 3);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.device.stats().waited, 3);
    disk.open();
    for _ in 0..16 {
        rig.driver.wait();
    }
}

#[test]
fn a_pause_waits_for_what_is_under_way_and_takes_nothing_new() {
    let (mut rig, disk) = slow();
    offer_read(&mut rig, 0, 1);
    until("it is being read", || disk.asked.load(Ordering::SeqCst));
    let opener = std::thread::spawn({
        let disk = Arc::clone(&disk);
        move || {
            std::thread::sleep(Duration::from_millis(50));
            disk.open();
        }
    });
    assert!(rig.device.save().is_err(), "not while it serves");
    rig.device.pause().unwrap();
    assert!(rig.driver.used().is_some(), "it was drained, not dropped");
    offer_read(&mut rig, 1, 2);
    std::thread::sleep(Duration::from_millis(30));
    assert!(rig.driver.used().is_none(), "paused");
    rig.device.save().unwrap();
    rig.device.resume().unwrap();
    rig.driver.wait();
    opener.join().unwrap();
}

#[test]
fn a_saved_device_goes_on_elsewhere_with_what_was_in_its_queue() {
    let file = temporary_file(&pattern(1 << 20));
    let make = |file: File| {
        let (device, handle) = scratch(file, 1 << 20, &threads(), no_faults()).unwrap();
        handle.open(0, 1 << 20).unwrap();
        device
    };
    let mut rig = Rig::new(make(file.try_clone().unwrap()));
    for sector in 0..5 {
        assert_eq!(rig.read(sector, 512).0, OK);
    }
    rig.device.pause().unwrap();
    offer_read(&mut rig, 0, 9);
    let state = rig.device.save().unwrap();
    let state: crate::devices::virtio::DeviceState =
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();

    let mut other = make(file);
    other.restore(state.inner.clone()).unwrap();
    let queue = state.queues[0].restore(other.queue_sizes()[0]).unwrap();
    let mut activation = crate::devices::virtio::driver::activation(
        &rig.driver.memory,
        &rig.driver.interrupt,
        other.features(),
        std::slice::from_ref(&rig.driver),
    );
    let kick = activation.queues.remove(0).kick;
    activation.queues.push(crate::devices::virtio::ActiveQueue::new(0, queue, kick));
    drop(rig.device);
    other.activate(activation).unwrap();
    let mut rig = Rig { device: other, driver: rig.driver };
    rig.driver.wait();
    assert_eq!(rig.driver.read(DATA, 512), pattern(1 << 20)[9 * 512..10 * 512]);
    assert_eq!(rig.read(3, 512).1, pattern(1 << 20)[3 * 512..4 * 512]);

    let smaller = scratch(temporary_file(&[]), 1 << 19, &threads(), no_faults()).unwrap().0;
    let mut smaller = smaller;
    assert!(smaller.restore(state.inner).unwrap_err().to_string().contains("capacity"));
}

#[test]
fn a_reset_device_leaves_memory_alone_and_can_be_activated_again() {
    let (mut rig, disk) = slow();
    offer_read(&mut rig, 0, 1);
    until("it is being read", || disk.asked.load(Ordering::SeqCst));
    let opener = std::thread::spawn({
        let disk = Arc::clone(&disk);
        move || {
            std::thread::sleep(Duration::from_millis(50));
            disk.open();
        }
    });
    rig.device.reset();
    opener.join().unwrap();
    rig.device.reset();
    offer_read(&mut rig, 1, 2);
    std::thread::sleep(Duration::from_millis(20));
    rig.driver.used();
    assert!(rig.driver.used().is_none());
    let mut rig = Rig::new(rig.device);
    assert_eq!(rig.read(0, 512).0, OK);
}

#[test]
fn thousands_of_requests_at_once_are_all_served_and_interrupts_are_few() {
    let (device, handle) =
        scratch(temporary_file(&pattern(1 << 20)), 1 << 20, &threads(), no_faults()).unwrap();
    handle.open(0, 1 << 20).unwrap();
    let mut rig = Rig::new(device);
    let (mut offered, mut seen) = (0, 0);
    while seen < 5000 {
        while offered < 5000 && offered - seen < 40 {
            // 40 chains of three descriptors fit into the table of 128.
            let number = offered % 40;
            offer_read(&mut rig, number, offered % 2048);
            offered += 1;
        }
        if let Some((_, length)) = rig.driver.used() {
            assert_eq!(length, 513);
            seen += 1;
        }
    }
    assert_eq!(rig.device.stats().reads, 5000);
    assert!(rig.driver.used().is_none());
    // An interrupt for each would be 5000; the event index and batches make them fewer.
    let interrupts = rig.driver.interrupt.event().unwrap().read().unwrap();
    assert!(interrupts < 5000, "{interrupts}");
}
