use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use std::io;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::devices::virtio::GuestMemory;

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Xen's PVH protocol: 32-bit, no paging, `ebx` = start information. For an ELF kernel that has the note.
    Pvh(u64),
    /// The 64-bit protocol of Linux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): identity-mapped, `rsi` =
    /// boot parameters.
    Linux64(u64),
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back everywhere.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Prepares the first processor for a kernel; the others wait for it to start them (INIT, SIPI), as KVM made them.
///
/// # Errors
/// KVM refuses, or guest memory has no place for page tables.
pub fn enter(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> io::Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(errno)?;
    let regs = match entry {
        Entry::Pvh(address) => {
            flat_segments(&mut sregs, memory, false)?;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            kvm_regs { rip: address, rbx: layout::BOOT_INFO, rflags: 2, ..kvm_regs::default() }
        }
        Entry::Linux64(address) => {
            flat_segments(&mut sregs, memory, true)?;
            page_tables(&mut sregs, memory)?;
            kvm_regs {
                rip: address,
                rsi: layout::BOOT_INFO,
                rsp: layout::BOOT_INFO,
                rbp: layout::BOOT_INFO,
                rflags: 2,
                ..kvm_regs::default()
            }
        }
    };
    vcpu.set_sregs(&sregs).map_err(errno)?;
    vcpu.set_regs(&regs).map_err(errno)
}

/// What every processor needs whoever starts it.
///
/// # Errors
/// KVM refuses.
pub fn prepare(vcpu: &VcpuFd) -> io::Result<()> {
    // All exceptions of the FPU masked, as after FNINIT.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
    vcpu.set_fpu(&fpu).map_err(errno)?;
    let msr = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let msrs = Msrs::from_entries(&[
        msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ])
    .map_err(|e| io::Error::other(format!("{e:?}")))?;
    match vcpu.set_msrs(&msrs).map_err(errno)? {
        2 => Ok(()),
        set => Err(io::Error::other(format!("KVM takes {set} of 2 model specific registers"))),
    }
}

fn flat_segments(sregs: &mut kvm_sregs, memory: &GuestMemory, long: bool) -> io::Result<()> {
    // Null, code, data, task state: base 0, limit 4 GiB.
    let code = descriptor(if long { 0xa09b } else { 0xc09b }, 0xf_ffff);
    let data = descriptor(0xc093, 0xf_ffff);
    let task = descriptor(0x008b, 0x67);
    let table = [0u64, code, data, task];
    for (i, entry) in table.iter().enumerate() {
        memory
            .write_obj(*entry, GuestAddress(layout::GDT + 8 * i as u64))
            .map_err(|e| io::Error::other(e.to_string()))?;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (table.len() * 8 - 1) as u16;
    let segment = |selector: u16, type_: u8, db: u8, l: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(0x8, 0xb, u8::from(!long), u8::from(long));
    let data = segment(0x10, 0x3, 1, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..kvm_segment::default() };
    Ok(())
}

/// A segment descriptor with base 0 (Intel SDM 3A, 3.4.5).
fn descriptor(flags: u64, limit: u64) -> u64 {
    (flags & 0xf0ff) << 40 | (limit & 0xf_0000) << 32 | limit & 0xffff
}

/// Maps the first GiB onto itself with pages of 2 MiB.
fn page_tables(sregs: &mut kvm_sregs, memory: &GuestMemory) -> io::Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (top, middle, bottom) =
        (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    let write = |value: u64, address: u64| {
        memory.write_obj(value, GuestAddress(address)).map_err(|e| io::Error::other(e.to_string()))
    };
    write(middle | PRESENT_WRITABLE, top)?;
    write(bottom | PRESENT_WRITABLE, middle)?;
    for i in 0..512 {
        write(i << 21 | PRESENT_WRITABLE | LARGE, bottom + 8 * i)?;
    }
    sregs.cr3 = top;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(())
}

/// KVM's errors as those of the standard library.
pub(crate) fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_manual_says() {
        assert_eq!(descriptor(0xa09b, 0xf_ffff), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(0xc09b, 0xf_ffff), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(0xc093, 0xf_ffff), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(0x008b, 0x67), 0x0000_8b00_0000_0067);
    }
}
