use std::ffi::{CStr, CString, NulError, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::{WaitId, WaitIdOptions};

use crate::namespace::Namespaces;

const CLONE_PIDFD: u64 = libc::CLONE_PIDFD as u64;
const CLONE_PARENT: u64 = libc::CLONE_PARENT as u64;
// linux/sched.h; too wide for the c_int that libc gives them on some targets.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

unsafe extern "C" {
    /// glibc: non-zero while the process certainly has one thread (bits/single_threaded.h).
    static __libc_single_threaded: c_char;
}

/// True if this process certainly has one thread only. May stay false after other threads have ended.
pub fn is_single_threaded() -> bool {
    // SAFETY: glibc defines the variable, as a char, and only ever writes it from the one thread that there is.
    unsafe { std::ptr::read_volatile(&raw const __libc_single_threaded) != 0 }
}

/// How to clone this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clone3<'a> {
    /// New namespaces for the child.
    pub namespaces: Namespaces,
    /// Directory of a cgroup2 group in which the child starts (CLONE_INTO_CGROUP); absent: the caller's.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The child becomes a child of the caller's parent (CLONE_PARENT).
    pub sibling: bool,
}

/// On which side of the clone this is.
#[derive(Debug)]
pub enum Cloned {
    /// In the caller.
    Parent {
        /// Number of the child in the caller's PID namespace.
        pid: i32,
        /// The child, close-on-exec.
        pidfd: OwnedFd,
    },
    /// In the child: a copy of the caller's memory and descriptors.
    Child,
}

/// Clones the calling process like fork: memory and descriptors are copied, the parent gets SIGCHLD at the end. Signals
/// that the caller handles have their default action in the child; ignored ones stay ignored.
///
/// Fails with `Unsupported` if the process may have other threads: a lock one of them holds would stay locked in the
/// child for ever. With one thread the child may do everything that the parent could, so the function is safe.
pub fn clone3(options: &Clone3<'_>) -> io::Result<Cloned> {
    if !is_single_threaded() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "cannot clone a process that has several threads",
        ));
    }
    let mut pidfd: RawFd = -1;
    let mut flags = CLONE_PIDFD | CLONE_CLEAR_SIGHAND | u64::from(options.namespaces.bits());
    if options.sibling {
        flags |= CLONE_PARENT;
    }
    // SAFETY: clone_args is plain numbers; zero means "unused" for each of them.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.pidfd = (&raw mut pidfd) as u64;
    // With CLONE_PARENT the kernel takes over the caller's own exit signal and refuses another.
    args.exit_signal = if options.sibling { 0 } else { libc::SIGCHLD as u64 };
    if let Some(cgroup) = options.cgroup {
        flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.flags = flags;
    // SAFETY: without CLONE_VM, CLONE_FILES and a new stack this is fork(2): the child runs on its own copy of the
    // stack. The process has one thread (checked above), so no lock is held by anybody else. `args` and `pidfd` live
    // across the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        // SAFETY: the kernel has just put a new descriptor there, which nobody else knows.
        pid => Ok(Cloned::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// Ends the process at once: no destructors, no exit handlers, nothing flushed.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit does not return and touches no memory.
    unsafe { libc::_exit(code) }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status (0 to 255).
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl Ended {
    /// The one number that shells and CRI use: the status, or 128 + signal.
    pub const fn exit_code(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// Takes the exit status of the child behind `pidfd`, waiting for its end; the child is gone afterwards.
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Ended> {
    loop {
        if let Some(ended) = wait_id(WaitId::PidFd(pidfd), WaitIdOptions::EXITED)? {
            return Ok(ended);
        }
    }
}

/// Like [`wait`], but `None` at once if the child still runs.
pub fn try_wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Ended>> {
    wait_id(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
}

/// Takes the exit status of the ended child with this number, `None` if it still runs.
pub fn try_wait_pid(pid: i32) -> io::Result<Option<Ended>> {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    wait_id(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
}

fn wait_id(id: WaitId<'_>, options: WaitIdOptions) -> io::Result<Option<Ended>> {
    let status = rustix::io::retry_on_intr(|| rustix::process::waitid(id.clone(), options))?;
    Ok(status.map(|status| match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, Some(signal)) => Ended::Killed(signal),
        // WEXITED reports nothing else.
        (None, None) => Ended::Exited(255),
    }))
}

/// Number of some child that has ended and was not waited for yet; its status stays. `None`: there is none.
pub fn peek_ended_child() -> io::Result<Option<i32>> {
    // SAFETY: siginfo_t is plain data for which zero is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    loop {
        // SAFETY: `info` lives across the call.
        if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) } == 0 {
            break;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ECHILD) => return Ok(None),
            _ => return Err(error),
        }
    }
    // SAFETY: waitid filled the SIGCHLD part of the union, or left it zero when no child has ended.
    let pid = unsafe { info.si_pid() };
    Ok((pid != 0).then_some(pid))
}

