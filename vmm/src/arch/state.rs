//! What KVM keeps of a machine, saved and put back in the order that KVM needs.

use std::io;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::registers::errno;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Registers that say what happened on the host, or that cannot be written back: machine check status that reads as
/// nothing, the performance counters that a guest does not have, and those of Hyper-V, which it is not told of.
const LEFT_OUT: [std::ops::RangeInclusive<u32>; 5] =
    [0xc1..=0xc8, 0x186..=0x18d, 0x309..=0x30b, 0x4000_0000..=0x4000_01ff, 0xc001_0200..=0xc001_020b];
/// Bound of a list of registers that comes from a file.
const MAX_MSRS: usize = 1024;

/// A processor.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    /// Cycles per millisecond that the guest believes in.
    tsc_khz: u32,
}

/// The machine without its processors: interrupt controllers and clock.
#[derive(Serialize, Deserialize)]
pub struct ChipState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    clock: kvm_clock_data,
}

/// Indices of the model specific registers that are saved, in the order in which they must be written back.
///
/// # Errors
/// KVM does not tell.
pub fn saved_registers(kvm: &Kvm) -> io::Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().map_err(errno)?;
    Ok(ordered(list.as_slice().iter().copied()))
}

/// TSC first, the deadline that counts in it last: written the other way round, KVM would compute the timer with the
/// old TSC (and fire at once, or never).
fn ordered(indices: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut list: Vec<_> =
        indices.filter(|index| !LEFT_OUT.iter().any(|range| range.contains(index))).collect();
    list.sort_by_key(|index| match *index {
        MSR_TSC => (0, 0),
        MSR_TSC_DEADLINE => (2, 0),
        other => (1, other),
    });
    list.dedup();
    list
}

impl VcpuState {
    /// Reads a vCPU that does not run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(vcpu: &VcpuFd, registers: &[u32]) -> io::Result<Self> {
        // First: reading it makes KVM deliver a pending INIT or SIPI, which changes the rest.
        let mp_state = vcpu.get_mp_state().map_err(errno)?;
        let state = Self {
            mp_state,
            regs: vcpu.get_regs().map_err(errno)?,
            sregs: vcpu.get_sregs().map_err(errno)?,
            xsave: vcpu.get_xsave().map_err(errno)?,
            xcrs: vcpu.get_xcrs().map_err(errno)?,
            debug: vcpu.get_debug_regs().map_err(errno)?,
            lapic: vcpu.get_lapic().map_err(errno)?,
            msrs: read_msrs(vcpu, registers)?,
            events: vcpu.get_vcpu_events().map_err(errno)?,
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        };
        // Nothing that depends on time may be read after this in a vCPU that runs on: it does not.
        Ok(state)
    }

    /// Writes it into a fresh vCPU that has its CPUID. Call [`resumed`] when the machine goes on.
    ///
    /// # Errors
    /// KVM refuses: another processor, or no state at all.
    #[allow(unsafe_code)]
    pub fn restore(&self, vcpu: &VcpuFd) -> io::Result<()> {
        if self.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(errno)?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(errno)?;
        vcpu.set_regs(&self.regs).map_err(errno)?;
        vcpu.set_sregs(&self.sregs).map_err(errno)?;
        // SAFETY: KVM reads the 4096 bytes of the structure, and no more, as no process of ours has asked for features
        // whose state is larger (arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(errno)?;
        vcpu.set_xcrs(&self.xcrs).map_err(errno)?;
        vcpu.set_debug_regs(&self.debug).map_err(errno)?;
        // Before the registers: the mode of its timer decides what a deadline means.
        vcpu.set_lapic(&self.lapic).map_err(errno)?;
        write_msrs(vcpu, &self.msrs)?;
        // Last, as setting registers may drop pending events.
        vcpu.set_vcpu_events(&self.events).map_err(errno)
    }
}

/// The machine goes on after a pause: the guest's watchdogs must not count the time in between.
///
/// # Errors
/// KVM refuses; a guest that has not set up its clock is no error.
pub fn resumed(vcpu: &VcpuFd) -> io::Result<()> {
    match vcpu.kvmclock_ctrl() {
        // The guest does not use kvmclock (yet).
        Err(e) if e.errno() == libc::EINVAL => Ok(()),
        other => other.map_err(errno),
    }
}

