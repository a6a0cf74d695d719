use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use std::io;

/// Leaves whose content is of the host alone: monitor, cache access, performance counters, SGX, processor trace, SVM, IBS,
/// SEV, performance counters 2, extended topology of AMD. The guest reads zeros.
const EMPTIED: [u32; 11] =
    [0x5, 0x9, 0xa, 0x12, 0x14, 0x1c, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022, 0x8000_0026];
/// Extended topology, made anew.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

const fn bits<const N: usize>(bits: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < N {
        mask |= 1 << bits[i];
        i += 1;
    }
    mask
}

/// Leaf 1 ECX, not for a guest: DTES64, MONITOR, DS-CPL, VMX (nested virtualisation is not offered), SMX, EIST, TM2, SDBG,
/// PDCM.
const LEAF_1_ECX_HIDDEN: u32 = bits([2, 3, 4, 5, 6, 7, 8, 11, 15]);
/// Leaf 1 ECX, always there: x2APIC, the hypervisor bit.
const LEAF_1_ECX_SET: u32 = bits([21, 31]);
/// Leaf 1 ECX: the timer of the local APIC that counts in TSC cycles.
const TSC_DEADLINE: u32 = bits([24]);
/// Leaf 7.0 EBX: SGX, HLE, RDT-M, RTM, RDT-A, processor trace. (Transactional memory leaks.)
const LEAF_7_EBX_HIDDEN: u32 = bits([2, 4, 11, 12, 15, 25]);
/// Leaf 7.0 ECX: key locker, bus lock detection, ENQCMD, SGX launch control.
const LEAF_7_ECX_HIDDEN: u32 = bits([23, 24, 29, 30]);
/// Leaf 0x8000_0001 ECX: SVM, IBS, SKINIT, watchdog, lightweight profiling, performance counters (core, northbridge, L2/L3).
const LEAF_81_ECX_HIDDEN: u32 = bits([2, 10, 12, 13, 15, 23, 24, 28]);

/// AMD's leaf of power management, which Intel has too; EDX: the TSC counts at one rate, and always.
const POWER_MANAGEMENT: u32 = 0x8000_0007;
const INVARIANT_TSC: u32 = bits([8]);

/// What every vCPU of a machine is, before its own number is put in.
pub struct Identification {
    common: CpuId,
    cpus: u32,
}

impl Identification {
    /// What KVM supports on this host, without what a guest must not see.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn of(kvm: &Kvm, cpus: u32) -> io::Result<Self> {
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self::sanitised(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer), cpus))
    }

    fn sanitised(supported: &[kvm_cpuid_entry2], tsc_deadline: bool, cpus: u32) -> Self {
        let highest = supported.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
        let mut entries: Vec<_> =
            supported.iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).copied().collect();
        for entry in &mut entries {
            sanitise(entry, tsc_deadline, cpus);
        }
        if highest >= 0xb {
            entries.extend(topology(0xb, cpus));
        }
        if highest >= 0x1f {
            entries.extend(topology(0x1f, cpus));
        }
        entries.truncate(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        // Fails only beyond the maximum just respected; nothing at all would then be identified, and KVM refuse to run.
        let common = CpuId::from_entries(&entries)
            .unwrap_or_else(|_| CpuId::new(0).unwrap_or_else(|_| unreachable!("an empty list fits")));
        Self { common, cpus }
    }

    /// Whether the guest may take its time from the TSC itself, without asking KVM.
    #[must_use]
    pub fn has_invariant_tsc(&self) -> bool {
        let leaf = self.common.as_slice().iter().find(|entry| entry.function == POWER_MANAGEMENT);
        leaf.is_some_and(|entry| entry.edx & INVARIANT_TSC != 0)
    }

    /// For the vCPU of this number, which is its APIC id too.
    #[must_use]
    pub fn for_vcpu(&self, index: u32) -> CpuId {
        let mut cpuid = self.common.clone();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | index << 24,
                0xb | 0x1f => entry.edx = index,
                0x8000_001e => {
                    entry.eax = index;
                    // Core id; one thread per core.
                    entry.ebx = index & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        let _ = self.cpus;
        cpuid
    }
}

