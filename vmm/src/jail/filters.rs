//! System call filters: what each kind of thread may ask of the kernel. Anything else kills the process.
//!
//! A filter belongs to a thread and to the threads that it starts, so every thread is started before the starter is
//! confined, and no filter lets a thread be started. Threads share memory: a filter of a neighbour is no boundary inside
//! the process, all of them together are what a broken process has left.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a virtual processor.
    Vcpu,
    /// Serves disks.
    Block,
    /// Serves the network device.
    Net,
    /// Serves vsock and writes logs.
    Vsock,
    /// Serves the random, balloon and memory devices.
    Misc,
    /// Serves control connections: hull-vmm's main thread.
    Control,
    /// Serves file requests in hull-virtiofsd.
    Volumes,
    /// Serves the VMM's requests in hull-virtiofsd: its main thread.
    VolumesControl,
}

/// A system call that is allowed, perhaps with certain arguments only.
#[derive(Clone, Copy)]
enum Allowed {
    /// Whatever the arguments.
    Call(c_long),
    /// If the lower half of the argument with this number has this value.
    With(c_long, u8, u64),
    /// If none of these bits of the argument with this number is set.
    Without(c_long, u8, u64),
}
use Allowed::{Call, With, Without};

/// Memory, waiting, the clock, signals of the thread itself, ending: what every thread of a Rust program may come to.
static COMMON: &[Allowed] = &[
    Call(libc::SYS_read),
    Call(libc::SYS_write),
    Call(libc::SYS_readv),
    Call(libc::SYS_writev),
    Call(libc::SYS_close),
    Call(libc::SYS_futex),
    // Nothing becomes code that was not code from the start.
    Without(libc::SYS_mmap, 2, libc::PROT_EXEC as u64),
    Without(libc::SYS_mprotect, 2, libc::PROT_EXEC as u64),
    Call(libc::SYS_munmap),
    Call(libc::SYS_mremap),
    Call(libc::SYS_madvise),
    Call(libc::SYS_brk),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_epoll_pwait),
    Call(libc::SYS_epoll_ctl),
    Call(libc::SYS_poll),
    Call(libc::SYS_ppoll),
    Call(libc::SYS_clock_gettime),
    Call(libc::SYS_clock_nanosleep),
    Call(libc::SYS_nanosleep),
    Call(libc::SYS_sched_yield),
    // Seeds of hash maps.
    Call(libc::SYS_getrandom),
    Call(libc::SYS_restart_syscall),
    Call(libc::SYS_rt_sigreturn),
    Call(libc::SYS_rt_sigprocmask),
    Call(libc::SYS_rt_sigaction),
    Call(libc::SYS_sigaltstack),
    // A panic tells its reason before it aborts.
    Call(libc::SYS_getpid),
    Call(libc::SYS_gettid),
    Call(libc::SYS_tgkill),
    Call(libc::SYS_exit),
    Call(libc::SYS_exit_group),
    // Descriptors are shared between threads by duplicates.
    With(libc::SYS_fcntl, 1, libc::F_DUPFD_CLOEXEC as u64),
    With(libc::SYS_fcntl, 1, libc::F_GETFD as u64),
    With(libc::SYS_fcntl, 1, libc::F_GETFL as u64),
];

// linux/kvm.h. Numbers of requests on a vCPU or a machine that exist already; none makes anything new.
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_FPU: u64 = 0x81a0_ae8c;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_GET_XSAVE2: u64 = 0x9000_aecf;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_CPUID2: u64 = 0xc008_ae91;

/// Reading the state of a vCPU, for save and for messages.
static VCPU_STATE: &[Allowed] = &[
    With(libc::SYS_ioctl, 1, KVM_KVMCLOCK_CTRL),
    With(libc::SYS_ioctl, 1, KVM_GET_REGS),
    With(libc::SYS_ioctl, 1, KVM_GET_SREGS),
    With(libc::SYS_ioctl, 1, KVM_GET_MSRS),
    With(libc::SYS_ioctl, 1, KVM_GET_FPU),
    With(libc::SYS_ioctl, 1, KVM_GET_LAPIC),
    With(libc::SYS_ioctl, 1, KVM_GET_MP_STATE),
    With(libc::SYS_ioctl, 1, KVM_GET_VCPU_EVENTS),
    With(libc::SYS_ioctl, 1, KVM_GET_DEBUGREGS),
    With(libc::SYS_ioctl, 1, KVM_GET_XSAVE),
    With(libc::SYS_ioctl, 1, KVM_GET_XSAVE2),
    With(libc::SYS_ioctl, 1, KVM_GET_XCRS),
    With(libc::SYS_ioctl, 1, KVM_GET_TSC_KHZ),
    With(libc::SYS_ioctl, 1, KVM_GET_CPUID2),
];

