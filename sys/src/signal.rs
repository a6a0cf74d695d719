use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The highest signal number of Linux.
pub const MAX: i32 = 64;

/// Signals that report a fault of the process itself; blocking them would turn the fault into a silent kill.
const FAULTS: [i32; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

/// Blocks every signal but those of a fault in the calling thread. What is sent stays pending, and children made
/// afterwards inherit the mask.
pub fn block_all() -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set, which lives across the calls.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for fault in FAULTS {
            libc::sigdelset(set.as_mut_ptr(), fault);
        }
    }
    // SAFETY: initialised above.
    set_mask(unsafe { set.assume_init_ref() })
}

/// Blocks no signal in the calling thread: what a program expects to be started with.
pub fn unblock_all() -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    set_mask(&set)
}

fn set_mask(set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `set` lives across the call; no old set is asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Gives every signal its default action, whatever was inherited or set by the language's run time (which ignores
/// SIGPIPE); execve keeps ignored signals ignored.
pub fn reset_all() {
    // struct kernel_sigaction: handler (SIG_DFL is 0), flags, restorer, mask. All zero.
    let default = [0_u64; 4];
    for signal in 1..=MAX {
        // The system call itself: glibc's function refuses the two numbers that it keeps for itself, which a parent can
        // have left ignored all the same.
        // SAFETY: `default` is at least as large as the kernel's structure and lives across the call; SIG_DFL runs no
        // code of ours; 8 is the size of the kernel's set. SIGKILL and SIGSTOP fail harmlessly.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                8_usize,
            )
        };
    }
}

/// Receives the SIGCHLD of the process, which must be blocked.
#[derive(Debug)]
pub struct ChildSignal(OwnedFd);

impl ChildSignal {
    /// A non-blocking, close-on-exec signalfd.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set; it lives across the calls.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
            libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the pending signal. SIGCHLD does not queue, so one read takes all there is; how many children ended must
    /// be asked with waitid.
    pub fn take(&self) {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        // SAFETY: the buffer has the size given. A failure (nothing pending) needs no answer.
        unsafe {
            libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size_of::<libc::signalfd_siginfo>())
        };
    }
}

impl AsFd for ChildSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_and_unblocked_masks_show_in_proc() {
        std::thread::spawn(|| {
            let blocked = || {
                let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
                let line = status.lines().find(|line| line.starts_with("SigBlk:")).unwrap().to_owned();
                u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
            };
            block_all().unwrap();
            let mask = blocked();
            assert_ne!(mask & (1 << (libc::SIGCHLD - 1)), 0);
            assert_eq!(mask & (1 << (libc::SIGSEGV - 1)), 0);
            unblock_all().unwrap();
            assert_eq!(blocked(), 0);
        })
        .join()
        .unwrap();
    }
}
