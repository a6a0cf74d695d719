//! Direct boot: puts a kernel, its initramfs and its command line into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, ReadVolatile};

use crate::arch::layout;
use crate::arch::registers::Entry;
use crate::devices::virtio::GuestMemory;

/// A kernel could not be put into memory.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel's file.
    #[error("cannot load the guest kernel: {0}")]
    Kernel(String),
    /// The initramfs.
    #[error("cannot load the initramfs of {size} bytes: {reason}")]
    Initramfs {
        /// Its size.
        size: u64,
        /// Why.
        reason: String,
    },
    /// The command line.
    #[error("the kernel's command line of {0} bytes is longer than the {max} it takes, or is not plain text", max = layout::CMDLINE_SIZE - 1)]
    Cmdline(usize),
    /// What tells the kernel where all this is.
    #[error("cannot write the boot parameters: {0}")]
    Parameters(String),
}

const ELF: [u8; 4] = *b"\x7fELF";
const PAGE: u64 = 4096;
/// Room that a kernel needs behind its image before it has set up its memory.
const KERNEL_SLACK: u64 = 4 << 20;
/// `hvm_start_info.magic`: "xEn3" with the high bit of the first byte set.
const PVH_MAGIC: u32 = 0x336e_c578;
/// e820 and PVH types.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// bzImage: bit 0 of `xloadflags`, there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Loads everything; `memory` was born with `boot` bytes, `rsdp` is the ACPI root pointer. Returns how to enter.
///
/// # Errors
/// A file that is no kernel, or too little memory.
pub fn load(
    memory: &GuestMemory,
    boot: u64,
    kernel: &mut File,
    initramfs: &mut File,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    write_cmdline(memory, cmdline)?;
    let loaded = load_kernel(memory, kernel)?;
    let top = boot.min(layout::GAP_START).min(loaded.initramfs_below) & !(PAGE - 1);
    let initramfs = load_initramfs(memory, initramfs, loaded.end, top)?;
    match loaded.entry {
        Entry::Pvh(_) => pvh_parameters(memory, boot, initramfs, rsdp),
        Entry::Linux64(_) => {
            let header = loaded.header.unwrap_or_default();
            linux_parameters(memory, boot, header, initramfs, cmdline.len(), rsdp)
        }
    }
    .map_err(BootError::Parameters)?;
    Ok(loaded.entry)
}

struct Loaded {
    entry: Entry,
    /// End of what the kernel needs until it runs.
    end: u64,
    /// The initramfs must lie below this.
    initramfs_below: u64,
    header: Option<setup_header>,
}

fn load_kernel(memory: &GuestMemory, kernel: &mut File) -> Result<Loaded, BootError> {
    let failed = |e: &dyn std::fmt::Display| BootError::Kernel(e.to_string());
    let mut magic = [0; 4];
    kernel.rewind().and_then(|()| kernel.read_exact(&mut magic)).map_err(|e| failed(&e))?;
    let start = Some(GuestAddress(layout::HIGH_START));
    if magic == ELF {
        let loaded = Elf::load(memory, None, kernel, start).map_err(|e| failed(&e))?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
            _ => Entry::Linux64(loaded.kernel_load.0),
        };
        return Ok(Loaded {
            entry,
            end: loaded.kernel_end + KERNEL_SLACK,
            initramfs_below: u64::MAX,
            header: None,
        });
    }
    let loaded = BzImage::load(memory, None, kernel, start).map_err(|e| failed(&e))?;
    let header = loaded.setup_header.ok_or_else(|| failed(&"it has no header"))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(failed(&"it has no 64-bit entry"));
    }
    // It unpacks itself to its preferred address, or behind itself.
    let unpacked = { header.pref_address }.max(loaded.kernel_load.0) + u64::from(header.init_size);
    Ok(Loaded {
        entry: Entry::Linux64(loaded.kernel_load.0 + ENTRY_64),
        end: unpacked.max(loaded.kernel_end) + KERNEL_SLACK,
        initramfs_below: u64::from(header.initrd_addr_max) + 1,
        header: Some(header),
    })
}

