use super::*;
use crate::devices::virtio::driver::{Driver, INDIRECT, NEXT, WRITE, activation, interrupt, until};
use crate::devices::virtio::release::tests::{allocated, shared_memory};

const MEMORY: usize = 4 << 20;
/// Lists and the like go here; what is given back lies above 2 MiB.
const DATA: u64 = 0x8_0000;
const PAGES: u64 = 0x20_0000;

struct Rig {
    device: Box<dyn VirtioDevice>,
    handle: BalloonHandle,
    queues: Vec<Driver>,
    memory: Memory,
    file: std::fs::File,
}

fn rig() -> Rig {
    let (memory, file) = shared_memory(&[(0, MEMORY)]);
    let worker = Worker::start("balloon-test", || Ok(())).unwrap();
    let (mut device, handle) = balloon(&worker).unwrap();
    let line = interrupt();
    let sizes = device.queue_sizes().to_vec();
    let queues: Vec<_> =
        sizes.iter().enumerate().map(|(i, size)| Driver::new(&memory, &line, i as u16, *size)).collect();
    device.activate(activation(&memory, &line, device.features(), &queues)).unwrap();
    memory.write_slice(&vec![7; 2 << 20], GuestAddress(PAGES)).unwrap();
    memory.write_slice(&[7; PAGE as usize], GuestAddress(DATA)).unwrap();
    Rig { device: Box::new(device), handle, queues, memory, file }
}

impl Rig {
    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.queues[0].write(DATA, &bytes);
        assert_eq!(self.queues[0].request(&[(DATA, bytes.len() as u32, 0)]), 0);
    }

    fn page(&self, number: u64) -> u8 {
        self.memory.read_obj(GuestAddress(number * PAGE)).unwrap()
    }
}

#[test]
fn inflated_pages_leave_the_host_and_all_others_stay() {
    let mut rig = rig();
    let before = allocated(&rig.file);
    let first = (PAGES / PAGE) as u32;
    // Downwards, upwards, alone, twice.
    rig.inflate(&[first + 9, first + 8, first + 7, first + 20, first + 21, first + 40, first + 40]);
    assert_eq!(allocated(&rig.file), before - 6 * PAGE);
    let gone: Vec<u64> = (0..64).filter(|page| rig.page(u64::from(first) + page) == 0).collect();
    assert_eq!(gone, [7, 8, 9, 20, 21, 40]);
    assert_eq!(rig.handle.released(), (7 * PAGE, 0));
    // A deflated page works again at once.
    assert_eq!(rig.queues[1].request(&[(DATA, 4, 0)]), 0);
    rig.memory.write_obj(1_u8, GuestAddress(u64::from(first + 8) * PAGE)).unwrap();
}

#[test]
fn pages_outside_memory_and_lists_that_are_none_are_passed_over() {
    let mut rig = rig();
    let before = allocated(&rig.file);
    rig.inflate(&[u32::MAX, (MEMORY as u64 / PAGE) as u32, u32::MAX - 1]);
    let driver = &mut rig.queues[0];
    for list in [(u64::MAX, 64, 0), (MEMORY as u64 - 2, 64, 0), (DATA, 3, 0), (DATA, 0, 0), (DATA, 64, WRITE)]
    {
        assert_eq!(driver.request(&[list]), 0);
    }
    // Far more numbers than any driver sends: bounded.
    assert_eq!(driver.request(&[(DATA, u32::MAX, 0)]), 0);
    driver.descriptor(60, (DATA, 4, NEXT, 60));
    driver.offer(60);
    assert_eq!(driver.wait(), (60, 0));
    assert_eq!(driver.request(&[(DATA, 7, INDIRECT)]), 0);
    // Page 0 came by way of zeros in the list.
    assert!(allocated(&rig.file) >= before - PAGE);
    let first = (PAGES / PAGE) as u32;
    rig.inflate(&[first]);
    assert_eq!(rig.page(u64::from(first)), 0);
}

#[test]
fn free_pages_that_are_reported_leave_the_host_whichever_queue_the_driver_thinks_it_is() {
    let mut rig = rig();
    for (queue, at) in [(3, PAGES), (4, PAGES + 0x10_0000)] {
        let before = allocated(&rig.file);
        let ranges = [(at, 0x8_0000, WRITE), (at + 0x8_0000, 0x4000, WRITE), (u64::MAX - 4095, 4096, WRITE)];
        assert_eq!(rig.queues[queue].request(&ranges), 0);
        assert_eq!(allocated(&rig.file), before - 0x8_4000);
        // One that could be read is no report.
        assert_eq!(rig.queues[queue].request(&[(at + 0xe_0000, 4096, 0)]), 0);
        assert_eq!(allocated(&rig.file), before - 0x8_4000);
    }
    assert_eq!(rig.handle.released(), (0, 2 * 0x8_4000));
}

