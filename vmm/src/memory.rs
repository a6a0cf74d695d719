//! The guest's memory: one memfd, mapped once, and handed to KVM as memory slots at birth.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use hull_sys::mapping;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

use crate::arch::layout;
use crate::devices::virtio::{GuestMemory, Memory};

/// Sizes are multiples of this: what virtio-mem plugs, and a page of the processor's second size.
pub const ALIGNMENT: u64 = 2 << 20;
/// The most memory of one machine, with what it may get later.
pub const MAXIMUM: u64 = 4 << 40;
/// The least that a kernel with its initramfs comes up in.
pub const MINIMUM: u64 = 64 << 20;

/// The guest's memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A size that cannot be served.
    #[error("a machine of {boot} bytes that may grow to {maximum} bytes cannot be: {reason}")]
    Size {
        /// At birth.
        boot: u64,
        /// At most.
        maximum: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The memfd could not be made or mapped.
    #[error("cannot {doing} {size} bytes of guest memory: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// How much.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// KVM refused a slot.
    #[error("KVM does not take {size} bytes of guest memory at {start:#x}: {source}")]
    Slot {
        /// Guest physical address.
        start: u64,
        /// How much.
        size: u64,
        /// Why.
        source: io::Error,
    },
}

/// The memory of one machine, mapped until the process ends.
pub struct MachineMemory {
    /// What devices share.
    pub memory: Memory,
    /// The memfd behind it: another process that serves a device maps this.
    pub file: Arc<File>,
    /// The region of virtio-mem: guest physical start and length (0: the machine cannot grow).
    pub hotplug: (u64, u64),
    /// What the machine was born with, in bytes.
    pub boot: u64,
}

impl MachineMemory {
    /// Reserves address space for a machine of `boot` bytes that may grow to `maximum`; not a page is allocated.
    ///
    /// # Errors
    /// Sizes that are not multiples of [`ALIGNMENT`] or out of bounds, or a failed system call.
    pub fn new(boot: u64, maximum: u64) -> Result<Self, MemoryError> {
        let refuse = |reason| MemoryError::Size { boot, maximum, reason };
        if !(MINIMUM..=MAXIMUM).contains(&boot) || maximum > MAXIMUM {
            return Err(refuse("it is out of bounds"));
        }
        if !boot.is_multiple_of(ALIGNMENT) || !maximum.is_multiple_of(ALIGNMENT) {
            return Err(refuse("sizes are multiples of 2 MiB"));
        }
        let growth = maximum.checked_sub(boot).ok_or_else(|| refuse("it would shrink"))?;
        let io = |doing| move |source| MemoryError::Io { doing, size: maximum, source };
        let file = sealed_file(maximum).map_err(io("make"))?;
        let file = Arc::new(file);
        let mut ranges = layout::memory_ranges(boot);
        let hotplug = (layout::hotplug_start(boot), growth);
        if growth > 0 {
            ranges.push(hotplug);
        }
        let mut regions = Vec::with_capacity(ranges.len());
        let mut offset = 0;
        for (start, size) in ranges {
            regions.push(map(&file, offset, start, size).map_err(io("map"))?);
            offset += size;
        }
        let memory =
            GuestMemory::from_regions(regions).map_err(|e| io("arrange")(io::Error::other(e.to_string())))?;
        Ok(Self { memory: Arc::new(memory), file, hotplug, boot })
    }

    /// Allocates large pages for the parts that every kernel uses to the full when it boots: one fault of the guest, which
    /// KVM answers with a large page of its own, instead of 512. Shared memory gets none by itself on most machines,
    /// whatever they do for private memory. Where none is to be had, there will be small ones as they are needed.
    pub fn prepare_boot(&self) {
        for (from, to) in layout::used_at_boot(self.boot) {
            let region = self.memory.find_region(GuestAddress(from));
            let Some((region, start)) = region.and_then(|it| Some((it, NonNull::new(it.as_ptr())?))) else {
                continue;
            };
            let offset = from - region.start_addr().raw_value();
            let _ = mapping::use_large_pages(start, offset as usize, (to - from) as usize);
        }
    }

    /// Hands every region to KVM, a slot each.
    ///
    /// # Errors
    /// KVM refused: no more slots, or an address beyond what the processor has.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, region) in self.memory.iter().enumerate() {
            set_slot(vm, slot as u32, region).map_err(|source| MemoryError::Slot {
                start: region.start_addr().raw_value(),
                size: region.len(),
                source,
            })?;
        }
        Ok(())
    }
}

/// A memfd of this size, which nobody can shrink under a mapping or grow (a peer that maps it cannot make us fault).
fn sealed_file(size: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let fd = rustix::fs::memfd_create("hull-guest", flags)
        // Kernels before 6.3 do not know NOEXEC_SEAL.
        .or_else(|_| rustix::fs::memfd_create("hull-guest", flags & !MemfdFlags::NOEXEC_SEAL))?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}

#[allow(unsafe_code)]
fn map(file: &Arc<File>, offset: u64, start: u64, size: u64) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let mapping = mapping::map_shared(file.as_fd(), offset, length)?;
    let builder = MmapRegionBuilder::new(length)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
    // SAFETY: the mapping was just made with this length, access and flags, and stays as long as the process does.
    let region = unsafe { builder.with_raw_mmap_pointer(mapping.as_ptr()) }.build();
    let region = region.map_err(|e| io::Error::other(e.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(start)).ok_or_else(|| io::Error::other("addresses overflow"))
}

#[allow(unsafe_code)]
fn set_slot(vm: &VmFd, slot: u32, region: &GuestRegionMmap) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the mapping is `memory_size` bytes long and lives in an Arc that the machine keeps longer than the VM;
    // whoever reads or writes it in this process goes through vm-memory's volatile accesses.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_3_gib_lies_above_the_gap_and_the_growth_above_that() {
        let memory = MachineMemory::new(4 << 30, 6 << 30).unwrap();

        let ranges: Vec<_> =
            memory.memory.iter().map(|region| (region.start_addr().raw_value(), region.len())).collect();

        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30), (5 << 30, 2 << 30)]);
        assert_eq!(memory.hotplug, (5 << 30, 2 << 30));
        assert!(memory.memory.write_obj(1u8, GuestAddress(0xd000_0000)).is_err());
        memory.memory.write_obj(1u8, GuestAddress((7 << 30) - 1)).unwrap();
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for (boot, maximum) in [
            (0, 0),
            (1 << 20, 1 << 30),
            ((64 << 20) + 4096, 1 << 30),
            (1 << 30, 512 << 20),
            (1 << 30, u64::MAX),
        ] {
            assert!(MachineMemory::new(boot, maximum).is_err(), "{boot} {maximum}");
        }
    }

    #[test]
    fn a_peer_cannot_shrink_the_memory_under_us() {
        let memory = MachineMemory::new(64 << 20, 64 << 20).unwrap();

        assert!(memory.file.set_len(0).is_err());
    }
}
