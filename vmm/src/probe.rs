//! Whether this host's KVM can run a guest's kernel: asked before any pod is promised a machine.
//!
//! A /dev/kvm that is there may still not do: it may be another's, it may lack what a machine needs, or it may be one that
//! runs a guest's user space on the processor and emulates its kernel, instruction by instruction; a kernel then takes
//! minutes to its first process. So a few instructions are really run, with a bound.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Where KVM is.
pub const DEVICE: &str = "/dev/kvm";
/// A bound for [`probe`] that leaves a busy host time enough.
pub const LIMIT: Duration = Duration::from_secs(3);

const API_VERSION: i32 = 12;
const REQUIRED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Most rounds of the guest's loop, each ended by an exit, so that we see how it goes on.
const ROUNDS: u32 = 30;
/// Instructions of a round: two for each turn.
const TURNS: u32 = 50_000;
/// Processor time of a round that is not emulated: a processor takes 0.05 ms, one that is emulated whole (hack/node) less
/// than 1 ms, an emulated ring 0 some 55 ms.
const FAST: Duration = Duration::from_millis(15);
/// Any round may be slow, if the host is busy and is a guest itself, but so many are not by chance.
const SLOW_ROUNDS: u32 = 3;
/// Rounds that prove it.
const FAST_ROUNDS: u32 = 3;

/// Why there can be no machines here. The text is what a user gets to see.
#[derive(Debug, Error)]
pub enum Reason {
    /// There is none.
    #[error(
        "there is no /dev/kvm: the processor's virtualisation is off or not offered to this machine, or the module kvm_intel or kvm_amd is not loaded"
    )]
    Missing,
    /// It is there, but not for us.
    #[error("/dev/kvm may not be opened: {0}")]
    Forbidden(io::Error),
    /// It is not KVM, or one of another time.
    #[error("/dev/kvm does not speak version 12 of KVM's interface, but {0}")]
    Version(i32),
    /// It cannot do something that a machine needs.
    #[error("this kernel's KVM lacks {0}")]
    Lacks(&'static str),
    /// A call failed.
    #[error("KVM cannot {doing}: {source}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It runs a guest's kernel, but far too slowly.
    #[error(
        "/dev/kvm{by} emulates the guest's kernel instead of running it on the processor ({TURNS} turns of an empty loop take {time:?}): no guest would come up"
    )]
    Emulated {
        /// " (module …)", if it is known.
        by: String,
        /// Processor time of a round.
        time: Duration,
    },
    /// The guest's code did something else than it should.
    #[error("/dev/kvm runs a guest's code wrongly: {0}")]
    Wrong(String),
    /// It did not come back.
    #[error("/dev/kvm did not finish a few instructions of a guest in {0:?}")]
    Hung(Duration),
}

/// Opens /dev/kvm.
///
/// # Errors
/// It is missing or forbidden.
pub fn open() -> Result<OwnedFd, Reason> {
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(file) => Ok(file.into()),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => Err(Reason::Missing),
        // The node is there, the module is not.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => Err(Reason::Missing),
        Err(e) => Err(Reason::Forbidden(e)),
    }
}

/// Whether `kvm` (an open /dev/kvm) can run a guest's kernel; takes milliseconds where it can, and `limit` at most.
/// Blocks: call it on a thread that may.
///
/// # Errors
/// Why it cannot.
pub fn probe(kvm: BorrowedFd<'_>, limit: Duration) -> Result<(), Reason> {
    let kvm = kvm.as_fd().try_clone_to_owned();
    let kvm = adopt(kvm.map_err(|source| Reason::Failed { doing: "be shared", source })?);
    match kvm.get_api_version() {
        API_VERSION => {}
        other => return Err(Reason::Version(other)),
    }
    if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(Reason::Lacks(name));
    }
    let (done, outcome) = channel();
    let thread = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            let _ = done.send(Guest::new(&kvm).and_then(Guest::run));
        })
        .map_err(|source| Reason::Failed { doing: "be tried on a thread", source })?;
    match outcome.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(Reason::Wrong("the trial ended without a result".into())),
        Err(RecvTimeoutError::Timeout) => {
            // It is somewhere in KVM_RUN: a signal brings it back, or nothing does.
            let since = Instant::now();
            if register_signal_handler(SIGRTMIN(), kicked).is_ok() {
                while outcome.try_recv().is_err() && since.elapsed() < limit {
                    let _ = thread.kill(SIGRTMIN());
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            Err(Reason::Hung(limit))
        }
    }
}

/// The modules that are known to emulate a guest's ring 0.
fn emulating_module() -> Option<&'static str> {
    ["kvm_pvm"].into_iter().find(|module| Path::new("/sys/module").join(module).exists())
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