fn read_msrs(vcpu: &VcpuFd, registers: &[u32]) -> io::Result<Vec<kvm_msr_entry>> {
    let mut values = Vec::with_capacity(registers.len());
    let mut rest = registers;
    while !rest.is_empty() {
        let chunk: Vec<_> =
            rest.iter().take(64).map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&chunk).map_err(|e| io::Error::other(format!("{e:?}")))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(errno)?;
        values.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
        // KVM stops at the first that this vCPU does not have.
        let skip = if read < chunk.len() { read + 1 } else { read };
        rest = rest.get(skip..).unwrap_or_default();
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> io::Result<()> {
    if values.len() > MAX_MSRS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too many model specific registers"));
    }
    // Whoever wrote the file, the order is ours.
    let mut values = values.to_vec();
    let order = ordered(values.iter().map(|value| value.index));
    values.retain(|value| order.contains(&value.index));
    values.sort_by_key(|value| order.iter().position(|index| *index == value.index));
    for chunk in values.chunks(64) {
        let msrs = Msrs::from_entries(chunk).map_err(|e| io::Error::other(format!("{e:?}")))?;
        let written = vcpu.set_msrs(&msrs).map_err(errno)?;
        if let Some(refused) = chunk.get(written) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("KVM does not take model specific register {:#x}", refused.index),
            ));
        }
    }
    Ok(())
}

impl ChipState {
    /// Reads the interrupt controllers and the clock of a machine whose vCPUs do not run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(vm: &VmFd) -> io::Result<Self> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            vm.get_irqchip(&mut chip).map_err(errno)?;
            Ok::<_, io::Error>(chip)
        };
        let mut clock = vm.get_clock().map_err(errno)?;
        // Flags are answers here, and would be commands when it is set: the clock goes on where it stood.
        clock.flags = 0;
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            clock,
        })
    }

    /// Writes them back, before any vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> io::Result<()> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).map_err(errno)?;
        }
        vm.set_clock(&self.clock).map_err(errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_is_written_before_the_deadline_that_counts_in_it() {
        let order = ordered([MSR_TSC_DEADLINE, 0xc000_0080, 0x4000_0020, 0x1b, MSR_TSC, 0x1b].into_iter());

        assert_eq!(order, [MSR_TSC, 0x1b, 0xc000_0080, MSR_TSC_DEADLINE]);
    }

    /// KVM exists here, even where it cannot run a kernel: its state can be read and written.
    #[test]
    fn a_vcpu_and_its_chips_survive_a_round_trip() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(crate::arch::layout::TSS).unwrap();
        vm.create_irq_chip().unwrap();
        let cpuid = crate::arch::cpuid::Identification::of(&kvm, 2).unwrap();
        let registers = saved_registers(&kvm).unwrap();
        let first = vm.create_vcpu(0).unwrap();
        first.set_cpuid2(&cpuid.for_vcpu(0)).unwrap();
        crate::arch::registers::prepare(&first).unwrap();
        let regs = kvm_regs { rip: 0x1234, rflags: 2, rax: 77, ..kvm_regs::default() };
        first.set_regs(&regs).unwrap();

        let saved = serde_json::to_vec(&VcpuState::save(&first, &registers).unwrap()).unwrap();
        let chips = serde_json::to_vec(&ChipState::save(&vm).unwrap()).unwrap();
        let other = kvm.create_vm().unwrap();
        other.set_tss_address(crate::arch::layout::TSS).unwrap();
        other.create_irq_chip().unwrap();
        let second = other.create_vcpu(0).unwrap();
        second.set_cpuid2(&cpuid.for_vcpu(0)).unwrap();
        serde_json::from_slice::<ChipState>(&chips).unwrap().restore(&other).unwrap();
        serde_json::from_slice::<VcpuState>(&saved).unwrap().restore(&second).unwrap();
        resumed(&second).unwrap();

        assert_eq!(second.get_regs().unwrap(), regs);
        let again = VcpuState::save(&second, &registers).unwrap();
        assert_eq!(again.sregs, first.get_sregs().unwrap());
        let indices = |state: &VcpuState| state.msrs.iter().map(|msr| msr.index).collect::<Vec<_>>();
        assert_eq!(indices(&again), indices(&serde_json::from_slice(&saved).unwrap()));
    }
}
