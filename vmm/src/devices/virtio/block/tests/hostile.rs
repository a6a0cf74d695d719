//! Chains that no driver should make: each is answered or given back, and the next request works.

use super::*;
use crate::devices::virtio::driver::{INDIRECT, NEXT};

/// Nothing of it is memory.
const NOWHERE: u64 = 0x4000_0000;

fn rig() -> (Rig, ScratchHandle) {
    let (device, handle) = scratch(temporary_file(&[]), 1 << 20, &threads(), no_faults()).unwrap();
    handle.open(0, 1 << 20).unwrap();
    (Rig::new(device), handle)
}

fn still_works(rig: &mut Rig) {
    assert_eq!(rig.write(7, &[3; 512]), OK);
    assert_eq!(rig.read(7, 512), (OK, vec![3; 512]));
    assert_eq!(rig.driver.interrupt.pending() & 2, 0, "no reset is asked for");
}

#[test]
fn what_lies_beyond_the_end_is_refused() {
    let (mut rig, handle) = rig();
    let sectors = (1 << 20) / 512;
    for sector in [sectors, sectors - 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(rig.read(sector, 1024).0, IO_ERROR, "{sector}");
        assert_eq!(rig.write(sector, &[1; 1024]), IO_ERROR, "{sector}");
        let range = [(sector, 2, 0)];
        assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_DISCARD, &range), IO_ERROR, "{sector}");
        assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &range), IO_ERROR, "{sector}");
    }
    assert_eq!(handle.allocated().unwrap(), 0);
    assert_eq!(handle.stats().errors, 24);
    still_works(&mut rig);
}

#[test]
fn lengths_that_are_no_sectors_or_too_many_are_refused() {
    let (mut rig, _) = rig();
    for length in [1, 511, 513] {
        assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, length, WRITE)]).0, IO_ERROR);
        assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, length, 0)]).0, IO_ERROR);
    }
    // Together beyond 64 MiB, though each is in memory.
    let many = vec![(DATA, 1 << 20, WRITE); 65];
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &many).0, IO_ERROR);
    // Nothing at all is fine.
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[]), (OK, 1));
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 0, 0)]), (OK, 1));
    still_works(&mut rig);
}

#[test]
fn ranges_are_bounded_and_reserved_flags_are_unsupported() {
    let (mut rig, _) = rig();
    let discard = blk::VIRTIO_BLK_T_DISCARD;
    let zeroes = blk::VIRTIO_BLK_T_WRITE_ZEROES;
    for kind in [discard, zeroes] {
        assert_eq!(rig.ranges(kind, &[]), IO_ERROR);
        assert_eq!(rig.ranges(kind, &[(0, 1, 0); 17]), IO_ERROR);
        assert_eq!(rig.ranges(kind, &[(0, 1, 0); 16]), OK);
        assert_eq!(rig.ranges(kind, &[(0, 1, 2)]), UNSUPPORTED);
        assert_eq!(rig.ranges(kind, &[(0, u32::MAX, 0)]), IO_ERROR);
        assert_eq!(rig.request(kind, 0, &[(DATA, 15, 0)]).0, IO_ERROR);
    }
    assert_eq!(rig.ranges(discard, &[(0, 1, 1)]), UNSUPPORTED);
    still_works(&mut rig);
}

#[test]
fn what_the_device_does_not_do_is_unsupported() {
    let (mut rig, _) = rig();
    for kind in [2, 3, 5, 9, blk::VIRTIO_BLK_T_SECURE_ERASE, blk::VIRTIO_BLK_T_ZONE_REPORT, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[(DATA, 512, WRITE)]).0, UNSUPPORTED, "{kind}");
    }
    still_works(&mut rig);
}

#[test]
fn the_id_is_as_long_as_there_is_room() {
    let (mut rig, _) = rig();
    let id = blk::VIRTIO_BLK_T_GET_ID;
    rig.driver.write(DATA, &[0xee; 32]);
    assert_eq!(rig.request(id, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(rig.driver.read(DATA, 21), [b"scratch".as_slice(), &[0; 13], &[0xee]].concat());
    assert_eq!(rig.request(id, 0, &[(DATA + 100, 2, WRITE), (DATA + 200, 1, WRITE)]), (OK, 4));
    assert_eq!(
        (rig.driver.read(DATA + 100, 2), rig.driver.read(DATA + 200, 1)),
        (b"sc".to_vec(), b"r".to_vec())
    );
    assert_eq!(rig.request(id, 0, &[]), (OK, 1));
}

#[test]
fn a_header_in_pieces_is_a_header_and_one_that_is_too_short_is_none() {
    let (mut rig, _) = rig();
    assert_eq!(rig.write(2, &[4; 512]), OK);
    rig.prepare(blk::VIRTIO_BLK_T_IN, 2);
    let pieces = [(HEADER, 3, 0), (HEADER + 3, 0, 0), (HEADER + 3, 12, 0), (HEADER + 15, 1, 0)];
    let length = rig.driver.request(&[&pieces[..], &[(DATA, 512, WRITE), (STATUS, 1, WRITE)]].concat());
    assert_eq!((length, rig.status(), rig.driver.read(DATA, 512)), (513, OK, vec![4; 512]));
    rig.prepare(blk::VIRTIO_BLK_T_IN, 2);
    assert_eq!(rig.driver.request(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]), 1);
    assert_eq!(rig.status(), IO_ERROR);
}

#[test]
fn buffers_in_the_wrong_direction_or_order_are_refused_with_an_answer() {
    let (mut rig, _) = rig();
    let read = blk::VIRTIO_BLK_T_IN;
    // A read into what cannot be written, a write from what can, a header that can be written, disorder.
    assert_eq!(rig.request(read, 0, &[(DATA, 512, 0)]).0, IO_ERROR);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, WRITE)]).0, IO_ERROR);
    rig.prepare(read, 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, WRITE), (STATUS, 1, WRITE)]), 1);
    assert_eq!(rig.status(), IO_ERROR);
    rig.prepare(read, 0);
    assert_eq!(rig.driver.request(&[(DATA, 512, WRITE), (HEADER, 16, 0), (STATUS, 1, WRITE)]), 1);
    assert_eq!(rig.status(), IO_ERROR);
    still_works(&mut rig);
}

