use std::io;
use std::ops::{BitOr, BitOrAssign};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

/// A set of namespace kinds, as clone3, unshare and setns take them (namespaces(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(u32);

impl Namespaces {
    /// No kind.
    pub const NONE: Self = Self(0);
    /// CLONE_NEWNS.
    pub const MOUNT: Self = Self(libc::CLONE_NEWNS as u32);
    /// CLONE_NEWPID.
    pub const PID: Self = Self(libc::CLONE_NEWPID as u32);
    /// CLONE_NEWNET.
    pub const NET: Self = Self(libc::CLONE_NEWNET as u32);
    /// CLONE_NEWIPC.
    pub const IPC: Self = Self(libc::CLONE_NEWIPC as u32);
    /// CLONE_NEWUTS.
    pub const UTS: Self = Self(libc::CLONE_NEWUTS as u32);
    /// CLONE_NEWCGROUP.
    pub const CGROUP: Self = Self(libc::CLONE_NEWCGROUP as u32);
    /// CLONE_NEWUSER.
    pub const USER: Self = Self(libc::CLONE_NEWUSER as u32);

    /// The kinds of either set; `|` for constants.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The CLONE_NEW* bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// True if every kind in `other` is in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// True if there is no kind in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl BitOr for Namespaces {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Namespaces {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Moves the calling thread into the namespace behind `fd`, an open /proc/PID/ns/* file or a pin of one.
///
/// `kind` must be the one kind that `fd` is, or empty for any kind. A PID namespace takes effect for children made
/// afterwards. A mount namespace needs a thread that shares no filesystem attributes (see [`on_thread_in`]).
pub fn enter(fd: BorrowedFd<'_>, kind: Namespaces) -> io::Result<()> {
    let allowed = match kind {
        Namespaces::NONE => None,
        Namespaces::MOUNT => Some(LinkNameSpaceType::Mount),
        Namespaces::PID => Some(LinkNameSpaceType::ProcessID),
        Namespaces::NET => Some(LinkNameSpaceType::Network),
        Namespaces::IPC => Some(LinkNameSpaceType::InterProcessCommunication),
        Namespaces::UTS => Some(LinkNameSpaceType::HostNameAndNISDomainName),
        Namespaces::CGROUP => Some(LinkNameSpaceType::ControlGroup),
        Namespaces::USER => Some(LinkNameSpaceType::User),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    Ok(rustix::thread::move_into_link_name_space(fd, allowed)?)
}

/// Moves the calling thread into the given namespaces of the process behind `pidfd`, all or none (Linux ≥ 5.8).
pub fn enter_of_process(pidfd: BorrowedFd<'_>, kinds: Namespaces) -> io::Result<()> {
    let kinds = ThreadNameSpaceType::from_bits_retain(kinds.bits());
    Ok(rustix::thread::move_into_thread_name_spaces(pidfd, kinds)?)
}

/// The user namespace that owns the namespace behind `fd` (ioctl_ns(2), NS_GET_USERNS); an error if that is out of
/// sight.
pub fn owner(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::c_ulong = 0xb701;
    // SAFETY: the request takes no argument and returns a new descriptor.
    let owner = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_USERNS) };
    if owner < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(owner) })
}

/// Gives the calling thread new namespaces of these kinds. A PID namespace takes effect for children made afterwards.
pub fn unshare(kinds: Namespaces) -> io::Result<()> {
    // SAFETY: only CLONE_NEW* bits can be in `kinds`; CLONE_FILES, the one flag that breaks descriptor ownership, is
    // not representable.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::from_bits_retain(kinds.bits())) }?)
}

/// Gives the calling thread its own current directory, root and umask: the condition for entering a mount namespace
/// from a process with several threads.
pub fn unshare_filesystem_attributes() -> io::Result<()> {
    // SAFETY: CLONE_FS does not touch the descriptor table.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?)
}

/// Runs `f` on a fresh thread inside the given namespaces (any kinds but user, in this order) and returns what it
/// returned. The thread ends afterwards, so no other work can ever run in the wrong namespace.
///
/// Blocks the caller until `f` is done. A panic of `f` becomes an error.
pub fn on_thread_in<T: Send>(fds: &[BorrowedFd<'_>], f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let body = move || -> io::Result<T> {
            unshare_filesystem_attributes()?;
            for fd in fds {
                enter(fd.as_fd(), Namespaces::NONE)?;
            }
            Ok(f())
        };
        let thread = std::thread::Builder::new().name("namespace".into()).spawn_scoped(scope, body)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the work inside the namespace panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    fn inode_of_own_uts() -> u64 {
        std::fs::metadata("/proc/thread-self/ns/uts").unwrap().ino()
    }

    #[test]
    fn work_runs_inside_the_namespace_and_the_caller_stays_outside() {
        let before = inode_of_own_uts();
        let inside = std::thread::spawn(|| {
            unshare(Namespaces::UTS).unwrap();
            File::open("/proc/thread-self/ns/uts").unwrap()
        })
        .join()
        .unwrap();
        let wanted = inside.metadata().unwrap().ino();
        assert_ne!(wanted, before);
        assert_eq!(on_thread_in(&[inside.as_fd()], inode_of_own_uts).unwrap(), wanted);
        assert_eq!(inode_of_own_uts(), before);
    }

    #[test]
    fn a_descriptor_that_is_no_namespace_is_an_error() {
        let null = File::open("/dev/null").unwrap();
        assert!(on_thread_in(&[null.as_fd()], || ()).is_err());
    }

    #[test]
    fn several_kinds_cannot_be_entered_through_one_descriptor() {
        let uts = File::open("/proc/thread-self/ns/uts").unwrap();
        assert!(enter(uts.as_fd(), Namespaces::UTS | Namespaces::NET).is_err());
    }
}
