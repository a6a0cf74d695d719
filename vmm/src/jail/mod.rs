//! How a process of a pod is confined: hull-vmm and hull-virtiofsd.
//!
//! Each begins as the host's root with one socket, standard input, and reads one request with descriptors from it. Then
//! it clones itself into the pod's cgroups and into namespaces of its own, leaves everything behind that it was not
//! given, and installs a system call filter on every thread. docs/security.md says what remains.

mod birth;
mod descent;
mod error;
mod filters;
mod privileges;
mod root;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use crate::protocol::messages::{self, request::Call};
use crate::protocol::{Access, Descriptors};

pub use birth::Birth;
pub use error::JailError;
pub use filters::{ThreadKind, confine};
pub use privileges::{VMM_ID, VOLUME_CAPABILITIES};

use descent::{Cgroups, Users};

/// What hull-vmm has, and all that it will ever have: it can open nothing.
#[derive(Debug)]
pub struct Born {
    /// What to build.
    pub machine: messages::Machine,
    /// The agent's vsock port in the guest.
    pub agent_port: u32,
    /// Of what to build it.
    pub files: BootFiles,
    /// The connection to hulld, which waits for an answer.
    pub birth: Birth,
    /// When the first process started.
    pub started: Instant,
    /// When it had read the request.
    pub read: Instant,
}

/// The descriptors of a machine, of the types that the request promises.
#[derive(Debug)]
pub struct BootFiles {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The guest's kernel, a regular file open for reading.
    pub kernel: OwnedFd,
    /// Its initramfs, likewise.
    pub initramfs: OwnedFd,
    /// The scratch disk, a regular file open for reading and writing.
    pub scratch: OwnedFd,
    /// Listening unix socket for streams to the agent.
    pub vsock_listener: OwnedFd,
    /// Listening unix socket for control connections.
    pub control_listener: OwnedFd,
    /// The console's log, a regular file open for append.
    pub console: OwnedFd,
    /// The tap device of a machine with a network.
    pub tap: Option<OwnedFd>,
}

impl BootFiles {
    fn take(boot: &messages::Boot, fds: &mut Descriptors) -> Result<Self, JailError> {
        let with_network = boot.machine.as_ref().is_some_and(|machine| machine.network);
        if with_network != boot.tap.is_some() {
            return Err(JailError::Request(
                "a tap device is needed exactly by a machine with a network".into(),
            ));
        }
        Ok(Self {
            kvm: fds.character_device(boot.kvm, "KVM device")?,
            kernel: fds.file(boot.kernel, "kernel", Access::ReadOnly)?,
            initramfs: fds.file(boot.initramfs, "initramfs", Access::ReadOnly)?,
            scratch: fds.file(boot.scratch, "scratch disk", Access::ReadWrite)?,
            vsock_listener: fds.socket(boot.vsock_listener, "listener for streams", true)?,
            control_listener: fds.socket(boot.control_listener, "listener for control", true)?,
            console: fds.file(boot.console, "console's log", Access::Append)?,
            tap: boot.tap.map(|number| fds.character_device(number, "tap device")).transpose()?,
        })
    }

    fn all(&self) -> Vec<BorrowedFd<'_>> {
        let fixed = [
            &self.kvm,
            &self.kernel,
            &self.initramfs,
            &self.scratch,
            &self.vsock_listener,
            &self.control_listener,
            &self.console,
        ];
        fixed.into_iter().chain(&self.tap).map(AsFd::as_fd).collect()
    }
}

/// Makes this process a pod's VMM: reads Boot from standard input and goes on in a confined clone, PID 1 of its own
/// namespace, with one thread and with no filter yet: each thread calls [`confine`] for itself.
///
/// The process that called it ends with status 0 once the clone is let in.
///
/// # Errors
/// hulld has been told already. The process must end.
pub fn enter() -> Result<Born, JailError> {
    let started = Instant::now();
    let (birth, call, fds) = Birth::receive()?;
    let read = Instant::now();
    match enter_vmm(&birth, call, fds) {
        Ok((machine, agent_port, files, pid)) => {
            Ok(Born { machine, agent_port, files, birth: birth.known_as(pid), started, read })
        }
        Err(error) => Err(birth.refused(error)),
    }
}

type Entered = (messages::Machine, u32, BootFiles, i32);

