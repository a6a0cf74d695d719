//! The RuntimeDefault profile: what programs in containers may ask of the kernel.
//!
//! The effect is that of the default profiles of containerd and moby (as of 2026), on which images and their tests
//! rely: what is not named here fails with EPERM. Not named, on purpose, are above all mounts and namespaces without
//! CAP_SYS_ADMIN, io_uring (a long row of kernel escapes), keyrings (not namespaced), userfaultfd, kexec, swap, module
//! loading without its capability, and obsolete calls.

use super::profile::{Action, Argument, Comparison, Profile, Rule};
use crate::security::capabilities;

const ENOSYS: u16 = 38;

/// Allowed to everybody, by subject. Calls of 32-bit machines stand beside their newer forms.
const ALWAYS: &[&str] = &[
    // files by name
    "access faccessat faccessat2 chdir fchdir getcwd chmod fchmod fchmodat fchmodat2 chown chown32 fchown fchown32 \
     fchownat lchown lchown32 creat open openat openat2 name_to_handle_at link linkat symlink symlinkat readlink \
     readlinkat mkdir mkdirat mknod mknodat rmdir unlink unlinkat rename renameat renameat2 umask utime utimes \
     futimesat utimensat utimensat_time64 truncate truncate64",
    // what is known of files
    "stat stat64 lstat lstat64 fstat fstat64 newfstatat fstatat64 statx statfs statfs64 fstatfs fstatfs64 statmount \
     listmount getdents getdents64 getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat \
     listxattr llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat",
    // open files
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek _llseek close close_range dup dup2 \
     dup3 fcntl fcntl64 flock ioctl fsync fdatasync sync syncfs sync_file_range ftruncate ftruncate64 fallocate \
     fadvise64 fadvise64_64 readahead cachestat sendfile sendfile64 splice tee vmsplice copy_file_range pipe pipe2 \
     io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents io_pgetevents_time64",
    // waiting for events
    "poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 epoll_create epoll_create1 epoll_ctl \
     epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 \
     timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 inotify_init inotify_init1 \
     inotify_add_watch inotify_rm_watch fanotify_mark",
    // memory
    "brk mmap mmap2 munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall munlock munlockall mseal \
     remap_file_pages memfd_create memfd_secret membarrier map_shadow_stack pkey_alloc pkey_free pkey_mprotect",
    // processes and threads
    "fork vfork execve execveat exit exit_group wait4 waitid waitpid getpid getppid gettid getpgid getpgrp setpgid \
     getsid setsid prctl seccomp set_tid_address set_thread_area get_thread_area set_robust_list get_robust_list rseq \
     futex futex_time64 futex_wait futex_wake futex_requeue futex_waitv pidfd_open pidfd_send_signal process_mrelease \
     getcpu getrlimit ugetrlimit setrlimit prlimit64 getrusage times uretprobe \
     landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    // watching and steering one's own processes: safe since Linux 4.8, which checks seccomp after a tracer's change
    "ptrace process_vm_readv process_vm_writev",
    // scheduling
    "getpriority setpriority ioprio_get ioprio_set sched_yield sched_getaffinity sched_setaffinity sched_getattr \
     sched_setattr sched_getparam sched_setparam sched_getscheduler sched_setscheduler sched_get_priority_max \
     sched_get_priority_min sched_rr_get_interval sched_rr_get_interval_time64",
    // users, groups, capabilities
    "getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32 getresgid getresgid32 \
     getgroups getgroups32 setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32 setresuid \
     setresuid32 setresgid setresgid32 setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capget capset",
    // signals
    "kill tkill tgkill alarm pause restart_syscall sigaltstack sigprocmask sigreturn rt_sigaction rt_sigpending \
     rt_sigprocmask rt_sigqueueinfo rt_tgsigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
     rt_sigtimedwait_time64",
    // time; setting it needs CAP_SYS_TIME, which adjtimex and its like check themselves
    "time gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep \
     clock_nanosleep_time64 nanosleep getitimer setitimer timer_create timer_delete timer_getoverrun timer_gettime \
     timer_gettime64 timer_settime timer_settime64 adjtimex clock_adjtime clock_adjtime64",
    // sockets; socket itself is below. The family in socketcall's memory is out of a filter's sight, and old 32-bit
    // programs know nothing else, so a 32-bit program can have any family that the kernel offers.
    "socketcall socketpair bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt \
     send sendto sendmsg sendmmsg recv recvfrom recvmsg recvmmsg recvmmsg_time64",
    // System V and POSIX IPC
    "ipc shmget shmat shmdt shmctl semget semop semctl semtimedop semtimedop_time64 msgget msgsnd msgrcv msgctl \
     mq_open mq_unlink mq_notify mq_getsetattr mq_timedsend mq_timedsend_time64 mq_timedreceive \
     mq_timedreceive_time64",
    // the machine
    "uname sysinfo getrandom",
];