static VCPU: &[Allowed] = &[
    With(libc::SYS_ioctl, 1, KVM_RUN),
    // The console's log is kept short.
    Call(libc::SYS_fallocate),
    Call(libc::SYS_ftruncate),
];

static DISK: &[Allowed] = &[
    Call(libc::SYS_pread64),
    Call(libc::SYS_pwrite64),
    Call(libc::SYS_preadv),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_preadv2),
    Call(libc::SYS_pwritev2),
    Call(libc::SYS_fdatasync),
    Call(libc::SYS_fsync),
    Call(libc::SYS_fallocate),
    Call(libc::SYS_lseek),
    Call(libc::SYS_fstat),
    With(libc::SYS_ioctl, 1, BLKGETSIZE64),
    With(libc::SYS_ioctl, 1, BLKDISCARD),
    With(libc::SYS_ioctl, 1, BLKZEROOUT),
    With(libc::SYS_ioctl, 1, BLKSSZGET),
    With(libc::SYS_ioctl, 1, BLKPBSZGET),
];
// linux/fs.h.
const BLKGETSIZE64: u64 = 0x8008_1272;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKSSZGET: u64 = 0x1268;
const BLKPBSZGET: u64 = 0x127b;

static NET: &[Allowed] =
    &[With(libc::SYS_ioctl, 1, TUNSETOFFLOAD), With(libc::SYS_ioctl, 1, TUNSETVNETHDRSZ)];
// linux/if_tun.h.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

/// Sockets that exist already, and connections to those that listen.
static SOCKETS: &[Allowed] = &[
    Call(libc::SYS_accept4),
    Call(libc::SYS_recvfrom),
    Call(libc::SYS_recvmsg),
    Call(libc::SYS_sendto),
    Call(libc::SYS_sendmsg),
    Call(libc::SYS_shutdown),
    Call(libc::SYS_getsockopt),
    Call(libc::SYS_setsockopt),
    With(libc::SYS_fcntl, 1, libc::F_SETFL as u64),
    With(libc::SYS_ioctl, 1, libc::FIONBIO),
    // A stream that the guest opens ends here.
    Call(libc::SYS_socketpair),
    // Peers that do not answer.
    Call(libc::SYS_timerfd_settime),
];

/// Giving memory back to the host, and handing queues to hull-virtiofsd.
static SMALL: &[Allowed] = &[
    Call(libc::SYS_fallocate),
    Call(libc::SYS_sendmsg),
    Call(libc::SYS_sendto),
    Call(libc::SYS_recvmsg),
    // The allowance of random numbers.
    Call(libc::SYS_timerfd_settime),
];

static CONTROL: &[Allowed] = &[
    Call(libc::SYS_fstat),
    Call(libc::SYS_ftruncate),
    Call(libc::SYS_eventfd2),
    Call(libc::SYS_timerfd_settime),
    // Memory slots, interrupts and the rest are set at birth, before the filter.
    With(libc::SYS_ioctl, 1, KVM_GET_CLOCK),
    With(libc::SYS_ioctl, 1, KVM_GET_IRQCHIP),
];

/// Taking over guest memory and queues.
static HAND_OVER: &[Allowed] =
    &[Call(libc::SYS_fstat), Call(libc::SYS_statx), Call(libc::SYS_lseek), Call(libc::SYS_eventfd2)];

/// File requests, as `virtiofsd::passthrough` makes them: by descriptor or beneath one.
static FILES: &[Allowed] = &[
    Call(libc::SYS_openat),
    Call(libc::SYS_openat2),
    Call(libc::SYS_newfstatat),
    Call(libc::SYS_fstat),
    Call(libc::SYS_statx),
    Call(libc::SYS_fstatfs),
    Call(libc::SYS_getdents64),
    Call(libc::SYS_lseek),
    Call(libc::SYS_pread64),
    Call(libc::SYS_pwrite64),
    Call(libc::SYS_preadv),
    Call(libc::SYS_preadv2),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_pwritev2),
    Call(libc::SYS_copy_file_range),
    Call(libc::SYS_fallocate),
    Call(libc::SYS_ftruncate),
    Call(libc::SYS_fsync),
    Call(libc::SYS_fdatasync),
    Call(libc::SYS_syncfs),
    Call(libc::SYS_mkdirat),
    Call(libc::SYS_mknodat),
    Call(libc::SYS_symlinkat),
    Call(libc::SYS_linkat),
    Call(libc::SYS_unlinkat),
    Call(libc::SYS_renameat2),
    Call(libc::SYS_readlinkat),
    Call(libc::SYS_faccessat),
    Call(libc::SYS_faccessat2),
    Call(libc::SYS_fchdir),
    Call(libc::SYS_fchmod),
    Call(libc::SYS_fchmodat),
    Call(libc::SYS_fchownat),
    Call(libc::SYS_utimensat),
    Call(libc::SYS_umask),
    Call(libc::SYS_fgetxattr),
    Call(libc::SYS_fsetxattr),
    Call(libc::SYS_flistxattr),
    Call(libc::SYS_fremovexattr),
    Call(libc::SYS_getxattr),
    Call(libc::SYS_setxattr),
    Call(libc::SYS_listxattr),
    Call(libc::SYS_removexattr),
    Call(libc::SYS_flock),
    Call(libc::SYS_dup),
    // To act as a user of the guest, and to act on set-group-ID bits as that user would.
    Call(libc::SYS_geteuid),
    Call(libc::SYS_getegid),
    Call(libc::SYS_setresuid),
    Call(libc::SYS_setresgid),
    Call(libc::SYS_setgroups),
    Call(libc::SYS_capget),
    Call(libc::SYS_capset),
    With(libc::SYS_prctl, 0, libc::PR_CAPBSET_READ as u64),
    With(libc::SYS_prctl, 0, libc::PR_CAP_AMBIENT as u64),
];

