//! Random numbers for the guest (virtio 1.2, 5.4): those of the host's kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::rand::GetRandomFlags;
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::Bytes;

use super::instant::{self, Answer, InstantDevice, Kind};
use super::{Chain, Memory, VirtioDevice, Worker};

/// Most bytes for one request; the driver is told how many came and asks again.
const MOST: usize = 4096;

/// Most descriptors of a request that are looked at.
const DESCRIPTORS: usize = 64;

/// Bytes that may be had at once, and per second: a guest's kernel wants some hundreds at boot and a few now and then.
/// More would only burn the host's processor.
const BURST: u64 = 64 << 10;
const PER_SECOND: u64 = 1 << 20;

/// The random number device, served on `worker`.
///
/// # Errors
/// No descriptor is left for its timer.
pub fn rng(worker: &Worker) -> io::Result<impl VirtioDevice + use<>> {
    let allowance = Mutex::new(Allowance { left: BURST, at: Instant::now() });
    Ok(InstantDevice::new(Arc::new(Rng { allowance, timer: instant::timer()? }), worker))
}

/// The kind of device that gives random numbers.
struct Rng {
    allowance: Mutex<Allowance>,
    timer: OwnedFd,
}

struct Allowance {
    left: u64,
    at: Instant,
}

impl Allowance {
    /// Takes `bytes` of it, or says when there will be enough.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.at);
        let gained =
            u64::try_from(passed.as_micros()).unwrap_or(u64::MAX).saturating_mul(PER_SECOND) / 1_000_000;
        if gained > 0 {
            self.left = self.left.saturating_add(gained).min(BURST);
            self.at = now;
        }
        if self.left >= bytes {
            self.left -= bytes;
            return Ok(());
        }
        Err(Duration::from_micros((bytes - self.left) * 1_000_000 / PER_SECOND + 1))
    }
}

impl Kind for Rng {
    const NAME: &'static str = "rng";
    const TYPE: u32 = VIRTIO_ID_RNG;
    const QUEUES: &'static [u16] = &[64];

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn timer(&self) -> Option<&OwnedFd> {
        Some(&self.timer)
    }

    fn serve(&self, _: u16, chain: Chain, memory: &Memory) -> Answer {
        let mut bytes = [0; MOST];
        let wanted: usize = chain
            .clone()
            .take(DESCRIPTORS)
            .filter(|descriptor| descriptor.is_write_only())
            .map(|descriptor| descriptor.len() as usize)
            .sum();
        let wanted = wanted.min(MOST);
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(delay) = allowance.take(wanted as u64, Instant::now()) {
            return Answer::Later(delay);
        }
        drop(allowance);
        // Of at most 256 bytes it never gives less; of more perhaps, if a signal comes.
        let got = rustix::rand::getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        let mut done = 0;
        for descriptor in chain.take(DESCRIPTORS).filter(|descriptor| descriptor.is_write_only()) {
            let part = (descriptor.len() as usize).min(got - done);
            if memory.write_slice(&bytes[done..done + part], descriptor.addr()).is_err() {
                break;
            }
            done += part;
        }
        Answer::Done(done as u32)
    }

    fn keep(&self) -> Value {
        Value::Null
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        if kept.is_null() { Ok(()) } else { Err("it keeps nothing".to_owned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{Driver, INDIRECT, NEXT, WRITE, memory};

    const DATA: u64 = 0x10_0000;

    fn rig() -> (impl VirtioDevice, Driver) {
        let worker = Worker::start("rng-test", || Ok(())).unwrap();
        let mut device = rng(&worker).unwrap();
        let (driver, activation) = Driver::only(&memory(0x20_0000), 64, device.features());
        device.activate(activation).unwrap();
        (device, driver)
    }

    #[test]
    fn buffers_are_filled_with_random_bytes_and_never_the_same() {
        let (_device, mut driver) = rig();
        assert_eq!(driver.request(&[(DATA, 64, WRITE), (DATA + 0x100, 32, WRITE)]), 96);
        let first = [driver.read(DATA, 64), driver.read(DATA + 0x100, 32)].concat();
        assert!(first.chunks(8).all(|bytes| bytes != [0; 8]));
        assert_eq!(driver.read(DATA + 64, 8), [0; 8], "not beyond the buffer");
        assert_eq!(driver.request(&[(DATA, 64, WRITE)]), 64);
        assert_ne!(driver.read(DATA, 64), first[..64]);
    }

    #[test]
    fn one_request_gets_at_most_a_page_and_only_where_it_may_be_written() {
        let (_device, mut driver) = rig();
        assert_eq!(driver.request(&[(DATA, 0x8_0000, WRITE)]), 4096);
        assert_eq!(driver.request(&[(DATA, 16, 0)]), 0);
        assert_eq!(driver.request(&[(DATA, 0, WRITE), (DATA, 16, 0), (DATA + 512, 8, WRITE)]), 8);
    }

    #[test]
    fn hostile_chains_come_back() {
        let (_device, mut driver) = rig();
        assert_eq!(driver.request(&[(0x20_0000 - 8, 64, WRITE)]), 0);
        assert_eq!(driver.request(&[(u64::MAX, u32::MAX, WRITE), (DATA, u32::MAX, WRITE)]), 0);
        driver.descriptor(60, (DATA, 1, NEXT | WRITE, 60));
        driver.offer(60);
        assert_eq!(driver.wait(), (60, 64));
        driver.descriptor_at(DATA, 0, (DATA, 16, INDIRECT, 0));
        assert_eq!(driver.request(&[(DATA, 16, INDIRECT)]), 0);
        assert_eq!(driver.request(&[(DATA, 16, WRITE)]), 16);
    }

    #[test]
    fn a_greedy_guest_waits_for_its_allowance_and_then_gets_it() {
        let (_device, mut driver) = rig();
        let start = Instant::now();
        // Burst and then some: a tenth of a second's worth beyond it.
        let requests = (BURST + PER_SECOND / 10) / MOST as u64;
        for _ in 0..requests {
            assert_eq!(driver.request(&[(DATA, MOST as u32, WRITE)]), MOST as u32);
        }
        let took = start.elapsed();
        assert!(took > Duration::from_millis(80), "{took:?}");
    }

    #[test]
    fn an_allowance_grows_with_time_up_to_a_burst() {
        let now = Instant::now();
        let mut allowance = Allowance { left: 0, at: now };
        assert_eq!(allowance.take(PER_SECOND / 1000, now), Err(Duration::from_micros(1000)));
        allowance.take(1048, now + Duration::from_millis(1)).unwrap();
        allowance.take(BURST, now + Duration::from_secs(3600)).unwrap();
        assert!(allowance.take(1, now + Duration::from_secs(3600)).is_err());
    }

    #[test]
    fn a_paused_device_gives_nothing_until_it_is_resumed() {
        let (mut device, mut driver) = rig();
        assert!(device.save().is_err());
        device.pause().unwrap();
        let head = driver.chain(&[(DATA, 16, WRITE)]);
        driver.offer(head);
        std::thread::sleep(Duration::from_millis(20));
        assert!(driver.used().is_none());
        assert_eq!(device.save().unwrap().queues.len(), 1);
        device.resume().unwrap();
        assert_eq!(driver.wait(), (u32::from(head), 16));
        device.reset();
        driver.offer(head);
        std::thread::sleep(Duration::from_millis(20));
        assert!(driver.used().is_none());
    }
}
