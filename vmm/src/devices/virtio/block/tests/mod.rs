//! The devices through real queues.

mod hostile;
mod scratch;
mod serving;
mod slot;
mod speed;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::devices::virtio::driver::{Driver, WRITE, memory};
use crate::devices::virtio::{Memory, VirtioDevice};

pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
pub(super) const UNSUPPORTED: u8 = 2;

/// Where the tests' driver keeps the parts of its request.
pub(super) const HEADER: u64 = 0x8_0000;
pub(super) const STATUS: u64 = 0x8_1000;
/// Data goes here; 512 KiB are there.
pub(super) const DATA: u64 = 0x10_0000;

const MEMORY: usize = 0x20_0000;

pub(super) fn threads() -> BlockThreads {
    let confine: Confine = Arc::new(|| Ok(()));
    BlockThreads::start("block-test", 3, &confine).unwrap()
}

pub(super) fn no_faults() -> OnFault {
    Arc::new(|_, _| {})
}

pub(super) fn temporary_file(bytes: &[u8]) -> File {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// The same file, opened for reading only.
pub(super) fn for_reading(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ (i / 512) as u8).collect()
}

/// A device and its driver.
pub(super) struct Rig<D: VirtioDevice = BlockDevice> {
    pub(super) device: D,
    pub(super) driver: Driver,
}

impl<D: VirtioDevice> Rig<D> {
    pub(super) fn new(mut device: D) -> Self {
        let memory: Memory = memory(MEMORY);
        let (driver, activation) = Driver::only(&memory, device.queue_sizes()[0], device.features());
        device.activate(activation).unwrap();
        Self { device, driver }
    }

    /// Writes a header and a status that no device would.
    pub(super) fn prepare(&self, kind: u32, sector: u64) {
        self.driver.write(HEADER, &kind.to_le_bytes());
        self.driver.write(HEADER + 4, &[0; 4]);
        self.driver.write(HEADER + 8, &sector.to_le_bytes());
        self.driver.write(STATUS, &[0xff]);
    }

    pub(super) fn status(&self) -> u8 {
        self.driver.read(STATUS, 1)[0]
    }

    /// Header, these buffers, status: the status and the length that came back.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.prepare(kind, sector);
        let mut buffers = vec![(HEADER, 16, 0)];
        buffers.extend_from_slice(data);
        buffers.push((STATUS, 1, WRITE));
        let length = self.driver.request(&buffers);
        (self.status(), length)
    }

    pub(super) fn read(&mut self, sector: u64, length: u32) -> (u8, Vec<u8>) {
        self.driver.write(DATA, &vec![0xee; length as usize]);
        let (status, written) = self.request(blk::VIRTIO_BLK_T_IN, sector, &[(DATA, length, WRITE)]);
        assert_eq!(written, if status == OK { length + 1 } else { 1 });
        (status, self.driver.read(DATA, length as usize))
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.write(DATA, bytes);
        let (status, written) = self.request(blk::VIRTIO_BLK_T_OUT, sector, &[(DATA, bytes.len() as u32, 0)]);
        assert_eq!(written, 1);
        status
    }

    /// A DISCARD or WRITE_ZEROES of ranges `(sector, sectors, flags)`.
    pub(super) fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.driver.write(DATA, &bytes);
        self.request(kind, 0, &[(DATA, bytes.len() as u32, 0)]).0
    }

    pub(super) fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes) * 512
    }
}

/// A file system of this many bytes that nothing but its descriptor leads to.
pub(super) fn small_file_system(bytes: u64) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "size", bytes.to_string())?;
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
