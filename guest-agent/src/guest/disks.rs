//! The block devices that the machine was born with, found by their serials.

use std::fs;
use std::path::Path;

use hull_sys::dm::Number;

use super::{Doing, GuestError};

/// Longest serial (VIRTIO_BLK_ID_BYTES).
const MAX_SERIAL: usize = 20;

/// The read-only disk that images are ranges of.
pub(super) const IMAGES: &str = "images";
/// The writable disk.
pub(super) const SCRATCH: &str = "scratch";

/// A block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) number: Number,
    /// In sectors; of a slot, what is in it now.
    pub(crate) sectors: u64,
}

/// The disk with this serial.
pub(crate) fn find(serial: &str) -> Result<Disk, GuestError> {
    find_below(Path::new("/sys/block"), serial)
}

fn find_below(directory: &Path, serial: &str) -> Result<Disk, GuestError> {
    let entries = fs::read_dir(directory).doing(|| "look for disks".into())?;
    for entry in entries.flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        // A device without a serial is not one of ours.
        let Some(found) = read("serial").filter(|text| text.len() <= MAX_SERIAL + 1) else { continue };
        if found.trim_end_matches(['\n', '\0']) != serial {
            continue;
        }
        let number = read("dev").and_then(|text| parse_number(text.trim()));
        let sectors = read("size").and_then(|text| text.trim().parse().ok());
        let disk = number.zip(sectors).map(|(number, sectors)| Disk { number, sectors });
        return disk.ok_or_else(|| GuestError::invalid(format!("cannot read the size of the disk {serial}")));
    }
    Err(GuestError::invalid(format!("the machine was born without a disk {serial}")))
}

fn parse_number(text: &str) -> Option<Number> {
    let (major, minor) = text.split_once(':')?;
    Some(Number { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The device behind a slot for a raw volume.
pub(crate) fn slot(number: u32) -> Result<Number, GuestError> {
    let disk = find(&format!("slot{number}"))?;
    if disk.sectors == 0 {
        return Err(GuestError::precondition(format!("nothing is in block slot {number}")));
    }
    Ok(disk.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let add = |name: &str, serial: &str, dev: &str, size: &str| {
            let path = directory.path().join(name);
            fs::create_dir(&path).unwrap();
            for (file, text) in [("serial", serial), ("dev", dev), ("size", size)] {
                fs::write(path.join(file), text).unwrap();
            }
        };
        add("vda", "images", "254:0\n", "1000\n");
        add("vdb", "scratch\n", "254:16\n", "2000\n");
        add("vdc", "slot1", "254:x\n", "0\n");
        fs::create_dir(directory.path().join("loop0")).unwrap();
        let disk = find_below(directory.path(), "scratch").unwrap();
        assert_eq!(disk, Disk { number: Number { major: 254, minor: 16 }, sectors: 2000 });
        assert_eq!(find_below(directory.path(), "images").unwrap().sectors, 1000);
        assert!(find_below(directory.path(), "slot1").is_err());
        let error = find_below(directory.path(), "slot0").unwrap_err().to_string();
        assert!(error.contains("without a disk slot0"), "{error}");
    }
}
