use std::io;

use super::guest_buffers::{GuestBuffers, Patience};
use super::request::Range;

/// What is behind a block device. Called by several threads at once. Whatever is asked for is within
/// [`Storage::capacity`] as it was a moment ago: a slot may have been cleared since.
pub(super) trait Storage: Send + Sync {
    /// Bytes, a multiple of 512.
    fn capacity(&self) -> u64;

    /// Fills the rest of `into`; `at` is the byte of the disk that its first byte came from, before anything of it was
    /// done. `WouldBlock` if it must not wait but has to; what was done until then stays done.
    fn read(&self, at: u64, into: &mut GuestBuffers, patience: Patience) -> io::Result<()>;

    /// Writes all of `from` at `at`. `ReadOnlyFilesystem` if it is not for writing.
    fn write(&self, at: u64, from: &mut GuestBuffers) -> io::Result<()>;

    /// Makes completed writes last as long as the storage promises.
    fn flush(&self) -> io::Result<()>;

    /// Gives the space of a range back; what it reads as afterwards is not said.
    fn discard(&self, range: &Range) -> io::Result<()>;

    /// Makes a range read as zeros.
    fn write_zeroes(&self, range: &Range) -> io::Result<()>;
}

/// The error of a write to what is not for writing.
pub(super) fn read_only() -> io::Error {
    io::ErrorKind::ReadOnlyFilesystem.into()
}