const PAGE: usize = 4096;
/// Guest memory: page tables, then the code.
const MEMORY: usize = 16 * PAGE;
const CODE: usize = 4 * PAGE;
const PORT: u16 = 0x10;

/// A guest of one processor in 64-bit mode, ring 0, that counts.
struct Guest {
    vcpu: VcpuFd,
    // Dropped after the processor: KVM reads the memory until the VM is gone.
    _vm: VmFd,
    _memory: Vec<u8>,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, Reason> {
        let failed = |doing| {
            move |e: kvm_ioctls::Error| Reason::Failed {
                doing,
                source: io::Error::from_raw_os_error(e.errno()),
            }
        };
        let vm = kvm.create_vm().map_err(failed("make a virtual machine"))?;
        // One page more than is used, as a slot begins at a page.
        let mut memory = vec![0u8; MEMORY + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        let used = memory.get_mut(start..start + MEMORY).unwrap_or_default();
        fill(used);
        set_slot(&vm, used).map_err(failed("take memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("make a virtual processor"))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("tell the processor's features"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("set the processor's features"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: 8,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr3 = PAGE as u64;
        sregs.cr4 |= 1 << 5;
        sregs.cr0 |= 1 << 31 | 1;
        sregs.efer |= 1 << 8 | 1 << 10;
        vcpu.set_sregs(&sregs).map_err(failed("set 64-bit mode"))?;
        let regs = kvm_regs { rip: CODE as u64, rflags: 2, ..kvm_regs::default() };
        vcpu.set_regs(&regs).map_err(failed("set registers"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    fn run(mut self) -> Result<(), Reason> {
        let mut fast = 0;
        let mut fastest = Duration::MAX;
        for round in 1..=ROUNDS {
            let time = self.round()?;
            fastest = fastest.min(time);
            fast += u32::from(time < FAST);
            if fast == FAST_ROUNDS {
                return Ok(());
            }
            if round >= SLOW_ROUNDS && fast == 0 {
                let by = emulating_module().map_or(String::new(), |module| format!(" (module {module})"));
                return Err(Reason::Emulated { by, time: fastest });
            }
        }
        Ok(())
    }

    /// The processor time of one.
    fn round(&mut self) -> Result<Duration, Reason> {
        let start = processor_time();
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => Ok(processor_time().saturating_sub(start)),
            Ok(other) => Err(Reason::Wrong(format!("it met {other:?}"))),
            Err(e) => {
                Err(Reason::Failed { doing: "run a guest", source: io::Error::from_raw_os_error(e.errno()) })
            }
        }
    }
}

/// Page tables that map the first 2 MiB onto themselves, and the program.
fn fill(memory: &mut [u8]) {
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = memory.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(PAGE, &((2 * PAGE as u64) | 3).to_le_bytes());
    put(2 * PAGE, &((3 * PAGE as u64) | 3).to_le_bytes());
    put(3 * PAGE, &0x83u64.to_le_bytes());
    let [t0, t1, t2, t3] = TURNS.to_le_bytes();
    #[rustfmt::skip]
    put(CODE, &[
        0xb9, t0, t1, t2, t3,       // round: mov ecx, TURNS
        0xff, 0xc9,                 // turn:  dec ecx
        0x75, 0xfc,                 //        jnz turn
        0xe6, PORT as u8,           //        out PORT, al
        0xeb, 0xf3,                 //        jmp round
    ]);
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[allow(unsafe_code)]
fn set_slot(vm: &VmFd, memory: &mut [u8]) -> Result<(), kvm_ioctls::Error> {
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_mut_ptr() as u64,
    };
    // SAFETY: the memory is that long, begins at a page, is not touched by us while the guest runs (Guest keeps it and
    // shows it to nobody), and is freed after the VM.
    unsafe { vm.set_user_memory_region(slot) }
}

#[allow(unsafe_code)]
fn adopt(kvm: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is ours, and stays open as long as the Kvm that now owns it.
    unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_kvm_is_here_the_answer_comes_in_time() {
        let start = Instant::now();

        let answer = open().and_then(|kvm| probe(kvm.as_fd(), LIMIT));

        eprintln!(
            "{:?}: {}",
            start.elapsed(),
            answer.as_ref().map_or_else(ToString::to_string, |()| "able".into())
        );
        assert!(start.elapsed() < 2 * LIMIT + Duration::from_secs(1));
        if Path::new("/sys/module/kvm_pvm").exists() {
            assert!(matches!(answer, Err(Reason::Emulated { .. })), "{answer:?}");
        }
    }

    #[test]
    fn what_is_not_kvm_is_not_taken_for_it() {
        let null = std::fs::File::open("/dev/null").unwrap();

        assert!(matches!(probe(null.as_fd(), LIMIT), Err(Reason::Version(_))));
    }
}
