use std::os::unix::fs::FileExt;

use super::super::tests::{IO_ERROR, OK, Rig, for_reading, no_faults, pattern, temporary_file, threads};
use super::*;
use crate::devices::virtio::VirtioDevice;

const UNIT: u64 = 2 << 20;

fn rig() -> (Rig, ImagesHandle) {
    let (device, handle) = images(&threads(), no_faults());
    (Rig::new(device), handle)
}

fn layer(bytes: &[u8]) -> File {
    for_reading(&temporary_file(bytes))
}

#[test]
fn an_empty_disk_is_huge_has_zeros_where_partitions_are_looked_for_and_nothing_else() {
    let (mut rig, handle) = rig();
    assert_eq!(rig.capacity(), 16 << 40);
    assert_eq!(rig.read(0, 4096), (OK, vec![0; 4096]));
    assert_eq!(rig.read(7, 512), (OK, vec![0; 512]));
    // Read ahead, and where a GPT of blocks of 4096 bytes would be.
    assert_eq!(rig.read(0, 16384), (OK, vec![0; 16384]));
    assert_eq!(rig.read(8, 4096), (OK, vec![0; 4096]));
    for sector in [UNIT / 512 - 4, UNIT / 512, (16 << 31) - 8] {
        assert_eq!(rig.read(sector, 4096).0, IO_ERROR, "{sector}");
    }
    assert!(handle.list().is_empty());
}

#[test]
fn a_layer_is_read_at_its_extent_and_its_last_block_is_filled_with_zeros() {
    let (mut rig, handle) = rig();
    let bytes = pattern(3 * 4096 + 700);
    let extent = handle.add("one", layer(&bytes), bytes.len() as u64).unwrap();
    assert_eq!(extent, Extent { offset: UNIT, length: bytes.len() as u64 });
    let sector = extent.offset / 512;
    let (status, got) = rig.read(sector, 4 * 4096);
    assert_eq!(status, OK);
    assert_eq!(got[..bytes.len()], bytes);
    assert_eq!(got[bytes.len()..], vec![0; 4096 - 700]);
    assert_eq!(rig.read(sector + 25, 512).1, [&bytes[25 * 512..], &[0; 324]].concat());
    assert_eq!(rig.read(sector + 31, 512), (OK, vec![0; 512]));
    assert_eq!(rig.read(sector + 31, 1024).0, IO_ERROR, "beyond its last block");
    assert_eq!(rig.read(sector - 1, 1024), (OK, [&[0; 512][..], &bytes[..512]].concat()));
}

#[test]
fn only_the_length_that_was_asked_for_can_be_read() {
    let (mut rig, handle) = rig();
    let extent = handle.add("part", layer(&[9; 8192]), 600).unwrap();
    let (_, got) = rig.read(extent.offset / 512, 4096);
    assert_eq!((&got[..600], &got[600..]), (&[9; 600][..], &[0; 3496][..]));
    assert_eq!(rig.read(extent.offset / 512 + 8, 512).0, IO_ERROR);
}

#[test]
fn one_read_may_cross_from_an_extent_to_the_next() {
    let (mut rig, handle) = rig();
    let bytes = pattern(UNIT as usize);
    let one = handle.add("one", layer(&bytes), UNIT).unwrap();
    let two = handle.add("two", layer(&[7; 5000]), 5000).unwrap();
    assert_eq!(one.offset + one.length, two.offset);
    let (status, got) = rig.read(two.offset / 512 - 3, 4 * 512);
    assert_eq!(status, OK);
    assert_eq!(got, [&bytes[UNIT as usize - 3 * 512..], &[7; 512]].concat());
}

#[test]
fn a_file_that_became_shorter_is_an_error_where_it_ends() {
    let (mut rig, handle) = rig();
    let file = temporary_file(&[1; 16384]);
    let extent = handle.add("shrinks", for_reading(&file), 16384).unwrap();
    file.set_len(5000).unwrap();
    assert_eq!(rig.read(extent.offset / 512, 4096), (OK, vec![1; 4096]));
    assert_eq!(rig.read(extent.offset / 512 + 8, 4096).0, IO_ERROR);
}

#[test]
fn writes_are_refused_and_change_nothing() {
    let (mut rig, handle) = rig();
    let file = temporary_file(&[1; 4096]);
    let extent = handle.add("layer", for_reading(&file), 4096).unwrap();
    assert_ne!(rig.device.features() & 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO, 0);
    for sector in [0, extent.offset / 512] {
        assert_eq!(rig.write(sector, &[9; 512]), IO_ERROR);
    }
    let mut first = [0; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1; 512]);
}

#[test]
fn a_repeated_key_is_the_same_extent_and_another_length_is_an_error() {
    let (_rig, handle) = rig();
    let first = handle.add("sha256:a", layer(&[1; 4096]), 4096).unwrap();
    assert_eq!(handle.add("sha256:a", layer(&[2; 8192]), 4096).unwrap(), first);
    assert!(matches!(handle.add("sha256:a", layer(&[2; 8192]), 8192), Err(ImagesError::Differs { .. })));
    assert_eq!(handle.list(), [("sha256:a".to_owned(), first)]);
}

