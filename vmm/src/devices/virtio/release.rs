//! Guest memory that the guest does not need now, given back to the host.

use std::io;

use rustix::fs::FallocateFlags;
use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::Memory;

/// The unit in which memory is given back.
pub(super) const PAGE: u64 = 4096;

/// Gives the whole pages of a range of guest memory back to the host: what the guest reads there next is zeros (or, in a
/// machine that was cloned, what the template has there), and writing takes memory again. What is not guest memory is
/// passed over. Returns the bytes given back.
///
/// # Errors
/// A system call failed; a part may have been given back.
pub(super) fn release(memory: &Memory, address: GuestAddress, length: u64) -> io::Result<u64> {
    let Some(start) = address.0.checked_next_multiple_of(PAGE) else { return Ok(0) };
    let end = address.0.saturating_add(length) / PAGE * PAGE;
    let mut released = 0;
    for region in memory.iter() {
        let first = start.max(region.start_addr().raw_value());
        let last = end.min(region.start_addr().raw_value() + region.len());
        if first < last {
            let within = first - region.start_addr().raw_value();
            release_of_region(region, within, last - first)?;
            released += last - first;
        }
    }
    Ok(released)
}

fn release_of_region(region: &vm_memory::GuestRegionMmap<()>, within: u64, length: u64) -> io::Result<()> {
    let shared = region.flags() & libc::MAP_SHARED != 0;
    match region.file_offset() {
        // The memory is the file: whoever else maps it sees the same.
        Some(file) if shared => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let at = file.start() + within;
            loop {
                match rustix::fs::fallocate(file.file(), flags, at, length) {
                    Err(rustix::io::Errno::INTR) => {}
                    result => return Ok(result?),
                }
            }
        }
        // Private: only what this process has of its own.
        _ => forget(region, within, length),
    }
}

fn forget(region: &vm_memory::GuestRegionMmap<()>, within: u64, length: u64) -> io::Result<()> {
    let range = region
        .get_slice(vm_memory::MemoryRegionAddress(within), length as usize)
        .map_err(|e| io::Error::other(e.to_string()))?;
    let pointer = range.ptr_guard_mut();
    // SAFETY: the range is within a private mapping of guest memory, which `region` keeps mapped. Its content changes, as
    // the guest could change it at any time; no Rust reference into it exists.
    #[allow(unsafe_code)]
    let result = unsafe { libc::madvise(pointer.as_ptr().cast(), range.len(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::devices::virtio::GuestMemory;
    use vm_memory::{Bytes, FileOffset};

    /// Guest memory as a machine has it: a memfd, shared.
    pub(in super::super) fn shared_memory(ranges: &[(u64, usize)]) -> (Memory, std::fs::File) {
        let file = rustix::fs::memfd_create("hull-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(file);
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, size) in ranges {
            let part = FileOffset::new(file.try_clone().unwrap(), offset);
            offset += *size as u64;
            file.set_len(offset).unwrap();
            regions.push((GuestAddress(*start), *size, Some(part)));
        }
        (Memory::new(GuestMemory::from_ranges_with_files(regions).unwrap()), file)
    }

    pub(in super::super) fn allocated(file: &std::fs::File) -> u64 {
        use std::os::unix::fs::MetadataExt;
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn whole_pages_go_back_across_regions_and_nothing_else_does() {
        let (memory, file) = shared_memory(&[(0, 0x4000), (0x4000, 0x4000), (0x10_0000, 0x4000)]);
        memory.write_slice(&[7; 0x8000], GuestAddress(0)).unwrap();
        memory.write_slice(&[7; 0x4000], GuestAddress(0x10_0000)).unwrap();
        assert_eq!(allocated(&file), 0xc000);
        assert_eq!(release(&memory, GuestAddress(0x1800), 0x4000).unwrap(), 0x3000);
        assert_eq!(allocated(&file), 0x9000);
        let mut bytes = vec![0; 0x8000];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(bytes[..0x2000], [7; 0x2000]);
        assert_eq!(bytes[0x2000..0x5000], [0; 0x3000]);
        assert_eq!(bytes[0x5000..], [7; 0x3000]);
        for (address, length) in
            [(0x9000, 0x1000), (u64::MAX, 1), (u64::MAX - 0x2000, u64::MAX), (0x7fff, 1), (0, 0)]
        {
            assert_eq!(release(&memory, GuestAddress(address), length).unwrap(), 0, "{address:#x}");
        }
        assert_eq!(release(&memory, GuestAddress(0x7000), 0x1000_0000).unwrap(), 0x5000);
    }

    #[test]
    fn private_memory_is_forgotten() {
        let memory = crate::devices::virtio::driver::memory(0x4000);
        memory.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        assert_eq!(release(&memory, GuestAddress(0x1000), 0x1000).unwrap(), 0x1000);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 7);
    }
}
