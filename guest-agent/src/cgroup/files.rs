//! Small control files, read and written relative to an open directory. Each is one open, one transfer, one close.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::{Errno, read as read_once, write as write_once};

/// Largest control file that is read: `cgroup.procs` of a pod with tens of thousands of processes fits.
const MAX_FILE: usize = 4 << 20;

/// Opens a directory below `base`. `path` must consist of checked names.
pub(super) fn open_directory(base: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(openat(base, path, flags, Mode::empty())?)
}

/// Opens a control file for writing, for several values one after the other.
pub(super) fn open_for_writing(base: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    Ok(openat(base, path, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Opens a control file for reading.
pub(super) fn open_for_reading(base: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    Ok(openat(base, path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Writes one value; the kernel takes a control value in one write or not at all.
pub(super) fn write_to(file: BorrowedFd<'_>, value: &str) -> io::Result<()> {
    loop {
        match write_once(file, value.as_bytes()) {
            Ok(written) if written == value.len() => return Ok(()),
            Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Opens, writes and closes.
pub(super) fn write(base: BorrowedFd<'_>, path: &str, value: &str) -> io::Result<()> {
    write_to(open_for_writing(base, path)?.as_fd(), value)
}

/// The whole text of a control file.
pub(super) fn read(base: BorrowedFd<'_>, path: &str) -> io::Result<String> {
    let file = open_for_reading(base, path)?;
    let mut text = vec![0_u8; 4096];
    let mut length = 0;
    loop {
        match read_once(&file, &mut text[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if length == text.len() {
            if length >= MAX_FILE {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
            text.resize(length * 2, 0);
        }
    }
    text.truncate(length);
    String::from_utf8(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Whether the error says that the file, or the cgroup it was in, does not exist (any more).
pub(super) fn is_missing(error: &io::Error) -> bool {
    // A control file of a cgroup that was removed while it was open answers ENODEV.
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NODEV))
}
