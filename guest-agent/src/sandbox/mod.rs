//! The pod as a place: namespaces, and a mount root of the agent's own with almost nothing in it.
//!
//! The agent itself lives in the pod's network, IPC and UTS namespaces, so that containers inherit them. Of the host's
//! mounts none is left to it: what containers need from there comes as descriptors with the requests.

mod facts;
/// Paths in the agent's own root.
pub mod layout;
mod root;
mod spare;
mod sysctl;
/// The user namespaces of pods.
pub mod user_namespace;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hull_sys::namespace::{self, Namespaces};
use rustix::fs::{Mode, OFlags};

pub use facts::{CgroupView, Hierarchy, PodFacts};
pub use spare::Spare;
pub use user_namespace::{IdMap, PodNamespaces, UserNamespace};

use crate::container::Slots;
use crate::protocol::messages;

/// Why a pod could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The hostname is longer than 64 bytes or has characters that none has.
    #[error("cannot use the hostname {0:?}: it is longer than 64 bytes or contains control characters")]
    Hostname(String),
    /// The request names a slot that it did not bring.
    #[error("cannot find slot {slot}, which is to be {what}")]
    Slot {
        /// Its number.
        slot: u32,
        /// What it is for.
        what: &'static str,
    },
    /// The mapping of a user namespace is missing, or maps no root.
    #[error("cannot use the pod's user namespace: its mapping is missing or has no root")]
    Mapping,
    /// A sysctl with a bad name or value, or one that the kernel refused.
    #[error("cannot set the sysctl {name}: {reason}")]
    Sysctl {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {doing}: {error}")]
    System {
        /// What was being done.
        doing: String,
        /// Why it failed.
        error: io::Error,
    },
}

/// Says what was being done when a system call failed.
trait Doing<T> {
    fn doing(self, doing: impl Into<String>) -> Result<T, SandboxError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: impl Into<String>) -> Result<T, SandboxError> {
        self.map_err(|error| SandboxError::System { doing: doing.into(), error: error.into() })
    }
}

/// Makes a mount namespace for the calling process, with a root of its own that has nothing of the host's; `label` is the
/// SELinux label of what is on it, or empty. The first step into a pod, and the one that needs to know nothing of it.
///
/// The host's mounts are still there, although no path leads to them, until [`leave_host`] has been called, before any
/// process is started. Must have one thread: namespaces are a thread's. After an error the process is in an undefined
/// place and can only exit. Paths of the host mean nothing afterwards; the current directory is `/`.
pub fn withdraw(layout: &messages::CgroupLayout, label: &str) -> Result<(), SandboxError> {
    namespace::unshare(Namespaces::MOUNT).doing("make the pod's mount namespace")?;
    root::leave_host(layout, label)
}

/// Makes the calling process, which has called [`withdraw`], the inside of a new pod: joins or makes its namespaces, adds
/// to its root what is the pod's own, sets hostname and sysctls and the process's own OOM score. What there is in `spare`
/// is used, or given back.
///
/// The process must already be in its cgroup, and have one thread. After an error it can only exit.
pub fn enter(
    spec: &messages::CreateSandbox,
    slots: &Slots<'_>,
    spare: Option<Spare>,
) -> Result<PodFacts, SandboxError> {
    check_hostname(&spec.hostname)?;
    let slot = |number: u32, what| slots.get(number).ok_or(SandboxError::Slot { slot: number, what });
    if let Some(number) = spec.network_namespace {
        let fd = slot(number, "the network namespace")?;
        namespace::enter(fd, Namespaces::NET).doing("join the pod's network namespace")?;
    }
    let mut new = Namespaces::NONE;
    let of_pod = [
        (spec.ipc_namespace, spec.new_ipc_namespace, Namespaces::IPC, "the IPC namespace"),
        (spec.uts_namespace, spec.new_uts_namespace, Namespaces::UTS, "the UTS namespace"),
    ];
    for (given, wanted, kind, name) in of_pod {
        match given {
            Some(number) => {
                namespace::enter(slot(number, name)?, kind).doing(format!("join {name} of the pod"))?;
            }
            None => match (&spare, wanted) {
                (Some(_), true) | (None, false) => {}
                (Some(spare), false) => spare.give_back(kind)?,
                (None, true) => new |= kind,
            },
        }
    }
    if new != Namespaces::NONE {
        namespace::unshare(new).doing("make the pod's namespaces")?;
    }
    let user_namespace = spec
        .user_namespace
        .map(|number| slot(number, "the user namespace").and_then(|fd| keep_user_namespace(spec, fd)))
        .transpose()?;
    let shm = spec.shm_source.map(|number| slot(number, "the shared memory")).transpose()?;
    let root_owner = user_namespace.as_ref().and_then(|namespace| namespace.root());
    let shm_is_mounted =
        spare.is_some() && shm.is_none() && root_owner.is_none() && root::wants_usual_shm(spec);
    root::furnish(spec, root_owner.unwrap_or((0, 0)))?;
    if !shm_is_mounted {
        root::mount_shm(shm, spec, root_owner.unwrap_or((0, 0)))?;
    }
    if spec.new_uts_namespace && !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes()).doing("set the pod's hostname")?;
    }
    let proc = open_directory("/proc").doing("open /proc")?;
    sysctl::write_all(rustix::fd::AsFd::as_fd(&proc), &spec.sysctls)?;
    let own = open_directory("/proc/thread-self").doing("open /proc/thread-self")?;
    set_oom_score_adj(rustix::fd::AsFd::as_fd(&own), spec.oom_score_adj)
        .doing("set the agent's OOM score")?;
    Ok(PodFacts::new(spec, user_namespace))
}

/// Gives up the mounts of the host. Takes long on a busy machine.
pub fn leave_host() -> Result<(), SandboxError> {
    root::forget_host()
}

fn keep_user_namespace(
    spec: &messages::CreateSandbox,
    namespace: BorrowedFd<'_>,
) -> Result<Arc<UserNamespace>, SandboxError> {
    let uids = IdMap::from_message(spec.uid_mapping.as_ref()).ok_or(SandboxError::Mapping)?;
    let gids = IdMap::from_message(spec.gid_mapping.as_ref()).ok_or(SandboxError::Mapping)?;
    let namespace = namespace.try_clone_to_owned().doing("keep the pod's user namespace")?;
    let namespace = UserNamespace::new(namespace, uids, gids);
    if namespace.root().is_none() { Err(SandboxError::Mapping) } else { Ok(Arc::new(namespace)) }
}

/// Writes sysctls, of the whole kernel too, below `proc`, the root of a procfs.
pub(crate) fn write_sysctls(
    proc: BorrowedFd<'_>,
    sysctls: &std::collections::BTreeMap<String, String>,
) -> Result<(), SandboxError> {
    sysctl::write_all(proc, sysctls)
}

fn open_directory(path: &str) -> rustix::io::Result<rustix::fd::OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn check_hostname(hostname: &str) -> Result<(), SandboxError> {
    // __NEW_UTS_LEN of the kernel.
    if hostname.len() > 64 || hostname.chars().any(char::is_control) {
        return Err(SandboxError::Hostname(hostname.chars().take(80).collect()));
    }
    Ok(())
}

/// Sets the OOM score of the process whose directory in procfs is `process`. Values beyond ±1000 are clamped; where the
/// machine does not let it be lowered, it stays.
pub(crate) fn set_oom_score_adj(process: BorrowedFd<'_>, value: i32) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(process, "oom_score_adj", flags, Mode::empty())?;
    match rustix::io::write(&file, value.clamp(-1000, 1000).to_string().as_bytes()) {
        Ok(_) | Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
