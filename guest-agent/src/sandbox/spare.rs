//! What most pods have of their own, made before it is known which pod: namespaces and shared memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::namespace::{self, Namespaces};
use rustix::fs::{Mode, OFlags};

use super::{Doing, SandboxError, root};

/// New IPC and UTS namespaces, in which the process is, and shared memory of the usual size, which is mounted.
#[derive(Debug)]
pub struct Spare {
    host_ipc: OwnedFd,
    host_uts: OwnedFd,
}

impl Spare {
    /// Makes them for the calling process, which has called [`super::withdraw`] and has one thread. `None` if there can be
    /// no more such namespaces: a pod on the host's needs none.
    pub fn make() -> Result<Option<Self>, SandboxError> {
        let host = |name: &str| {
            let path = format!("/proc/thread-self/ns/{name}");
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .doing(format!("open {path}"))
        };
        let spare = Self { host_ipc: host("ipc")?, host_uts: host("uts")? };
        if namespace::unshare(Namespaces::IPC | Namespaces::UTS).is_err() {
            return Ok(None);
        }
        root::mount_usual_shm()?;
        Ok(Some(spare))
    }

    /// Goes back to the host's namespace of this kind, IPC or UTS: that is what the pod wants.
    pub(super) fn give_back(&self, kind: Namespaces) -> Result<(), SandboxError> {
        namespace::enter(self.of_host(kind), kind).doing("go back to the host's namespaces")
    }

    fn of_host(&self, kind: Namespaces) -> BorrowedFd<'_> {
        if kind == Namespaces::IPC { self.host_ipc.as_fd() } else { self.host_uts.as_fd() }
    }
}