fn enter_vmm(birth: &Birth, call: Call, mut fds: Descriptors) -> Result<Entered, JailError> {
    let Call::Boot(boot) = call else { return Err(JailError::NotBoot) };
    let part = |what: &str| JailError::Request(format!("it says nothing of the {what}"));
    let machine = boot.machine.clone().ok_or_else(|| part("machine"))?;
    let jail = boot.jail.as_ref().ok_or_else(|| part("jail"))?;
    let files = BootFiles::take(&boot, &mut fds)?;
    let cgroups = Cgroups::take(jail, &mut fds)?;
    drop(fds);
    let pid = descent::descend(Users::New(jail), cgroups, jail.oom_score_adj)?;
    let mut keep = files.all();
    keep.push(birth.socket());
    leave_host(&keep)?;
    let root = root::detached("0")?;
    root::enter(root.as_fd())?;
    drop(root);
    root::freeze()?;
    privileges::limit(jail.nofile)?;
    privileges::give_up(VMM_ID, 0)?;
    let agent_port = if boot.agent_port == 0 { crate::protocol::AGENT_PORT } else { boot.agent_port };
    Ok((machine, agent_port, files, pid))
}

/// What hull-virtiofsd has: its root holds /volumes and nothing else.
#[derive(Debug)]
pub struct BornForVolumes {
    /// Connected socket to the VMM.
    pub vmm: OwnedFd,
    /// Most inodes and files that may be open for the guest.
    pub open_files: u64,
    /// The process's own /proc/self/fd, through which it opens anew what it has a descriptor of.
    pub own_descriptors: OwnedFd,
    /// The connection to hulld, which waits for an answer.
    pub birth: Birth,
}

/// Open files for the guest if the request does not say.
const OPEN_FILES: u64 = 100_000;
/// Descriptors for the server itself, besides those for the guest.
const OWN_FILES: u64 = 128;

/// Like [`enter`], for hull-virtiofsd: reads BootVolumes.
///
/// # Errors
/// hulld has been told already. The process must end.
pub fn enter_for_volumes() -> Result<BornForVolumes, JailError> {
    let (birth, call, fds) = Birth::receive()?;
    match enter_volumes(&birth, call, fds) {
        Ok((vmm, open_files, own_descriptors, pid)) => {
            Ok(BornForVolumes { vmm, open_files, own_descriptors, birth: birth.known_as(pid) })
        }
        Err(error) => Err(birth.refused(error)),
    }
}

type EnteredForVolumes = (OwnedFd, u64, OwnedFd, i32);

fn enter_volumes(birth: &Birth, call: Call, mut fds: Descriptors) -> Result<EnteredForVolumes, JailError> {
    let Call::BootVolumes(boot) = call else { return Err(JailError::NotBoot) };
    let jail = boot.jail.as_ref().ok_or_else(|| JailError::Request("it says nothing of the jail".into()))?;
    let vmm = fds.socket(boot.vmm, "connection to the VMM", false)?;
    let users = fds.take(boot.user_namespace, "user namespace")?;
    let cgroups = Cgroups::take(jail, &mut fds)?;
    drop(fds);
    // Before the capabilities over the host are gone.
    let root = root::detached_with_volumes()?;
    let pid = descent::descend(Users::Of(users.as_fd()), cgroups, jail.oom_score_adj)?;
    drop(users);
    leave_host(&[vmm.as_fd(), root.as_fd(), birth.socket()])?;
    let own_descriptors = root::own_descriptors()?;
    root::enter(root.as_fd())?;
    drop(root);
    let wanted = if boot.open_files == 0 { OPEN_FILES } else { boot.open_files };
    let descriptors = if jail.nofile == 0 { wanted.saturating_add(OWN_FILES) } else { jail.nofile };
    let descriptors = privileges::limit(descriptors)?;
    privileges::give_up(0, VOLUME_CAPABILITIES)?;
    let open_files = wanted.min(descriptors.saturating_sub(OWN_FILES));
    Ok((vmm, open_files, own_descriptors, pid))
}

/// Drops every descriptor but these, and the starter's session.
fn leave_host(keep: &[BorrowedFd<'_>]) -> Result<(), JailError> {
    use error::Doing;
    hull_sys::confine::close_all_but(keep).doing("close descriptors")?;
    rustix::process::setsid().map(drop).doing("begin a session")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}