/// Bits that an APIC id needs for this many processors.
fn width(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

fn sanitise(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool, cpus: u32) {
    let others = cpus - 1;
    match entry.function {
        0x1 => {
            entry.ecx = entry.ecx & !LEAF_1_ECX_HIDDEN | LEAF_1_ECX_SET;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            // Addressable processors in the package.
            entry.ebx = entry.ebx & 0xff00_ffff | (1 << width(cpus)) << 16;
            entry.edx = if cpus > 1 { entry.edx | 1 << 28 } else { entry.edx & !(1 << 28) };
        }
        // Caches as Intel tells them: cores of the package, and the threads that share this cache.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { others } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | others.min(63) << 26;
        }
        // Of the power management only that the APIC timer never stops.
        0x6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (1 << 2, 0, 0, 0),
        0x7 if entry.index == 0 => {
            entry.ebx &= !LEAF_7_EBX_HIDDEN;
            entry.ecx &= !LEAF_7_ECX_HIDDEN;
        }
        0x8000_0001 => entry.ecx &= !LEAF_81_ECX_HIDDEN,
        // Address sizes stay; the number of cores, and the bits of the APIC id for them.
        0x8000_0008 => entry.ecx = width(cpus) << 12 | others,
        // Caches as AMD tells them.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { others } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        function if EMPTIED.contains(&function) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Extended topology: one thread per core, all cores in one package.
fn topology(function: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, 0, 1, 1), level(1, width(cpus), cpus, 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn a_guest_sees_no_virtualisation_extensions_and_no_counters_of_the_host() {
        let host = [
            entry(0, 0x1f, 0, 0, 0),
            entry(1, 0, 0, u32::MAX, u32::MAX),
            entry(0xa, u32::MAX, 1, 1, 1),
            entry(7, 0, u32::MAX, u32::MAX, 0),
            entry(0x8000_0001, 0, 0, u32::MAX, 0),
            entry(0x8000_000a, 1, 1, 1, 1),
        ];

        let cpuid = Identification::sanitised(&host, true, 4).for_vcpu(0);

        let one = leaf(&cpuid, 1, 0);
        assert_eq!(one.ecx & (1 << 5 | 1 << 3 | 1 << 15), 0, "VMX, MONITOR, PDCM");
        assert_ne!(one.ecx & 1 << 31, 0, "the hypervisor bit");
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & 1 << 2, 0, "SVM");
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 0x8000_000a, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 7, 0).ebx & (1 << 2 | 1 << 11), 0, "SGX, RTM");
    }

    #[test]
    fn each_vcpu_finds_its_own_number_everywhere() {
        let host = [
            entry(0, 0x1f, 0, 0, 0),
            entry(1, 0, 0xaabb_0800, 0, 0),
            entry(0xb, 9, 9, 9, 9),
            entry(0x8000_001e, 9, 9, 9, 9),
        ];

        let cpuid = Identification::sanitised(&host, true, 6).for_vcpu(5);

        assert_eq!(leaf(&cpuid, 1, 0).ebx, 5 << 24 | 8 << 16 | 0x0800);
        assert_eq!(leaf(&cpuid, 0xb, 0).edx, 5);
        let core = leaf(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(leaf(&cpuid, 0x1f, 1).ebx, 6);
        assert_eq!((leaf(&cpuid, 0x8000_001e, 0).eax, leaf(&cpuid, 0x8000_001e, 0).ebx), (5, 5));
    }

    #[test]
    fn the_guest_is_told_of_an_invariant_tsc_exactly_if_the_host_has_one() {
        let with = |edx| Identification::sanitised(&[entry(0x8000_0007, 0, 0, 0, edx)], true, 1);

        assert!(with(1 << 8).has_invariant_tsc());
        assert!(!with(!(1 << 8)).has_invariant_tsc());
        assert!(!Identification::sanitised(&[], true, 1).has_invariant_tsc());
    }

    #[test]
    fn a_single_processor_has_no_siblings() {
        let host = [entry(0, 0xb, 0, 0, 0), entry(1, 0, 0, 0, u32::MAX), entry(4, 0xfc00_4163, 0, 0, 0)];

        let cpuid = Identification::sanitised(&host, false, 1).for_vcpu(0);

        assert_eq!(leaf(&cpuid, 1, 0).edx & 1 << 28, 0);
        assert_eq!(leaf(&cpuid, 4, 0).eax & 0xffff_c000, 0);
    }
}