#[test]
fn a_removed_extent_is_gone_and_its_place_is_never_used_again() {
    let (mut rig, handle) = rig();
    let one = handle.add("one", layer(&[1; 4096]), 4096).unwrap();
    assert_eq!(rig.read(one.offset / 512, 512).0, OK);
    handle.remove("one").unwrap();
    handle.remove("one").unwrap();
    handle.remove("never there").unwrap();
    assert_eq!(rig.read(one.offset / 512, 512).0, IO_ERROR);
    let again = handle.add("one", layer(&[1; 4096]), 4096).unwrap();
    assert_eq!(again.offset, one.offset + UNIT);
    assert_eq!(rig.read(one.offset / 512, 512).0, IO_ERROR);
}

#[test]
fn a_file_that_is_no_layer_is_refused() {
    let (_rig, handle) = rig();
    let refused = |file, length| handle.add("x", file, length).unwrap_err().to_string();
    assert!(refused(temporary_file(&[1; 4096]), 4096).contains("not opened for reading only"));
    assert!(refused(File::open("/").unwrap(), 4096).contains("not a regular one"));
    assert!(refused(File::open("/dev/zero").unwrap(), 4096).contains("not a regular one"));
    assert!(refused(layer(&[1; 100]), 101).contains("101 bytes of a file that has 100"));
    assert!(refused(layer(&[1; 100]), 0).contains("0 bytes of"));
    for key in [String::new(), "k".repeat(257)] {
        assert!(matches!(handle.add(&key, layer(&[1; 100]), 100), Err(ImagesError::Key(_))));
    }
    assert!(handle.list().is_empty());
}

#[test]
fn a_disk_without_offsets_left_says_so() {
    let table = Table::new(4 * UNIT);
    assert!(matches!(table.add("large", sparse(3 * UNIT + 1), 3 * UNIT + 1), Err(ImagesError::Full { .. })));
    table.add("one", layer(&[1; 1]), 1).unwrap();
    table.add("two", sparse(2 * UNIT), 2 * UNIT).unwrap();
    assert!(matches!(table.add("three", layer(&[1; 1]), 1), Err(ImagesError::Full { .. })));
}

fn sparse(length: u64) -> File {
    let file = temporary_file(&[]);
    file.set_len(length).unwrap();
    for_reading(&file)
}

#[test]
fn a_restored_disk_keeps_its_extents_and_waits_for_their_files() {
    let (mut saved, handle) = images(&threads(), no_faults());
    let one = handle.add("one", layer(&[1; 4096]), 4096).unwrap();
    let two = handle.add("two", layer(&[2; 4096]), 4096).unwrap();
    handle.remove("one").unwrap();
    let state = saved.save().unwrap();
    assert!(state.queues.is_empty(), "it is not active");
    let (mut device, handle) = images(&threads(), no_faults());
    device.restore(state.inner).unwrap();
    let mut rig = Rig::new(device);
    assert_eq!(handle.list(), [("two".to_owned(), two)]);
    assert_eq!(rig.read(two.offset / 512, 4096).0, IO_ERROR, "no file yet");
    assert_eq!(handle.add("two", layer(&[2; 4096]), 4096).unwrap(), two);
    assert_eq!(rig.read(two.offset / 512, 4096), (OK, vec![2; 4096]));
    assert_eq!(rig.read(one.offset / 512, 4096).0, IO_ERROR);
    assert_eq!(handle.add("three", layer(&[3; 1]), 1).unwrap().offset, two.offset + UNIT);
}

#[test]
fn a_state_that_is_none_is_refused() {
    let extent = |key: &str, offset: u64, length: u64| serde_json::json!({ "key": key, "offset": offset, "length": length });
    for (what, next, extents) in [
        ("the first unit", 4 * UNIT, vec![extent("a", 0, 1)]),
        ("not aligned", 4 * UNIT, vec![extent("a", UNIT + 4096, 1)]),
        ("overlapping", 8 * UNIT, vec![extent("a", UNIT, UNIT + 1), extent("b", 2 * UNIT, 1)]),
        ("the same key", 8 * UNIT, vec![extent("a", UNIT, 1), extent("a", 2 * UNIT, 1)]),
        ("no key", 8 * UNIT, vec![extent("", UNIT, 1)]),
        ("beyond what was given out", 2 * UNIT, vec![extent("a", UNIT, UNIT + 1)]),
        ("an overflow", 4 * UNIT, vec![extent("a", u64::MAX - UNIT + 1, UNIT)]),
        ("beyond the disk", 17 << 40, vec![]),
        ("nothing given out", 0, vec![]),
    ] {
        let state = serde_json::json!({ "next": next, "extents": extents });
        assert!(Table::new(IMAGES_CAPACITY).take_over(state).is_err(), "{what}");
    }
    assert!(Table::new(IMAGES_CAPACITY).take_over(Value::Null).is_err());
}
