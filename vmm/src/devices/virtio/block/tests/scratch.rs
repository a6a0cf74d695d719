use rustix::fs::{Mode, OFlags};

use super::*;

const CAPACITY: u64 = 8 << 20;

fn rig() -> (Rig, ScratchHandle) {
    let (device, handle) = scratch(temporary_file(&[]), CAPACITY, &threads(), no_faults()).unwrap();
    handle.open(0, CAPACITY).unwrap();
    (Rig::new(device), handle)
}

#[test]
fn what_was_written_reads_back_whatever_the_segments_are() {
    let (mut rig, handle) = rig();
    let bytes = pattern(8192);
    rig.driver.write(DATA, &bytes);
    let (a, b, c) = (DATA, DATA + 512, DATA + 4096 + 3);
    let (status, _) = rig.request(blk::VIRTIO_BLK_T_OUT, 5, &[(a, 512, 0), (b, 3587, 0), (c, 4093, 0)]);
    assert_eq!(status, OK);
    assert_eq!(rig.read(5, 8192), (OK, bytes.clone()));
    // Into segments of other sizes, the last of which also holds the status.
    rig.prepare(blk::VIRTIO_BLK_T_IN, 5);
    let to = 0x18_0000;
    let length = rig.driver.request(&[(HEADER, 16, 0), (to, 100, WRITE), (to + 100, 8092 + 1, WRITE)]);
    assert_eq!(length, 8193);
    assert_eq!(rig.driver.read(to, 8192), bytes);
    assert_eq!(rig.driver.read(to + 8192, 1), [OK]);
    let stats = handle.stats();
    assert_eq!((stats.reads, stats.read_bytes, stats.writes, stats.written_bytes), (2, 16384, 1, 8192));
    assert_eq!((stats.errors, stats.malformed), (0, 0));
}

#[test]
fn a_fresh_disk_is_zeros_and_takes_nothing_of_the_host() {
    let (mut rig, handle) = rig();
    assert_eq!(rig.capacity(), CAPACITY);
    assert_eq!(rig.read(CAPACITY / 512 - 1, 512), (OK, vec![0; 512]));
    assert_eq!(handle.allocated().unwrap(), 0);
}

#[test]
fn discarding_gives_the_space_back_and_zeroes_stay_zeroes() {
    let (mut rig, handle) = rig();
    let bytes = vec![7; 256 << 10];
    for sector in [0, 512, 1024] {
        assert_eq!(rig.write(sector, &bytes), OK);
    }
    let full = handle.allocated().unwrap();
    assert!(full >= 768 << 10, "{full}");
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 512, 0), (1024, 256, 0), (9, 0, 0)]), OK);
    let left = handle.allocated().unwrap();
    assert!(left <= full - (384 << 10), "{left} of {full}");
    // Zeroes, with the hint that they need no space and without.
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(512, 8, 0), (1280, 256, 1)]), OK);
    assert!(handle.allocated().unwrap() < left);
    assert_eq!(rig.read(511, 512 * 10).1[512..512 * 9], [0; 4096]);
    assert_eq!(rig.read(512 + 8, 512).1, [7; 512]);
    assert_eq!(rig.read(1280, 256 * 512), (OK, vec![0; 256 * 512]));
    assert_eq!(handle.stats().discards, 2);
}

#[test]
fn zeroes_take_no_space_of_the_host_however_they_are_asked_for() {
    let (mut rig, handle) = rig();
    for unmap in [0, 1] {
        let all = (CAPACITY / 512) as u32;
        assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, all, unmap)]), OK);
        assert_eq!(handle.allocated().unwrap(), 0, "unmap {unmap}");
    }
}

#[test]
fn what_hulld_did_not_open_cannot_be_written_and_takes_nothing_of_the_host() {
    let (device, handle) = scratch(temporary_file(&[]), CAPACITY, &threads(), no_faults()).unwrap();
    let mut rig = Rig::new(device);
    handle.open(1 << 20, 1 << 20).unwrap();
    let bytes = pattern(4096);
    for sector in [0, 2047, 2048 + 2041, 4096] {
        assert_eq!(rig.write(sector, &bytes), IO_ERROR, "{sector}");
        assert_eq!(
            rig.read(sector, 512).0,
            OK,
            "reading is harmless: partition tables are looked for everywhere"
        );
    }
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_DISCARD, &[(2040, 16, 0)]), IO_ERROR);
    assert_eq!(handle.allocated().unwrap(), 0);
    assert_eq!(rig.write(2048, &bytes), OK);
    assert_eq!(rig.read(2048, 4096), (OK, bytes.clone()));
    handle.close(1 << 20).unwrap();
    assert_eq!(rig.write(2048, &bytes), IO_ERROR);
}

#[test]
fn a_flush_is_answered_though_it_need_not_be_asked_for() {
    let (mut rig, handle) = rig();
    assert_eq!(rig.device.features() & 1 << blk::VIRTIO_BLK_F_FLUSH, 0);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(handle.stats().flushes, 1);
}

#[test]
fn a_full_host_is_an_error_for_the_guest_a_count_and_a_fault_for_the_operator() {
    let file_system = small_file_system(1 << 20).unwrap();
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&file_system, "scratch", flags, Mode::RUSR | Mode::WUSR).unwrap();
    let (told, faults) = std::sync::mpsc::channel();
    let on_fault: OnFault = Arc::new(move |device, message| {
        let _ = told.send(format!("{device}: {message}"));
    });
    let (device, handle) = scratch(file.into(), 16 << 20, &threads(), on_fault).unwrap();
    handle.open(0, 16 << 20).unwrap();
    let mut rig = Rig::new(device);
    let bytes = vec![1; 512 << 10];
    assert_eq!(rig.write(0, &bytes), OK);
    assert_eq!(rig.write(8192, &bytes), OK);
    assert_eq!(rig.write(16384, &bytes), IO_ERROR);
    assert_eq!(rig.write(16384, &bytes), IO_ERROR);
    assert_eq!(handle.stats().out_of_space, 2);
    let fault = faults.try_recv().unwrap();
    assert!(fault.starts_with("scratch: writes fail, its file system on the host is full: "), "{fault}");
    assert!(faults.try_recv().is_err(), "one is enough");
    // What is given back can be used again.
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 1024, 0)]), OK);
    assert_eq!(rig.write(16384, &bytes), OK);
}

#[test]
fn a_file_that_cannot_be_the_disk_is_refused() {
    let threads = threads();
    let refused =
        |file: File, capacity| scratch(file, capacity, &threads, no_faults()).err().unwrap().to_string();
    assert!(refused(File::open("/").unwrap(), 4096).contains("not a regular file"));
    assert!(refused(File::open("/dev/null").unwrap(), 4096).contains("not a regular file"));
    for capacity in [0, 4095, u64::MAX - 4095] {
        assert!(refused(temporary_file(&[]), capacity).contains("capacity"), "{capacity}");
    }
    let file = temporary_file(&[0; 4096]);
    assert!(refused(for_reading(&file), 4096).contains("not opened for reading and writing"));
}
