//! The tables: a hardware-reduced machine (ACPI 6.5, 4.1) whose devices are all in the DSDT.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use std::io;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::devices::virtio::GuestMemory;

const OEM: [u8; 6] = *b"HULL  ";
const TABLE: [u8; 8] = *b"HULLVMM ";
const REVISION: u32 = 1;
/// FADT, "IA-PC Boot Architecture Flags": neither VGA nor a CMOS clock; and, not being set, no legacy devices and no
/// keyboard controller.
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
/// `SLP_TYP` of soft-off, as the DSDT's `\_S5` says.
pub const SOFT_OFF: u8 = 5;
/// Written to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Writes the tables for a machine with this many processors and virtio devices; returns where the root pointer is.
///
/// # Errors
/// They do not fit.
pub fn write(memory: &GuestMemory, cpus: u32, devices: usize) -> io::Result<u64> {
    let mut at = layout::ACPI.next_multiple_of(16) + Rsdp::len().next_multiple_of(16) as u64;
    let mut place = |bytes: &[u8]| {
        let start = at;
        let end = start + bytes.len() as u64;
        if end > layout::ACPI_END {
            return Err(io::Error::other("the ACPI tables do not fit"));
        }
        memory.write_slice(bytes, GuestAddress(start)).map_err(|e| io::Error::other(e.to_string()))?;
        at = end.next_multiple_of(16);
        Ok(start)
    };
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&description(cpus, devices));
    let dsdt = place(dsdt.as_slice())?;
    let fadt = place(&bytes(&fixed(dsdt)))?;
    let madt = place(&bytes(&interrupts(cpus)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt))?;
    let root = bytes(&Rsdp::new(OEM, xsdt));
    memory.write_slice(&root, GuestAddress(layout::ACPI)).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(layout::ACPI)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fixed(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi)
        // The buttons are not there, in the sense that these bits have.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.sleep_control_reg = port(layout::POWER_PORT);
    fadt.sleep_status_reg = port(layout::POWER_PORT + 1);
    fadt.reset_reg = port(layout::POWER_PORT + 2);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"hull-vmm").into();
    fadt.finalize()
}

fn interrupts(cpus: u32) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC));
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu as u8, cpu as u8, EnabledStatus::Enabled));
    }
    madt
}

/// The content of the DSDT.
fn description(cpus: u32, devices: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut scope = Vec::new();
    for cpu in 0..cpus {
        aml::Device::new(
            aml::Path::new(&format!("C{cpu:03}")),
            vec![&aml::Name::new("_HID".into(), &"ACPI0007"), &aml::Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut scope);
    }
    serial(&mut scope);
    panic_device(&mut scope);
    generation_device(&mut scope);
    for device in 0..devices {
        virtio(&mut scope, device as u32);
    }
    bytes.extend(aml::Scope::raw("\\_SB_".into(), scope));
    let sleep = SOFT_OFF;
    aml::Name::new("\\_S5_".into(), &aml::Package::new(vec![&sleep, &sleep, &0u8, &0u8]))
        .to_aml_bytes(&mut bytes);
    bytes
}

fn serial(scope: &mut Vec<u8>) {
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(scope);
}

/// pvpanic, as the kernel's driver for QEMU's finds it.
fn panic_device(scope: &mut Vec<u8>) {
    aml::Device::new(
        "PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(
                    layout::PVPANIC_PORT,
                    layout::PVPANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(scope);
}

/// The generation identifier ("Virtual Machine Generation ID", Microsoft 2012), and the event device that announces a
/// new one. Linux knows it by `VMGENCTR`; the compatible id is that of the specification.
fn generation_device(scope: &mut Vec<u8>) {
    let (low, high) = (layout::GENERATION as u32, (layout::GENERATION >> 32) as u32);
    aml::Device::new(
        "VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(scope);
    aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::GENERATION_IRQ,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &0x80u8)],
            ),
        ],
    )
    .to_aml_bytes(scope);
}

/// A virtio-mmio device (virtio 1.2, 4.2.1; Linux finds it by `LNRO0005`).
fn virtio(scope: &mut Vec<u8>, index: u32) {
    let address = layout::MMIO as u32 + index * layout::MMIO_SIZE as u32;
    aml::Device::new(
        aml::Path::new(&format!("V{index:03}")),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, address, layout::MMIO_SIZE as u32),
                    &aml::Interrupt::new(true, true, false, false, layout::MMIO_IRQ + index),
                ]),
            ),
        ],
    )
    .to_aml_bytes(scope);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &GuestMemory, address: u64) -> (String, Vec<u8>) {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    }

    #[test]
    fn tables_are_found_from_the_root_and_their_sums_are_right() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();

        let root = write(&memory, 64, layout::MMIO_DEVICES).unwrap();

        let xsdt: u64 = memory.read_obj(GuestAddress(root + 24)).unwrap();
        let (name, xsdt) = table(&memory, xsdt);
        assert_eq!(name, "XSDT");
        let entries: Vec<u64> =
            xsdt[36..].chunks(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap())).collect();
        let fadt = table(&memory, entries[0]);
        let madt = table(&memory, entries[1]);
        let dsdt = table(&memory, u64::from_le_bytes(fadt.1[140..148].try_into().unwrap()));
        assert_eq!((fadt.0.as_str(), madt.0.as_str(), dsdt.0.as_str()), ("FACP", "APIC", "DSDT"));
        for bytes in [&xsdt, &fadt.1, &madt.1, &dsdt.1] {
            assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
        assert_eq!(madt.1.len(), 44 + 12 + 64 * 8);
    }
}