#[test]
fn a_target_reaches_the_guest_and_what_it_gave_comes_back() {
    let mut rig = rig();
    rig.handle.set_target(10 * PAGE + 1);
    assert_eq!(rig.queues[0].interrupt.pending() & 2, 2);
    let mut config = [0xff; 12];
    rig.device.read_config(0, &mut config);
    assert_eq!(config, [10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.device.write_config(4, &7_u32.to_le_bytes());
    for (offset, data) in [(0, &[9; 4][..]), (4, &[9; 3]), (5, &[9; 4]), (u64::MAX, &[9; 4])] {
        rig.device.write_config(offset, data);
    }
    assert_eq!(rig.handle.size(), (10 * PAGE, 7 * PAGE));
    rig.handle.set_target(u64::MAX);
    assert_eq!(rig.handle.size().0, u64::from(u32::MAX) * PAGE);
}

#[test]
fn statistics_are_kept_until_new_ones_are_asked_for() {
    let mut rig = rig();
    let record = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let told = [record(4, 1000), record(5, 2000), record(6, 1500), record(99, 1), record(10, 3), vec![1, 2]]
        .concat();
    let driver = &mut rig.queues[2];
    driver.write(DATA, &told);
    let head = driver.chain(&[(DATA, 13, 0), (DATA + 13, told.len() as u32 - 13, 0)]);
    assert_eq!(rig.handle.statistics(), None);
    driver.offer(head);
    let expected = GuestStatistics {
        free: Some(1000),
        total: Some(2000),
        available: Some(1500),
        oom_kills: Some(3),
        ..GuestStatistics::default()
    };
    until("the statistics come", || rig.handle.statistics() == Some(expected));
    assert!(driver.used().is_none(), "the device keeps the chain");
    rig.handle.ask_statistics();
    assert_eq!(driver.wait(), (u32::from(head), 0));
    rig.handle.ask_statistics();
    driver.write(DATA, &record(4, 500));
    driver.offer(head);
    until("new ones come", || rig.handle.statistics().unwrap().free == Some(500));
}

#[test]
fn a_second_chain_of_statistics_goes_back_at_once_so_that_none_is_lost() {
    let mut rig = rig();
    let driver = &mut rig.queues[2];
    let (one, two) = (driver.chain(&[(DATA, 10, 0)]), driver.chain(&[(u64::MAX, 10, 0)]));
    driver.offer(one);
    driver.offer(two);
    assert_eq!(driver.wait(), (u32::from(two), 0));
    rig.handle.ask_statistics();
    assert_eq!(driver.wait(), (u32::from(one), 0));
}

#[test]
fn a_head_that_is_no_descriptor_breaks_the_queue_and_is_not_saved() {
    let mut rig = rig();
    rig.queues[2].offer(46);
    until("a reset is asked for", || rig.queues[2].interrupt.pending() & 2 != 0);
    rig.device.pause().unwrap();
    let state = rig.device.save().unwrap();
    rig.device.restore(state.inner).unwrap();
}

#[test]
fn a_saved_balloon_still_has_the_chain_that_it_kept() {
    let mut rig = rig();
    let head = rig.queues[2].chain(&[(DATA, 10, 0)]);
    rig.queues[2].offer(head);
    until("the chain is taken", || rig.handle.statistics().is_some());
    rig.handle.set_target(4 * PAGE);
    rig.device.pause().unwrap();
    let state = rig.device.save().unwrap();
    let state: crate::devices::virtio::DeviceState =
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();

    let worker = Worker::start("balloon-test", || Ok(())).unwrap();
    let (mut device, handle) = balloon(&worker).unwrap();
    device.restore(state.inner).unwrap();
    let line = &rig.queues[2].interrupt.clone();
    let mut activation = activation(&rig.memory, line, device.features(), &rig.queues);
    let saved = activation.queues.drain(..).zip(&state.queues).zip(device.queue_sizes());
    activation.queues = saved
        .map(|((queue, saved), size)| {
            crate::devices::virtio::ActiveQueue::new(queue.index, saved.restore(*size).unwrap(), queue.kick)
        })
        .collect();
    device.activate(activation).unwrap();
    assert_eq!(handle.size().0, 4 * PAGE);
    handle.ask_statistics();
    assert_eq!(rig.queues[2].wait(), (u32::from(head), 0));

    for kept in [json!(null), json!({ "target": 1, "actual": 0, "kept": 16 }), json!({ "target": -1 })] {
        assert!(device.restore(kept).is_err());
    }
}