/// Allowed on one kind of machine only; libseccomp knows these names elsewhere too, as calls that do not exist.
#[cfg(target_arch = "x86_64")]
const OF_THE_MACHINE: &str = "arch_prctl modify_ldt";
#[cfg(target_arch = "aarch64")]
const OF_THE_MACHINE: &str =
    "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls";
#[cfg(target_arch = "riscv64")]
const OF_THE_MACHINE: &str = "riscv_flush_icache riscv_hwprobe";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const OF_THE_MACHINE: &str = "";

/// Allowed to those who have the capability that the call needs anyway.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "mount umount umount2 move_mount open_tree mount_setattr fsopen fsconfig fsmount fspick clone clone3 unshare \
         setns sethostname setdomainname quotactl quotactl_fd bpf perf_event_open fanotify_init lookup_dcookie syslog \
         lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "init_module finit_module delete_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "iopl ioperm"),
    ("SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy set_mempolicy set_mempolicy_home_node mbind"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// personality(2): Linux, Linux for 32 bits, each with or without UNAME26, and the question which one it is.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The flags of clone(2) that make namespaces: mount, cgroup, UTS, IPC, user, PID, network.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// linux/socket.h. VSOCK reaches the hypervisor's other guests (containerd 7442); ALG is the kernel's crypto, of no
/// use to containers and the way of CVE-2026-31431.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// The profile for a container with these capabilities in its bounding set.
pub(super) fn profile(caps: u64) -> Profile {
    let has = |name: &str| capabilities::parse(name).is_ok_and(|number| caps >> number & 1 == 1);
    let mut names: Vec<&str> = ALWAYS.iter().flat_map(|subject| subject.split_ascii_whitespace()).collect();
    names.extend(OF_THE_MACHINE.split_ascii_whitespace());
    for (capability, calls) in BY_CAPABILITY {
        if has(capability) {
            names.extend(calls.split_ascii_whitespace());
        }
    }
    names.sort_unstable();
    names.dedup();

    let first = |comparison| vec![Argument { index: 0, comparison }];
    let allow = |name: &str, arguments| Rule::new(vec![name.to_owned()], Action::Allow, arguments);
    let mut rules = vec![Rule::new(names.into_iter().map(str::to_owned).collect(), Action::Allow, vec![])];
    rules.extend(PERSONALITIES.map(|one| allow("personality", first(Comparison::Equal(one)))));
    // Conditions of one rule must all hold, so the gaps between the refused families are rules of their own.
    rules.push(allow("socket", first(Comparison::Less(AF_ALG))));
    rules.push(allow("socket", first(Comparison::Equal(AF_ALG + 1))));
    rules.push(allow("socket", first(Comparison::Greater(AF_VSOCK))));
    if !has("SYS_ADMIN") {
        rules.push(allow("clone", first(Comparison::MaskedEqual { mask: NAMESPACE_FLAGS, value: 0 })));
        // Its flags are in memory, out of a filter's sight; libraries take ENOSYS as the word to use clone.
        rules.push(Rule::new(vec!["clone3".to_owned()], Action::Errno(ENOSYS), vec![]));
    }
    Profile::native(Action::Errno(1), rules)
}

/// The capabilities that change the profile.
pub(super) fn relevant_capabilities() -> u64 {
    let bits = BY_CAPABILITY.iter().filter_map(|(name, _)| capabilities::parse(name).ok());
    bits.fold(0, |set, number| set | 1 << number)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_name_is_there_twice() {
        let mut seen = BTreeSet::new();
        for name in ALWAYS.iter().flat_map(|subject| subject.split_ascii_whitespace()) {
            assert!(seen.insert(name), "{name}");
        }
        for (capability, calls) in BY_CAPABILITY {
            assert!(capabilities::parse(capability).is_ok(), "{capability}");
            for name in calls.split_ascii_whitespace() {
                assert!(!seen.contains(name), "{name} is allowed always and by {capability}");
            }
        }
    }

    #[test]
    fn dangerous_calls_need_their_capability() {
        let allowed = |caps: u64, name: &str| {
            profile(caps).rules.iter().any(|rule| {
                rule.action == Action::Allow
                    && rule.arguments.is_empty()
                    && rule.names.iter().any(|have| have == name)
            })
        };
        let never =
            ["io_uring_setup", "keyctl", "add_key", "userfaultfd", "kexec_load", "swapon", "pivot_root"];
        for name in never {
            assert!(!allowed(u64::MAX, name), "{name}");
        }
        for name in
            ["mount", "unshare", "setns", "clone", "bpf", "reboot", "init_module", "open_by_handle_at"]
        {
            assert!(!allowed(capabilities::DEFAULT, name), "{name}");
            assert!(allowed(u64::MAX, name), "{name}");
        }
        assert!(allowed(capabilities::DEFAULT, "chroot"));
    }
}
