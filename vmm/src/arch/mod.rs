//! What is particular to x86-64: the map of memory, processors as the guest sees them, ACPI, and the state of a machine
//! that KVM keeps.

/// ACPI tables: which devices and processors there are.
pub mod acpi;
/// Processor identification, with what a guest must not see taken out.
pub mod cpuid;
/// Where everything lies in guest physical memory.
pub mod layout;
/// Registers of a processor when a kernel takes over.
pub mod registers;
/// Save and restore of vCPUs, interrupt controllers and the clock.
pub mod state;

/// The most processors of a machine: what CONFIG_NR_CPUS of the guest kernel allows.
pub const MAX_CPUS: u32 = 64;