/// At the end of what it may have: the kernel frees it as one piece.
fn load_initramfs(
    memory: &GuestMemory,
    file: &mut File,
    kernel_end: u64,
    top: u64,
) -> Result<(u64, u64), BootError> {
    let size = file.seek(SeekFrom::End(0)).map_err(|e| failed(0, &e))?;
    fn failed(size: u64, e: &dyn std::fmt::Display) -> BootError {
        BootError::Initramfs { size, reason: e.to_string() }
    }
    let start = top.checked_sub(size).map(|start| start & !(PAGE - 1));
    let start = start
        .filter(|start| *start >= kernel_end)
        .ok_or_else(|| failed(size, &"the machine has too little memory below 3 GiB for it"))?;
    file.rewind().map_err(|e| failed(size, &e))?;
    let length = usize::try_from(size).map_err(|e| failed(size, &e))?;
    read_into(memory, file, start, length).map_err(|e| failed(size, &e))?;
    Ok((start, size))
}

fn read_into(memory: &GuestMemory, file: &mut File, start: u64, length: usize) -> io::Result<()> {
    for slice in memory.get_slices(GuestAddress(start), length) {
        let slice = slice.map_err(|e| io::Error::other(e.to_string()))?;
        file.read_exact_volatile(&mut slice.clone()).map_err(|e| io::Error::other(e.to_string()))?;
    }
    Ok(())
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    let plain = cmdline.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !plain || cmdline.len() >= layout::CMDLINE_SIZE {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|e| BootError::Parameters(e.to_string()))
}

/// Start, length and type of all that the kernel is told of.
fn memory_map(boot: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_END, RAM),
        // The tables, and the page of the generation identifier.
        (layout::ACPI, layout::HIGH_START - layout::ACPI, RESERVED),
    ];
    for (start, size) in layout::memory_ranges(boot) {
        let from = start.max(layout::HIGH_START);
        map.push((from, start + size - from, RAM));
    }
    map
}

fn pvh_parameters(memory: &GuestMemory, boot: u64, initramfs: (u64, u64), rsdp: u64) -> Result<(), String> {
    let write = |e: vm_memory::GuestMemoryError| e.to_string();
    let map = memory_map(boot);
    let mut at = layout::BOOT_TABLES;
    for (addr, size, type_) in &map {
        let entry = hvm_memmap_table_entry { addr: *addr, size: *size, type_: *type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at)).map_err(write)?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    let module = hvm_modlist_entry { paddr: initramfs.0, size: initramfs.1, ..hvm_modlist_entry::default() };
    memory.write_obj(module, GuestAddress(at)).map_err(write)?;
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: 1,
        modlist_paddr: at,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::BOOT_TABLES,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    memory.write_obj(info, GuestAddress(layout::BOOT_INFO)).map_err(write)
}

fn linux_parameters(
    memory: &GuestMemory,
    boot: u64,
    mut header: setup_header,
    initramfs: (u64, u64),
    cmdline: usize,
    rsdp: u64,
) -> Result<(), String> {
    // Boot parameters as Documentation/arch/x86/boot.rst has them.
    header.boot_flag = 0xaa55;
    header.header = u32::from_le_bytes(*b"HdrS");
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    header.cmdline_size = cmdline as u32;
    header.ramdisk_image = initramfs.0 as u32;
    header.ramdisk_size = initramfs.1 as u32;
    if header.kernel_alignment == 0 {
        header.kernel_alignment = 0x100_0000;
    }
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..boot_params::default() };
    for (i, (addr, size, type_)) in memory_map(boot).into_iter().enumerate() {
        parameters.e820_table[i] = boot_e820_entry { addr, size, type_ };
        parameters.e820_entries = i as u8 + 1;
    }
    memory.write_obj(parameters, GuestAddress(layout::BOOT_INFO)).map_err(|e| e.to_string())
}
