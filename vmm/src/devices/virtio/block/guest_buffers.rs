use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::devices::virtio::Memory;

/// The data buffers of one request, as the kernel's vectored calls take them, so that data goes between a file and guest
/// memory without a copy in between.
///
/// Filled once with [`GuestBuffers::push`], then consumed from the front: each call moves on by what it transferred.
/// Reused from request to request, so that a request allocates nothing.
pub(super) struct GuestBuffers {
    memory: Memory,
    /// All in `memory`.
    vectors: Vec<libc::iovec>,
    /// The first vector that is not wholly consumed.
    first: usize,
    remaining: u64,
    done: u64,
}

// SAFETY: the pointers are to memory that `memory` keeps mapped, which any thread may access; see `push`.
#[allow(unsafe_code)]
unsafe impl Send for GuestBuffers {}

/// How long a call may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// Only if no disk has to be waited for: else `WouldBlock`, perhaps after a part.
    None,
    /// As long as it takes.
    Full,
}

/// A buffer is not in the guest's memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OutsideMemory;

impl GuestBuffers {
    /// None yet.
    pub(super) fn new(memory: Memory) -> Self {
        Self { memory, vectors: Vec::new(), first: 0, remaining: 0, done: 0 }
    }

    /// Empty again, for the next request.
    pub(super) fn clear(&mut self) {
        self.vectors.clear();
        (self.first, self.remaining, self.done) = (0, 0, 0);
    }

    /// The memory that the buffers are in.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Appends `length` bytes at `address`. The caller bounds the number of calls.
    pub(super) fn push(&mut self, address: GuestAddress, length: u32) -> Result<(), OutsideMemory> {
        for slice in self.memory.get_slices(address, length as usize) {
            let slice = slice.map_err(|_| OutsideMemory)?;
            let pointer = slice.ptr_guard_mut().as_ptr();
            self.vectors.push(libc::iovec { iov_base: pointer.cast(), iov_len: slice.len() });
            self.remaining += slice.len() as u64;
        }
        Ok(())
    }

    /// Bytes that are still to be transferred.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Bytes that have been transferred.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// Fills at most `limit` bytes from `file` at `offset` with one system call; 0 is the file's end.
    pub(super) fn read_from(
        &mut self,
        file: &File,
        offset: u64,
        limit: u64,
        patience: Patience,
    ) -> io::Result<u64> {
        let flags = if patience == Patience::None { libc::RWF_NOWAIT } else { 0 };
        self.transfer(limit, offset, |vectors, offset| {
            // SAFETY: every vector is within guest memory, mapped as long as `self.memory` is held (see `push`). That the
            // guest may access it at the same time is so for all of its memory; no Rust reference to it exists.
            #[allow(unsafe_code)]
            unsafe {
                libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset, flags)
            }
        })
    }

    /// Writes at most `limit` bytes to `file` at `offset` with one system call.
    pub(super) fn write_to(&mut self, file: &File, offset: u64, limit: u64) -> io::Result<u64> {
        self.transfer(limit, offset, |vectors, offset| {
            // SAFETY: as in `read_from`.
            #[allow(unsafe_code)]
            unsafe {
                libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset)
            }
        })
    }

    /// Fills `count` bytes, or what remains if that is less, with zeros.
    pub(super) fn zero(&mut self, count: u64) {
        let mut left = count.min(self.remaining);
        while left > 0 {
            let Some(vector) = self.vectors.get(self.first) else { return };
            let length = left.min(vector.iov_len as u64);
            // SAFETY: the vector is within guest memory, mapped as long as `self.memory` is held (see `push`), and only
            // bytes are written, which the guest may do at the same time.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, length as usize);
            }
            self.consume(length);
            left -= length;
        }
    }

    /// One system call with the vectors that make up the next `limit` bytes.
    fn transfer(
        &mut self,
        limit: u64,
        offset: u64,
        call: impl Fn(&[libc::iovec], i64) -> isize,
    ) -> io::Result<u64> {
        let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let (last, full) = self.cut(limit);
        let result = loop {
            let count = call(&self.vectors[self.first..last], offset);
            if let Ok(count) = u64::try_from(count) {
                break Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                break Err(error);
            }
        };
        if let Some(full) = full {
            self.vectors[last - 1].iov_len = full;
        }
        let count = result?;
        self.consume(count);
        Ok(count)
    }

    /// Shortens the vectors to `limit` bytes: the end of those to use, and the true length of the last if it was cut.
    fn cut(&mut self, limit: u64) -> (usize, Option<usize>) {
        let mut left = limit;
        let mut end = self.first;
        while left > 0 && end < self.vectors.len() && end - self.first < MOST_VECTORS {
            let length = self.vectors[end].iov_len;
            end += 1;
            if length as u64 > left {
                self.vectors[end - 1].iov_len = left as usize;
                return (end, Some(length));
            }
            left -= length as u64;
        }
        (end, None)
    }

    fn consume(&mut self, count: u64) {
        // A count beyond what was asked for cannot be; if it were, no vector would be used any more.
        let mut left = count.min(self.remaining);
        self.remaining -= left;
        self.done += left;
        while left > 0 {
            let Some(vector) = self.vectors.get_mut(self.first) else { return };
            let length = vector.iov_len as u64;
            if left < length {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left as usize);
                vector.iov_len -= left as usize;
                return;
            }
            left -= length;
            self.first += 1;
        }
    }
}