#[test]
fn a_chain_without_a_place_for_an_answer_goes_back_empty() {
    let (mut rig, handle) = rig();
    rig.prepare(blk::VIRTIO_BLK_T_IN, 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, 0)]), 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, 0), (STATUS, 0, WRITE)]), 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, 0), (NOWHERE, 1, WRITE)]), 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, 0), (u64::MAX, 1, WRITE)]), 0);
    assert_eq!(rig.driver.request(&[(HEADER, 16, 0), (u64::MAX, 2, WRITE)]), 0);
    assert_eq!(handle.stats().malformed, 5);
    still_works(&mut rig);
}

#[test]
fn addresses_outside_memory_are_refused_and_nothing_is_moved() {
    let (mut rig, handle) = rig();
    for (address, length) in [(NOWHERE, 512), (0x20_0000 - 256, 512), (u64::MAX - 511, 512), (u64::MAX, 512)]
    {
        assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(address, length, WRITE)]).0, IO_ERROR);
        assert_eq!(
            rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0), (address, length, 0)]).0,
            IO_ERROR
        );
    }
    assert_eq!(rig.driver.request(&[(NOWHERE, 16, 0), (STATUS, 1, WRITE)]), 1);
    assert_eq!(handle.allocated().unwrap(), 0, "not even the part that was in memory");
    still_works(&mut rig);
}

#[test]
fn lengths_that_overflow_together_end_the_chain() {
    let (mut rig, _) = rig();
    rig.prepare(blk::VIRTIO_BLK_T_IN, 0);
    let huge = [(HEADER, 16, 0), (DATA, u32::MAX, WRITE), (DATA, u32::MAX, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(rig.driver.request(&huge), 0);
    still_works(&mut rig);
}

#[test]
fn loops_and_breaks_in_a_chain_end() {
    let (mut rig, _) = rig();
    rig.prepare(blk::VIRTIO_BLK_T_IN, 0);
    let driver = &mut rig.driver;
    // To itself, between two, and to a descriptor that is not there.
    driver.descriptor(0, (HEADER, 16, NEXT, 0));
    driver.descriptor(1, (HEADER, 16, NEXT, 2));
    driver.descriptor(2, (STATUS, 1, NEXT | WRITE, 1));
    driver.descriptor(3, (HEADER, 16, NEXT, 128));
    for head in [0, 1, 3] {
        driver.offer(head);
        assert_eq!(driver.wait(), (u32::from(head), 0));
    }
    still_works(&mut rig);
}

#[test]
fn an_indirect_table_is_followed_once_and_only_if_it_is_one() {
    let (mut rig, _) = rig();
    assert_eq!(rig.write(0, &[8; 512]), OK);
    let table = 0x19_0000;
    rig.prepare(blk::VIRTIO_BLK_T_IN, 0);
    let driver = &mut rig.driver;
    driver.descriptor_at(table, 0, (HEADER, 16, NEXT, 1));
    driver.descriptor_at(table, 1, (DATA, 512, NEXT | WRITE, 2));
    driver.descriptor_at(table, 2, (STATUS, 1, WRITE, 0));
    assert_eq!(driver.request(&[(table, 48, INDIRECT)]), 513);
    assert_eq!(driver.read(DATA, 512), [8; 512]);
    // Too short, no multiple of a descriptor, empty, outside memory, huge.
    for (at, length) in [(table, 32), (table, 47), (table, 0), (NOWHERE, 48), (table, u32::MAX - 15)] {
        assert_eq!(driver.request(&[(at, length, INDIRECT)]), 0, "{at:#x} {length}");
    }
    // In itself.
    driver.descriptor_at(table, 1, (table, 48, INDIRECT, 0));
    assert_eq!(driver.request(&[(table, 48, INDIRECT)]), 0);
    // A loop in it, which would be followed 65535 times.
    driver.descriptor_at(table, 1, (DATA, 1, NEXT | WRITE, 1));
    assert_eq!(driver.request(&[(table, 65535 * 16, INDIRECT)]), 0);
    still_works(&mut rig);
}

#[test]
fn a_ring_that_lies_stops_the_device_until_it_is_reset() {
    let (mut rig, _) = rig();
    still_works(&mut rig);
    rig.driver.lie(0x4000);
    crate::devices::virtio::driver::until("the device asks for a reset", || {
        rig.driver.interrupt.pending() & 2 != 0
    });
    // A head that is no descriptor breaks it as well.
    rig.device.reset();
    let mut rig = Rig::new(rig.device);
    still_works(&mut rig);
    rig.driver.offer(500);
    crate::devices::virtio::driver::until("the device asks for a reset", || {
        rig.driver.interrupt.pending() & 2 != 0
    });
    rig.device.reset();
    let mut rig = Rig::new(rig.device);
    still_works(&mut rig);
}
