//! Ask the kernel to write a file's dirty pages without waiting for them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Starts writing `length` bytes from `offset` to the disk and returns (sync_file_range(2) with
/// `SYNC_FILE_RANGE_WRITE`). Promises nothing about durability; a later fsync has less left to do.
pub fn start(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let to_offset = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let (offset, length) = (to_offset(offset)?, to_offset(length)?);
    // SAFETY: only numbers are passed, and the descriptor is open for as long as `file` is borrowed.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_back_of_a_regular_file_can_be_started() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        start(&file, 0, 1 << 20).unwrap();
    }
}
