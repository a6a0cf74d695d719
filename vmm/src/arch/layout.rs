//! The map of guest physical memory: what lies where, in one place. x86-64.
//!
//! ```text
//! 0x0000_7000  start information of the kernel (PVH), or its boot parameters (bzImage)
//! 0x0000_8000  its memory map and list of modules
//! 0x0000_9000  page tables for the 64-bit entry (3 levels of identity for 1 GiB)
//! 0x0002_0000  command line
//! 0x0009_fc00  end of low memory
//! 0x000e_0000  ACPI: the root pointer, then the tables, then the page of the generation identifier
//! 0x0010_0000  memory, up to 3 GiB: the kernel below, the initramfs at its end
//! 0xc000_0000  the gap: no memory
//! 0xd000_0000  virtio-mmio devices, a page each
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  pages that KVM keeps for Intel processors without unrestricted guests
//! 4 GiB        the rest of the memory, then (aligned to 1 GiB) the region of virtio-mem
//! ```

/// Boot parameters of the 64-bit protocol, or the PVH start information.
pub const BOOT_INFO: u64 = 0x7000;
/// PVH: the memory map; the list of modules is behind it.
pub const BOOT_TABLES: u64 = 0x8000;
/// First of the page tables (PML4, PDPT, one PD) of the 64-bit entry.
pub const PAGE_TABLES: u64 = 0x9000;
/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for it, with the final zero. Linux takes 2048 (`COMMAND_LINE_SIZE`).
pub const CMDLINE_SIZE: usize = 2048;
/// End of what is usable below the first MiB.
pub const LOW_END: u64 = 0x9_fc00;
/// The ACPI root pointer; the kernel looks here if nobody tells it where.
pub const ACPI: u64 = 0xe_0000;
/// End of the tables.
pub const ACPI_END: u64 = 0xf_0000;
/// A page of reserved memory that holds the generation identifier, at offset 40 as its specification asks (8-aligned, not
/// page-aligned).
pub const GENERATION_PAGE: u64 = 0xf_0000;
/// The generation identifier: 16 bytes.
pub const GENERATION: u64 = GENERATION_PAGE + 40;
/// Where memory for the kernel begins.
pub const HIGH_START: u64 = 0x10_0000;
/// Where the memory below 4 GiB ends at the latest.
pub const GAP_START: u64 = 0xc000_0000;
/// Where the memory goes on.
pub const GAP_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device.
pub const MMIO: u64 = 0xd000_0000;
/// Room of each.
pub const MMIO_SIZE: u64 = 0x1000;
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// Identity map page of KVM.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment.
pub const TSS: usize = 0xfffb_d000;
/// Alignment of the region of virtio-mem: no less than any size of a Linux memory block that a guest of ours chooses, and
/// that of the largest page.
pub const HOTPLUG_ALIGNMENT: u64 = 1 << 30;

/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of the first virtio-mmio device; the others follow. The I/O APIC of KVM has 24 lines.
pub const MMIO_IRQ: u32 = 5;
/// The most virtio-mmio devices.
pub const MMIO_DEVICES: usize = 17;
/// Interrupt of the generic event device, which announces a new generation identifier.
pub const GENERATION_IRQ: u32 = 23;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Data and status of the keyboard controller, of which only the reset line exists.
pub const I8042_STATUS: u16 = 0x64;
/// pvpanic, where QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status, and reset: a byte each.
pub const POWER_PORT: u16 = 0x600;
/// Where the agent says how far it is.
pub const BOOT_EVENT_PORT: u16 = 0x0d00;

/// Memory at birth as (start, length) of guest physical addresses: below the gap, and the rest above 4 GiB.
#[must_use]
pub fn memory_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= GAP_START { vec![(0, size)] } else { vec![(0, GAP_START), (GAP_END, size - GAP_START)] }
}

/// What a kernel uses while it boots, of a machine born with `size` bytes: (start, end), multiples of 2 MiB, measured with
/// ours. Below are its image, linked to 16 MiB (`CONFIG_PHYSICAL_START`), and the first pages that its allocator gives
/// away. Its tables, which it takes before it has an allocator, are at the end: 64 bytes for each page, and what does not
/// depend on the size.
#[must_use]
pub fn used_at_boot(size: u64) -> [(u64, u64); 2] {
    const IMAGE: u64 = 36 << 20;
    const TABLES: u64 = 14 << 20;
    let (start, length) = if size <= GAP_START { (0, size) } else { (GAP_END, size - GAP_START) };
    let tables = (TABLES + size / 64).next_multiple_of(2 << 20).min(length);
    let end = start + length;
    let high = end - tables;
    [(0, IMAGE.min(if start == 0 { high } else { GAP_START })), (high, end)]
}

/// Where the region of virtio-mem begins in a machine born with `size` bytes.
#[must_use]
pub fn hotplug_start(size: u64) -> u64 {
    let end = GAP_END + size.saturating_sub(GAP_START);
    end.next_multiple_of(HOTPLUG_ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_gap_below_4_gib_free() {
        assert_eq!(memory_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(memory_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(memory_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn hotplug_begins_above_4_gib_and_above_all_memory() {
        assert_eq!(hotplug_start(128 << 20), 4 << 30);
        assert_eq!(hotplug_start(3 << 30), 4 << 30);
        assert_eq!(hotplug_start((3 << 30) + (2 << 20)), 5 << 30);
        assert_eq!(hotplug_start(5 << 30), 6 << 30);
    }

    #[test]
    fn what_a_kernel_uses_at_boot_lies_within_the_memory_and_is_taken_once() {
        assert_eq!(used_at_boot(128 << 20), [(0, 36 << 20), (112 << 20, 128 << 20)]);
        for size in [64 << 20, 66 << 20, 1 << 30, 3 << 30, (3 << 30) + (2 << 20), 4 << 30, 4 << 40] {
            let [low, high] = used_at_boot(size);
            assert!(low.0 < low.1 && high.0 < high.1 && low.1 <= high.0, "{size} {low:?} {high:?}");
            let ranges = memory_ranges(size);
            for (start, end) in [low, high] {
                assert_eq!((start % (2 << 20), end % (2 << 20)), (0, 0), "{size}");
                assert!(ranges.iter().any(|(at, length)| *at <= start && end <= at + length), "{size}");
            }
        }
    }

    #[test]
    fn all_interrupt_lines_differ_and_exist() {
        assert!(u64::from(MMIO_IRQ) + MMIO_DEVICES as u64 <= u64::from(GENERATION_IRQ));
        const { assert!(SERIAL_IRQ < MMIO_IRQ && GENERATION_IRQ < 24) }
    }
}
