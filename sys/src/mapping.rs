//! Shared mappings of files that large pages fit into.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

use libc::{c_int, c_void, off_t};

/// The processor's second page size, in bytes.
pub const LARGE_PAGE: usize = 2 << 20;
/// Its first.
const PAGE: usize = 4096;

/// Maps `length` bytes of a file from `offset` on, shared, for reading and writing, at a multiple of [`LARGE_PAGE`]. The
/// mapping stays until the process ends; not a page is allocated.
///
/// # Errors
/// No room in the address space, or a file that cannot be mapped so.
pub fn map_shared(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<NonNull<u8>> {
    let offset = off_t::try_from(offset).map_err(io::Error::other)?;
    let whole = length
        .checked_add(LARGE_PAGE)
        .filter(|_| length > 0)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let nowhere = ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice touches none that exists.
    let room = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        mapped(libc::mmap(nowhere, whole, libc::PROT_NONE, flags, -1, 0))?
    };
    let skipped = room.align_offset(LARGE_PAGE);
    // SAFETY: what is mapped over and what is given back lies within the room just made, which nobody else knows of:
    // `skipped` is less than LARGE_PAGE, so `length` bytes fit behind it.
    unsafe {
        let start = room.add(skipped);
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let result = mapped(libc::mmap(start.cast(), length, access, flags, file.as_raw_fd(), offset));
        if result.is_err() {
            libc::munmap(room.cast(), whole);
        } else {
            if skipped > 0 {
                libc::munmap(room.cast(), skipped);
            }
            let end = length.next_multiple_of(PAGE);
            if skipped + end < whole {
                libc::munmap(room.add(skipped + end).cast(), whole - skipped - end);
            }
        }
        NonNull::new(result?).ok_or_else(|| io::Error::other("it was mapped at address 0"))
    }
}

/// Puts large pages behind a part of a mapping that [`map_shared`] made; both numbers are multiples of [`LARGE_PAGE`].
/// What is there stays; where nothing is there are zeros. Works whatever the machine's policy for shared memory, unless
/// it denies large pages.
///
/// # Errors
/// Linux before 6.1, or no large page to be had: then all or a part has small ones, as they are needed.
pub fn use_large_pages(mapping: NonNull<u8>, offset: usize, length: usize) -> io::Result<()> {
    let start = mapping.as_ptr().wrapping_add(offset);
    // Nothing is collapsed where not a single page is.
    for piece in (0..length).step_by(LARGE_PAGE) {
        advise(start.wrapping_add(piece), PAGE, libc::MADV_POPULATE_WRITE)?;
    }
    advise(start, length, libc::MADV_COLLAPSE)
}

fn advise(start: *mut u8, length: usize, advice: c_int) -> io::Result<()> {
    // SAFETY: both kinds of advice change how memory is backed and nothing that is in it, and fail where no memory is.
    let result = unsafe { libc::madvise(start.cast(), length, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn mapped(address: *mut c_void) -> io::Result<*mut u8> {
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_mapping_is_aligned_shows_the_file_and_keeps_its_content_when_it_gets_large_pages() {
        let file = rustix::fs::memfd_create("hull-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(4 * LARGE_PAGE as u64).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"content", (LARGE_PAGE + 5) as u64).unwrap();

        let mapping = map_shared(file.as_fd(), LARGE_PAGE as u64, 3 * LARGE_PAGE).unwrap();
        // A machine without large pages, or with none left, says so: nothing is lost either way.
        let outcome = use_large_pages(mapping, 0, 2 * LARGE_PAGE);

        assert_eq!(mapping.as_ptr() as usize % LARGE_PAGE, 0);
        // SAFETY: the bytes are within the mapping, and nobody writes them now.
        let content = unsafe { std::slice::from_raw_parts(mapping.as_ptr().add(5), 7) };
        assert_eq!(content, b"content", "{outcome:?}");
    }

    /// Bytes of large pages in the page tables of the mapping that begins at this address (proc(5), smaps).
    fn mapped_large(start: usize) -> u64 {
        let table = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_mapping = table.lines().skip_while(|line| !line.starts_with(&format!("{start:x}-")));
        let line = of_mapping.skip(1).find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    #[test]
    fn large_pages_are_really_there_if_nothing_is_said_against() {
        let file =
            File::from(rustix::fs::memfd_create("hull-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(2 * LARGE_PAGE as u64).unwrap();
        let mapping = map_shared(file.as_fd(), 0, 2 * LARGE_PAGE).unwrap();
        let start = mapping.as_ptr() as usize;
        assert_eq!(mapped_large(start), 0);
        // A machine that has none to give says so, and nothing can be seen of them.
        if let Err(error) = use_large_pages(mapping, 0, LARGE_PAGE) {
            eprintln!("this machine gives no large pages: {error}");
            return;
        }

        assert_eq!(mapped_large(start), LARGE_PAGE as u64);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let file = File::open("/proc/self/stat").unwrap();

        assert!(map_shared(file.as_fd(), 0, LARGE_PAGE).is_err());
        assert!(map_shared(file.as_fd(), 0, 0).is_err());
        assert!(map_shared(file.as_fd(), 0, usize::MAX).is_err());
    }
}
