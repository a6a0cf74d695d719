use super::*;
use crate::devices::virtio::driver::{Driver, INDIRECT, NEXT, WRITE};
use crate::devices::virtio::release::tests::{allocated, shared_memory};

const START: u64 = 64 << 20;
const REGION: u64 = 16 << 20;
const REQUEST_AT: u64 = 0x8_0000;
const ANSWER_AT: u64 = 0x8_1000;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

struct Rig {
    device: Box<dyn VirtioDevice>,
    handle: MemHandle,
    driver: Driver,
    file: std::fs::File,
}

fn rig() -> Rig {
    let (memory, file) = shared_memory(&[(0, 2 << 20), (START, REGION as usize)]);
    let worker = Worker::start("mem-test", || Ok(())).unwrap();
    let (mut device, handle) = mem(START, REGION, &worker).unwrap();
    let (driver, activation) = Driver::only(&memory, 16, device.features());
    device.activate(activation).unwrap();
    Rig { device: Box::new(device), handle, driver, file }
}

impl Rig {
    fn prepare(&self, kind: u16, address: u64, count: u16) {
        let mut request = [0; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.driver.write(REQUEST_AT, &request);
        self.driver.write(ANSWER_AT, &[0xff; 16]);
    }

    fn request(&mut self, kind: u16, address: u64, count: u16) -> u16 {
        self.prepare(kind, address, count);
        assert_eq!(self.driver.request(&[(REQUEST_AT, 24, 0), (ANSWER_AT, 10, WRITE)]), 10);
        let answer = self.driver.read(ANSWER_AT, 2);
        u16::from_le_bytes([answer[0], answer[1]])
    }

    fn state(&mut self, address: u64, count: u16) -> Option<u8> {
        (self.request(STATE, address, count) == ACK).then(|| self.driver.read(ANSWER_AT + 8, 1)[0])
    }

    fn config(&self) -> Vec<u64> {
        let mut bytes = [0xff; 56];
        self.device.read_config(0, &mut bytes);
        bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

#[test]
fn the_guest_plugs_what_it_was_asked_to_and_no_more() {
    let mut rig = rig();
    assert_eq!(rig.config(), [BLOCK, 0, START, REGION, REGION, 0, 0]);
    assert_eq!(rig.request(PLUG, START, 1), NACK);
    rig.handle.resize(3 * BLOCK).unwrap();
    assert_eq!(rig.driver.interrupt.pending() & 2, 2);
    assert_eq!(rig.request(PLUG, START + BLOCK, 2), ACK);
    assert_eq!(rig.request(PLUG, START + 4 * BLOCK, 2), NACK);
    assert_eq!(rig.request(PLUG, START + 4 * BLOCK, 1), ACK);
    assert_eq!((rig.handle.plugged(), rig.handle.requested()), (3 * BLOCK, 3 * BLOCK));
    assert_eq!(rig.config()[5..], [3 * BLOCK, 3 * BLOCK]);
    let states = [(0, 1, 1), (1, 2, 0), (0, 2, 2), (4, 1, 0), (5, 3, 1), (1, 4, 2)];
    for (block, count, state) in states {
        assert_eq!(rig.state(START + block * BLOCK, count), Some(state), "{block}");
    }
}

#[test]
fn unplugged_memory_leaves_the_host() {
    let mut rig = rig();
    rig.handle.resize(REGION).unwrap();
    assert_eq!(rig.request(PLUG, START, 8), ACK);
    let before = allocated(&rig.file);
    rig.driver.write(START, &vec![7; 8 << 20]);
    assert_eq!(allocated(&rig.file) - before, 8 << 20);
    rig.handle.resize(0).unwrap();
    assert_eq!(rig.request(UNPLUG, START + BLOCK, 2), ACK);
    assert_eq!(allocated(&rig.file) - before, 4 << 20);
    assert_eq!(rig.driver.read(START, 1), [7]);
    assert_eq!(rig.request(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((allocated(&rig.file), rig.handle.plugged()), (before, 0));
    assert_eq!(rig.request(UNPLUG_ALL, 0, 0), ACK);
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut rig = rig();
    rig.handle.resize(REGION).unwrap();
    assert_eq!(rig.request(PLUG, START, 1), ACK);
    for (what, kind, address, count) in [
        ("plugged already", PLUG, START, 1),
        ("plugged in part", PLUG, START, 2),
        ("unplugged already", UNPLUG, START + BLOCK, 1),
        ("unplugged in part", UNPLUG, START, 2),
        ("not aligned", PLUG, START + 4096, 1),
        ("below the region", PLUG, START - BLOCK, 1),
        ("above it", PLUG, START + REGION, 1),
        ("across its end", PLUG, START + REGION - BLOCK, 2),
        ("more than there are", PLUG, START, u16::MAX),
        ("nothing", PLUG, START + BLOCK, 0),
        ("an overflow", STATE, u64::MAX - BLOCK + 1, 1),
        ("an address of the machine's birth", UNPLUG, 0, 1),
        ("an unknown type", 4, START, 1),
        ("another", u16::MAX, START, 1),
    ] {
        assert_eq!(rig.request(kind, address, count), ERROR, "{what}");
    }
    assert_eq!(rig.handle.plugged(), BLOCK);
}

#[test]
fn hostile_chains_come_back_and_plug_nothing() {
    let mut rig = rig();
    rig.handle.resize(REGION).unwrap();
    rig.prepare(PLUG, START, 1);
    let (request, answer) = ((REQUEST_AT, 24, 0), (ANSWER_AT, 10, WRITE));
    let driver = &mut rig.driver;
    assert_eq!(driver.request(&[request]), 0);
    assert_eq!(driver.request(&[request, (ANSWER_AT, 9, WRITE)]), 0);
    assert_eq!(driver.request(&[(u64::MAX, 24, 0), answer]), 0);
    driver.descriptor(15, (REQUEST_AT, 24, NEXT, 15));
    driver.offer(15);
    assert_eq!(driver.wait(), (15, 0));
    driver.descriptor_at(ANSWER_AT, 0, (ANSWER_AT, 16, INDIRECT, 0));
    assert_eq!(driver.request(&[(ANSWER_AT, 16, INDIRECT)]), 0);
    assert_eq!(rig.handle.plugged(), 0);
    let driver = &mut rig.driver;
    assert_eq!(driver.request(&[(REQUEST_AT, 23, 0), answer]), 10);
    assert_eq!(driver.read(ANSWER_AT, 1), [ERROR as u8]);
    assert_eq!(rig.handle.plugged(), 0);
    // In pieces it is fine.
    let pieces =
        [(REQUEST_AT, 5, 0), (REQUEST_AT + 5, 19, 0), (ANSWER_AT, 3, WRITE), (ANSWER_AT + 3, 7, WRITE)];
    assert_eq!(rig.driver.request(&pieces), 10);
    assert_eq!(rig.handle.plugged(), BLOCK);
}

#[test]
fn a_resize_beyond_the_region_or_by_no_whole_blocks_is_refused() {
    let rig = rig();
    for bytes in [1, BLOCK + 4096, REGION + BLOCK, u64::MAX] {
        assert!(rig.handle.resize(bytes).is_err(), "{bytes}");
    }
    assert_eq!((rig.handle.requested(), rig.handle.most()), (0, REGION));
    assert_eq!(rig.driver.interrupt.pending() & 2, 0);
}

#[test]
fn a_region_that_cannot_be_is_refused() {
    let worker = Worker::start("mem-test", || Ok(())).unwrap();
    for (start, length) in [(4096, BLOCK), (BLOCK, 4096), (u64::MAX - BLOCK + 1, BLOCK), (0, 16 << 40)] {
        assert!(mem(start, length, &worker).is_err(), "{start:#x} {length:#x}");
    }
    assert!(mem(BLOCK, 0, &worker).is_ok());
}

#[test]
fn what_was_plugged_is_so_after_a_reset_and_after_a_restore() {
    let mut rig = rig();
    rig.handle.resize(5 * BLOCK).unwrap();
    assert_eq!(rig.request(PLUG, START + BLOCK, 2), ACK);
    assert_eq!(rig.request(PLUG, START + 6 * BLOCK, 2), ACK);
    rig.device.reset();
    assert_eq!(rig.handle.plugged(), 4 * BLOCK);
    let state = rig.device.save().unwrap();
    let worker = Worker::start("mem-test", || Ok(())).unwrap();
    let (mut device, handle) = mem(START, REGION, &worker).unwrap();
    device.restore(state.inner.clone()).unwrap();
    assert_eq!((handle.plugged(), handle.requested()), (4 * BLOCK, 5 * BLOCK));
    let (driver, activation) = Driver::only(&rig.driver.memory, 16, device.features());
    device.activate(activation).unwrap();
    let mut rig = Rig { device: Box::new(device), handle, driver, file: rig.file };
    assert_eq!(rig.state(START + 6 * BLOCK, 2), Some(0));
    assert_eq!(rig.state(START + 3 * BLOCK, 3), Some(1));

    for (key, value) in [
        ("start", json!(0)),
        ("length", json!(BLOCK)),
        ("requested", json!(1)),
        ("requested", json!(REGION + BLOCK)),
        ("plugged", json!([[0, 9]])),
        ("plugged", json!([[0, 2], [1, 1]])),
        ("plugged", json!([[u64::MAX, 2]])),
        ("plugged", json!([[0, 0]])),
    ] {
        let mut hostile = state.inner.clone();
        hostile[key] = value.clone();
        assert!(rig.device.restore(hostile).is_err(), "{key} {value}");
    }
}