impl ThreadKind {
    fn tables(self) -> Vec<&'static [Allowed]> {
        match self {
            Self::Vcpu => vec![COMMON, VCPU, VCPU_STATE],
            Self::Block => vec![COMMON, DISK],
            Self::Net => vec![COMMON, NET],
            Self::Vsock => vec![COMMON, SOCKETS],
            Self::Misc => vec![COMMON, SMALL],
            Self::Control => vec![COMMON, SOCKETS, DISK, CONTROL, VCPU_STATE],
            Self::Volumes => vec![COMMON, FILES],
            Self::VolumesControl => vec![COMMON, SOCKETS, HAND_OVER],
        }
    }

    fn program(self) -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for allowed in self.tables().into_iter().flatten() {
            let (call, condition) = match *allowed {
                Call(call) => (call, None),
                With(call, argument, value) => (call, Some((argument, SeccompCmpOp::Eq, value))),
                Without(call, argument, bits) => (call, Some((argument, SeccompCmpOp::MaskedEq(bits), 0))),
            };
            let of_call = rules.entry(call).or_default();
            if let Some((argument, operator, value)) = condition {
                let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
                of_call.push(SeccompRule::new(vec![condition])?);
            }
        }
        let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        SeccompFilter::new(rules, other, listed, TargetArch::x86_64)?.try_into()
    }
}

/// Confines the calling thread, for good, to the system calls of its kind; with any other the kernel kills the process.
/// Sets no_new_privs.
///
/// # Errors
/// The kernel refuses filters: the thread must not do its work.
pub fn confine(kind: ThreadKind) -> io::Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        io::Error::other(format!("cannot confine the thread for {kind:?}: {error}"))
    };
    let program = kind.program().map_err(|error| failed(&error))?;
    // The first look at the clock finds the vDSO by way of prctl(PR_GET_AUXV), which no thread may call afterwards.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    seccompiler::apply_filter(&program).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 8] = [
        ThreadKind::Vcpu,
        ThreadKind::Block,
        ThreadKind::Net,
        ThreadKind::Vsock,
        ThreadKind::Misc,
        ThreadKind::Control,
        ThreadKind::Volumes,
        ThreadKind::VolumesControl,
    ];

    #[test]
    fn every_kind_has_a_filter_that_the_kernel_takes() {
        for kind in KINDS {
            std::thread::spawn(move || confine(kind).unwrap()).join().unwrap();
        }
    }

    #[test]
    fn no_thread_may_start_another_execute_connect_or_change_what_it_sees() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_mount,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_seccomp,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_open_by_handle_at,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_memfd_create,
        ];
        for kind in KINDS {
            for allowed in kind.tables().into_iter().flatten() {
                let (Call(call) | With(call, ..) | Without(call, ..)) = *allowed;
                assert!(!never.contains(&call), "{kind:?} may call {call}");
            }
        }
    }

    #[test]
    fn only_the_server_of_volumes_can_open_anything_or_become_anyone() {
        let special = [libc::SYS_openat, libc::SYS_openat2, libc::SYS_setresuid, libc::SYS_capset];
        for kind in KINDS.into_iter().filter(|kind| *kind != ThreadKind::Volumes) {
            for allowed in kind.tables().into_iter().flatten() {
                let (Call(call) | With(call, ..) | Without(call, ..)) = *allowed;
                assert!(!special.contains(&call), "{kind:?} may call {call}");
            }
        }
    }
}
