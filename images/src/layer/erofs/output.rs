use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use super::format::{BLOCK_U64, MAX_BLOCKS};
use crate::layer::error::LayerError;

const BUFFER: usize = 256 << 10;
// From here on writing at once, together with what is buffered, costs less than a copy.
const DIRECT: usize = 32 << 10;
// Short enough that the fsync at the end has little left, long enough for large requests.
const WRITEBACK_STEP: u64 = 16 << 20;

/// A file that is written from one place onwards, in large pieces, with write-back started early.
pub(crate) struct Output<'f> {
    file: &'f File,
    buffer: Vec<u8>,
    /// Where the buffer's first byte belongs.
    start: u64,
    written_back: u64,
}

impl<'f> Output<'f> {
    pub(crate) fn new(file: &'f File, start: u64) -> Self {
        Self { file, buffer: Vec::with_capacity(BUFFER), start, written_back: start }
    }

    pub(crate) fn file(&self) -> &'f File {
        self.file
    }

    /// Where the next appended byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        if bytes.len() >= DIRECT {
            self.write_with_buffer(bytes)?;
            self.start += (self.buffer.len() + bytes.len()) as u64;
            self.buffer.clear();
            self.check_size()?;
            return self.write_back();
        }
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    // The buffer and what comes behind it, in one call if the kernel takes all of it.
    fn write_with_buffer(&self, bytes: &[u8]) -> Result<(), LayerError> {
        if self.buffer.is_empty() {
            return self.write(bytes, self.start);
        }
        let both = [IoSlice::new(&self.buffer), IoSlice::new(bytes)];
        let written = match rustix::io::pwritev(self.file, &both, self.start) {
            Err(rustix::io::Errno::INTR) => 0,
            other => other.map_err(|errno| LayerError::WriteFile(errno.into()))?,
        };
        let of_buffer = written.min(self.buffer.len());
        self.write(&self.buffer[of_buffer..], self.start + of_buffer as u64)?;
        let of_bytes = written - of_buffer;
        self.write(&bytes[of_bytes..], self.start + (self.buffer.len() + of_bytes) as u64)
    }

    /// Appends zeros; long runs of them become a hole of the file.
    pub(crate) fn append_zeros(&mut self, mut length: u64) -> Result<(), LayerError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        if length > 4 * BLOCK_U64 {
            self.pad_to(BLOCK_U64, &mut length)?;
            let whole = length / BLOCK_U64 * BLOCK_U64;
            self.skip(whole)?;
            length -= whole;
        }
        while length > 0 {
            let take = length.min(BLOCK_U64);
            self.append(&ZEROS[..take as usize])?;
            length -= take;
        }
        Ok(())
    }

    // Zeros up to the next multiple, taken off `length`.
    fn pad_to(&mut self, multiple: u64, length: &mut u64) -> Result<(), LayerError> {
        let padding = self.position().next_multiple_of(multiple) - self.position();
        *length -= padding;
        self.append_zeros(padding)
    }

    /// Zeros up to the next block.
    pub(crate) fn pad_to_block(&mut self) -> Result<(), LayerError> {
        self.append_zeros(self.position().next_multiple_of(BLOCK_U64) - self.position())
    }

    /// Leaves `length` bytes to be written later with [`write_at`](Self::write_at), or never.
    pub(crate) fn skip(&mut self, length: u64) -> Result<(), LayerError> {
        self.flush()?;
        self.start += length;
        self.check_size()
    }

    /// Writes to a place that was skipped or flushed.
    pub(crate) fn write_at(&self, bytes: &[u8], position: u64) -> Result<(), LayerError> {
        self.write(bytes, position)
    }

    /// Reads what was written, buffered or not.
    pub(crate) fn read_at(&mut self, bytes: &mut [u8], position: u64) -> Result<(), LayerError> {
        self.flush()?;
        self.file.read_exact_at(bytes, position).map_err(LayerError::WriteFile)
    }

    /// Writes out what is buffered.
    pub(crate) fn flush(&mut self) -> Result<(), LayerError> {
        if !self.buffer.is_empty() {
            self.write(&self.buffer, self.start)?;
            self.start += self.buffer.len() as u64;
            self.buffer.clear();
        }
        self.check_size()?;
        self.write_back()
    }

    fn write(&self, bytes: &[u8], position: u64) -> Result<(), LayerError> {
        self.file.write_all_at(bytes, position).map_err(LayerError::WriteFile)
    }

    fn check_size(&self) -> Result<(), LayerError> {
        if self.start / BLOCK_U64 > MAX_BLOCKS {
            return Err(LayerError::Limit { what: "bytes of the layer file", limit: MAX_BLOCKS * BLOCK_U64 });
        }
        Ok(())
    }

    fn write_back(&mut self) -> Result<(), LayerError> {
        let length = self.start - self.written_back;
        if length >= WRITEBACK_STEP {
            match hull_sys::writeback::start(self.file, self.written_back, length) {
                // Only a hint: file systems without it write back by themselves.
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error()) => {
                    return Err(LayerError::WriteFile(error));
                }
                Err(_) => {}
            }
            self.written_back = self.start;
        }
        Ok(())
    }
}

/// Refuses a file that cannot be read back, before anything is written to it.
pub(crate) fn check_access(file: &File) -> Result<(), LayerError> {
    let flags = rustix::fs::fcntl_getfl(file).map_err(|error| LayerError::WriteFile(error.into()))?;
    if flags.contains(rustix::fs::OFlags::RDWR) {
        Ok(())
    } else {
        let message = "the file is not open for both reading and writing";
        Err(LayerError::WriteFile(io::Error::new(io::ErrorKind::PermissionDenied, message)))
    }
}