/// IOV_MAX of the kernel.
const MOST_VECTORS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;
    use vm_memory::Bytes;

    use crate::devices::virtio::GuestMemory;

    fn memory() -> Memory {
        // Two regions side by side and a third behind a gap.
        let ranges = [(0, 0x2000), (0x2000, 0x1000), (0x10000, 0x1000)];
        Arc::new(GuestMemory::from_ranges(&ranges.map(|(at, size)| (GuestAddress(at), size))).unwrap())
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_buffer_may_cross_regions_but_not_leave_memory() {
        let mut buffers = GuestBuffers::new(memory());
        buffers.push(GuestAddress(0x1f00), 0x200).unwrap();
        assert_eq!((buffers.vectors.len(), buffers.remaining()), (2, 0x200));
        for (address, length) in [(0x2fff, 2), (0xffff, 1), (0x3000, 1), (u64::MAX, 2), (0, u32::MAX)] {
            assert_eq!(buffers.push(GuestAddress(address), length), Err(OutsideMemory), "{address:#x}");
        }
    }

    #[test]
    fn reading_goes_on_where_the_last_call_stopped_whatever_the_limits_are() {
        let bytes: Vec<u8> = (0..=255).cycle().take(0x500).collect();
        let file = file(&bytes);
        let memory = memory();
        let mut buffers = GuestBuffers::new(memory.clone());
        for (address, length) in [(0x100, 0x80), (0x1f80, 0x100), (0, 0), (0x10000, 0x200)] {
            buffers.push(GuestAddress(address), length).unwrap();
        }
        let mut at = 0x10;
        for limit in [1, 0x7f, 0x100, 5, 1000] {
            at += buffers.read_from(&file, at, limit, Patience::Full).unwrap();
        }
        assert_eq!((buffers.done(), buffers.remaining(), at), (0x380, 0, 0x390));
        let mut got = vec![0; 0x380];
        memory.read_slice(&mut got[..0x80], GuestAddress(0x100)).unwrap();
        memory.read_slice(&mut got[0x80..0x180], GuestAddress(0x1f80)).unwrap();
        memory.read_slice(&mut got[0x180..], GuestAddress(0x10000)).unwrap();
        assert_eq!(got, bytes[0x10..0x390]);
    }

    #[test]
    fn writing_and_zeroing_touch_exactly_their_bytes() {
        let file = file(&[]);
        let memory = memory();
        memory.write_slice(&[7; 64], GuestAddress(0x200)).unwrap();
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0x200), 64).unwrap();
        assert_eq!(buffers.write_to(&file, 3, 10).unwrap(), 10);
        assert_eq!(file.metadata().unwrap().len(), 13);
        buffers.zero(4);
        let mut got = [0; 64];
        memory.read_slice(&mut got, GuestAddress(0x200)).unwrap();
        assert_eq!(got[..10], [7; 10]);
        assert_eq!(got[10..14], [0; 4]);
        assert_eq!(got[14..], [7; 50]);
        buffers.zero(u64::MAX);
        assert_eq!(buffers.remaining(), 0);
        buffers.clear();
        assert_eq!((buffers.done(), buffers.vectors.len()), (0, 0));
    }
}