/// Sends a signal by number (0 only checks) to the process behind `pidfd`; ESRCH if it has ended.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends a signal by number to the process `pid`. Pids are reused: prefer [`pidfd_send_signal`]. Group and broadcast
/// numbers (pid ≤ 0) are refused.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: no memory is passed.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Kills (SIGKILL) the process group that the process `pid` leads; an error if it leads none. For a child that was not
/// waited for yet, so that its number cannot be another's.
pub fn kill_group_of(pid: i32) -> io::Result<()> {
    if pid <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: no memory is passed.
    if unsafe { libc::kill(-pid, libc::SIGKILL) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks every descriptor from `first` up close-on-exec, so that the next execve drops them all.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: CLOSE_RANGE_CLOEXEC closes nothing now, so nobody's descriptor is pulled away.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Turns the calling process into the first process of a PID namespace and nothing else: closes every descriptor, then
/// reaps whatever ends, until SIGTERM comes from outside of the namespace (or, as always, SIGKILL). Exits with 0.
///
/// For a cloned process that has nothing left to do: it allocates nothing and never returns.
pub fn reap_until_terminated() -> ! {
    // SAFETY: the process never returns to code that could use a descriptor it owned.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    // SAFETY: sigset_t is plain data, made valid by sigemptyset; all arguments live across the calls.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        set
    };
    loop {
        // SAFETY: siginfo_t is plain data for which zero is valid; set and info live across the call.
        let (signal, sender) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::sigwaitinfo(&raw const set, &raw mut info), info.si_pid())
        };
        // A sender outside of the namespace has no number in it: those inside cannot end the pod.
        if signal == libc::SIGTERM && sender == 0 {
            exit_now(0);
        }
        // SAFETY: a null status is allowed.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
    }
}

/// Argument or environment strings in the form that execve wants, made before the clone.
#[derive(Debug)]
pub struct CStringArray {
    strings: Vec<CString>,
    /// One for each string and a null at the end.
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers lead only into `strings`, which the value owns and never changes.
unsafe impl Send for CStringArray {}

impl CStringArray {
    /// Fails if a string contains a zero byte.
    pub fn new<S: Into<Vec<u8>>>(strings: impl IntoIterator<Item = S>) -> Result<Self, NulError> {
        let strings = strings.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect();
        Ok(Self { strings, pointers })
    }

    /// The strings, in order.
    pub fn strings(&self) -> &[CString] {
        &self.strings
    }
}

/// Replaces the process image; returns only if that failed.
pub fn execve(path: &CStr, args: &CStringArray, env: &CStringArray) -> io::Error {
    // SAFETY: path and both arrays are zero-terminated and live across the call.
    unsafe { libc::execve(path.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Replaces the process image by the open file `fd`; returns only if that failed. A script needs a descriptor that is
/// not close-on-exec and a visible /proc (or /dev/fd).
pub fn fexecve(fd: BorrowedFd<'_>, args: &CStringArray, env: &CStringArray) -> io::Error {
    // SAFETY: both arrays and the empty path are zero-terminated and live across the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_raw_fd(),
            c"".as_ptr(),
            args.pointers.as_ptr(),
            env.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_cannot_clone_itself() {
        // This test itself runs on a second thread, or starts one.
        std::thread::spawn(|| assert!(clone3(&Clone3::default()).is_err())).join().unwrap();
    }

    #[test]
    fn a_child_killed_by_a_signal_reports_128_plus_signal() {
        use std::os::fd::AsFd;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        assert_eq!(try_wait(pidfd.as_fd()).unwrap(), None);
        pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert_eq!(wait(pidfd.as_fd()).unwrap().exit_code(), 137);
        assert!(child.try_wait().is_err() || child.wait().is_err());
    }

    #[test]
    fn a_zero_byte_in_an_argument_is_refused() {
        assert!(CStringArray::new(["a\0b"]).is_err());
        let array = CStringArray::new(["a", "b"]).unwrap();
        assert_eq!(array.strings().len(), 2);
        assert!(array.pointers.last().unwrap().is_null());
    }

    #[test]
    fn kill_never_reaches_a_group() {
        assert!(kill(0, 0).is_err());
        assert!(kill(-1, 0).is_err());
    }
}
