//! The first moments of a guest's first process.

use hull_sys::port;
use hull_sys::signal;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode};
use rustix::mount::MoveMountFlags;
use rustix::process::Signal;

use super::place::{DEVICES, NO_ALL, attach, directory, filesystem};
use super::{AGENT_PORT, Doing, GuestError, network};
use crate::protocol::messages::CgroupLayout;

/// The I/O port through which the VMM learns how far the machine has come.
const EVENTS: u16 = 0x0d00;
/// The first process runs.
const STARTED: u8 = 1;
/// The agent listens.
const LISTENING: u8 = 2;

/// Mount point of the cgroup2 hierarchy.
const CGROUP: &str = "/sys/fs/cgroup";

/// Whether this process is the first one of a machine.
pub fn is_first_process() -> bool {
    rustix::process::getpid().is_init() && rustix::net::sockopt::socket_type(rustix::stdio::stdin()).is_err()
}

/// Tells the VMM that the machine's first process runs, if this is it.
pub(crate) fn tell_start() {
    if rustix::process::getpid().is_init() && is_first_process() {
        tell(STARTED);
    }
}

/// Tells the VMM how far the machine has come.
fn tell(event: u8) {
    // A kernel without ioperm, or no such VMM: nobody waits for it then.
    let _ = port::write(EVENTS, event);
}

/// From the initramfs to a socket that waits for the pod's owner.
pub(crate) fn start() -> Result<OwnedFd, GuestError> {
    signal::reset_all();
    signal::block_all().doing(|| "block signals".into())?;
    hull_sys::memory::prefer_small();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    leave_initramfs()?;
    network::loopback()?;
    let socket =
        hull_sys::vsock::listen(AGENT_PORT).doing(|| format!("listen on vsock port {AGENT_PORT}"))?;
    tell(LISTENING);
    rest();
    Ok(socket)
}

/// Leaves the kernel nothing to do by itself that an idle machine would be woken for. Memory is compacted when somebody
/// wants a large piece, and not in advance, which is asked for twice a second.
fn rest() {
    // A kernel that does not compact has no such file.
    let _ = std::fs::write("/proc/sys/vm/compaction_proactiveness", "0");
}

/// A tmpfs as the root: the initramfs's own root can never be changed by pivot_root, with which every container gets
/// its root.
fn leave_initramfs() -> Result<(), GuestError> {
    let root = filesystem("tmpfs", &[("mode", "755"), ("size", "1m")], NO_ALL)?;
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(|| "mount the agent's root".into())?;
    rustix::process::fchdir(&root).doing(|| "enter the agent's root".into())?;
    rustix::process::chroot(".").doing(|| "change to the agent's root".into())?;
    drop(root);
    for path in ["/proc", "/sys", "/dev", "/run"] {
        directory(path)?;
    }
    attach(filesystem("proc", &[], NO_ALL)?, "/proc")?;
    attach(filesystem("sysfs", &[], NO_ALL)?, "/sys")?;
    attach(filesystem("devtmpfs", &[], DEVICES)?, "/dev")?;
    attach(filesystem("cgroup2", &[("nsdelegate", "")], NO_ALL)?, CGROUP)
}

/// The machine's cgroups, as every agent is told of them.
pub(crate) fn cgroups() -> CgroupLayout {
    CgroupLayout { unified: CGROUP.into(), unified_controllers: true, v1: Vec::new() }
}

/// Ends the machine; its VMM ends with it. What is on the disks needs no sync: it ends with the pod, and volumes are
/// written by the host.
pub(crate) fn end() -> ! {
    // What was said last is for whoever reads the console's log.
    let _ = rustix::termios::tcdrain(rustix::stdio::stderr());
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // A first process that ends is a panic, which ends the machine as well.
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    hull_sys::process::exit_now(1)
}
