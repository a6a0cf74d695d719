use super::*;

fn rig() -> (Rig, SlotHandle) {
    let (device, handle) = slot(3, &threads(), no_faults());
    (Rig::new(device), handle)
}

#[test]
fn a_slot_has_no_capacity_until_a_volume_is_put_in_and_the_guest_is_told() {
    let (mut rig, handle) = rig();
    assert_eq!((rig.capacity(), handle.volume()), (0, None));
    assert_eq!(rig.read(0, 512).0, IO_ERROR);
    let file = temporary_file(&pattern(3 * 4096 + 100));
    assert_eq!(handle.fill(file.try_clone().unwrap(), false).unwrap(), 3 * 4096);
    assert_eq!(rig.driver.interrupt.pending() & 2, 2, "a changed configuration");
    assert_eq!((rig.capacity(), handle.volume()), (3 * 4096, Some((3 * 4096, false))));
    assert_eq!(rig.read(1, 1024).1, pattern(3 * 4096)[512..1536]);
    assert_eq!(rig.write(0, &[9; 512]), OK);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(rig.read(0, 512).1, [9; 512]);
    assert_eq!(rig.read(24, 512).0, IO_ERROR, "the end");
    assert_eq!(handle.stats().flushes, 1);
}

#[test]
fn a_read_only_volume_refuses_every_kind_of_write_on_the_host() {
    let (mut rig, handle) = rig();
    let file = temporary_file(&[5; 8192]);
    handle.fill(for_reading(&file), true).unwrap();
    assert_eq!(rig.write(0, &[9; 512]), IO_ERROR);
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(rig.ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 1)]), IO_ERROR);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(rig.read(0, 8192).1, [5; 8192]);
    // Also when the file itself could be written to.
    handle.clear().unwrap();
    handle.fill(file, true).unwrap();
    assert_eq!(rig.write(0, &[9; 512]), IO_ERROR);
}

#[test]
fn a_cleared_slot_takes_another_volume_and_a_full_one_only_the_same() {
    let (mut rig, handle) = rig();
    let (one, two) = (temporary_file(&[1; 4096]), temporary_file(&[2; 8192]));
    handle.fill(one.try_clone().unwrap(), false).unwrap();
    assert_eq!(handle.fill(one.try_clone().unwrap(), false).unwrap(), 4096);
    assert!(matches!(handle.fill(for_reading(&one), true), Err(SlotError::Occupied { .. })));
    assert!(matches!(handle.fill(two.try_clone().unwrap(), false), Err(SlotError::Occupied { .. })));
    handle.clear().unwrap();
    handle.clear().unwrap();
    assert_eq!(rig.capacity(), 0);
    assert_eq!(rig.read(0, 512).0, IO_ERROR);
    handle.fill(two, false).unwrap();
    assert_eq!(rig.read(8, 4096).1, [2; 4096]);
}

#[test]
fn what_is_no_volume_is_refused() {
    let (_rig, handle) = rig();
    let refused = |file, read_only| handle.fill(file, read_only).unwrap_err().to_string();
    let file = temporary_file(&[1; 4096]);
    assert!(
        refused(for_reading(&file), false).starts_with("slot3: the volume cannot be used: it is not opened")
    );
    assert!(refused(File::open("/dev/null").unwrap(), true).contains("neither a regular file nor a block"));
    assert!(refused(temporary_file(&[1; 511]), true).contains("less than a sector"));
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), [1; 512]).unwrap();
    let appending = File::options().read(true).append(true).open(path.path()).unwrap();
    assert!(refused(appending, false).contains("O_APPEND"));
    assert_eq!(handle.volume(), None);
}

#[test]
fn a_block_device_is_as_large_as_the_kernel_says() {
    // Any that is there; loop devices need no image to have a size.
    let Some(device) = ["/dev/vda", "/dev/sda", "/dev/loop0", "/dev/ram0"]
        .into_iter()
        .find_map(|path| File::open(path).ok().map(|file| (path, file)))
    else {
        return;
    };
    let name = device.0.trim_start_matches("/dev/");
    let sectors = std::fs::read_to_string(format!("/sys/class/block/{name}/size")).unwrap();
    let bytes = sectors.trim().parse::<u64>().unwrap() * 512;
    let (mut rig, handle) = rig();
    match handle.fill(device.1, true) {
        Ok(size) => assert_eq!(size, bytes),
        Err(e) => assert!(bytes == 0, "{e}"),
    }
    assert_eq!(rig.read(0, 512).0, if bytes > 0 { OK } else { IO_ERROR });
}
