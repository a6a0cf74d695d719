use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FileType, OFlags};

use super::guest_buffers::{GuestBuffers, Patience};
use super::protocol::SECTOR;
use super::request::Range;
use super::storage::read_only;

/// A file or block device of the host that holds a disk byte by byte.
pub(super) struct RawFile {
    file: File,
    size: u64,
    writable: bool,
    identity: Identity,
    /// The file system cannot say beforehand whether a read would have to wait.
    cannot_ask: AtomicBool,
}

/// Which file it is, however it was opened.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    special: u64,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl RawFile {
    /// A regular file or a block device, opened for reading, and for writing too unless it is to be `read_only`. The text
    /// says what is wrong with it.
    pub(super) fn new(file: File, read_only: bool) -> Result<Self, String> {
        let stat = rustix::fs::fstat(file.as_fd()).map_err(|e| format!("stat: {e}"))?;
        let size = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            // Its size is where its end is.
            FileType::BlockDevice => rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::End(0))
                .map_err(|e| format!("the size of the block device: {e}"))?,
            _ => return Err("it is neither a regular file nor a block device".to_owned()),
        };
        let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(|e| format!("its flags: {e}"))?;
        // pwrite on a file opened for appending ignores the offset.
        if flags.intersects(OFlags::PATH | OFlags::APPEND) {
            return Err("it is opened with O_PATH or O_APPEND".to_owned());
        }
        let mode = flags & OFlags::ACCMODE;
        if mode == OFlags::WRONLY || mode == OFlags::RDONLY && !read_only {
            return Err(format!(
                "it is not opened for reading{}",
                if read_only { "" } else { " and writing" }
            ));
        }
        if size < SECTOR {
            return Err(format!("it has {size} bytes, less than a sector"));
        }
        let identity = Identity { device: stat.st_dev, inode: stat.st_ino, special: stat.st_rdev };
        let size = size / SECTOR * SECTOR;
        Ok(Self { file, size, writable: !read_only, identity, cannot_ask: AtomicBool::new(false) })
    }

    /// Bytes, whole sectors.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    pub(super) fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()> {
        while into.remaining() > 0 {
            if patience == Patience::None && self.cannot_ask.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let limit = into.remaining();
            match into.read_from(&self.file, at + into.done(), limit, patience) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if patience == Patience::None && e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.cannot_ask.store(true, Ordering::Relaxed);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, at: u64, from: &mut GuestBuffers) -> io::Result<()> {
        self.must_be_writable()?;
        while from.remaining() > 0 {
            let limit = from.remaining();
            if from.write_to(&self.file, at + from.done(), limit)? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Down to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.writable { self.file.sync_data() } else { Ok(()) }
    }

    /// Zeros that take no space.
    pub(super) fn punch(&self, range: &Range) -> io::Result<()> {
        self.must_be_writable()?;
        self.allocate(FallocateFlags::PUNCH_HOLE, range)
    }

    /// Gives the space back. A discard is a hint: where there is nothing to give back it has been followed.
    pub(super) fn discard(&self, range: &Range) -> io::Result<()> {
        match self.punch(range) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    /// Zeros; their space is given back only if the range says so.
    pub(super) fn write_zeroes(&self, range: &Range) -> io::Result<()> {
        self.must_be_writable()?;
        let way = if range.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(way, range) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeros(range),
            result => result,
        }
    }

    /// Bytes of the host's disk that it takes.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(self.file.as_fd())?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    fn allocate(&self, way: FallocateFlags, range: &Range) -> io::Result<()> {
        let flags = way | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(self.file.as_fd(), flags, range.at, range.length) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn write_zeros(&self, range: &Range) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let mut done = 0;
        while done < range.length {
            let part = (range.length - done).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], range.at + done)?;
            done += part;
        }
        Ok(())
    }

    fn must_be_writable(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(read_only()) }
    }
}
