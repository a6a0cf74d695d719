//! Standard streams and terminals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::sandbox::layout;

use super::ChildStdio;
use super::failure::{During, Failure, Stage};
use super::inside::{Kind, Links, Root};
use super::mounts::attach;
use super::own_proc::OwnProc;
use super::report::Reporter;

/// DEVPTS_SUPER_MAGIC of linux/magic.h.
const DEVPTS: u64 = 0x1cd1;

/// What becomes descriptors 0, 1 and 2 of the process.
pub(super) enum Streams {
    Terminal(OwnedFd),
    /// Each with whether it is ours to give to the process's user (the null device is not).
    Separate([(OwnedFd, bool); 3]),
}

impl ChildStdio {
    /// Gives pipes to a user as the agent numbers it, who cannot be given them from inside a user namespace. Best
    /// effort, as in [`Streams::install`].
    pub(super) fn give_to(&self, uid: Option<u32>) {
        for fd in [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten() {
            give(fd.as_fd(), uid);
        }
    }
}

fn give(fd: BorrowedFd<'_>, uid: Option<u32>) {
    if let Some(uid) = uid {
        // A file on a read-only filesystem, a socket, something of a user namespace: not ours to change.
        let _ = rustix::fs::fchown(fd, Some(rustix::fs::Uid::from_raw(uid)), None);
    }
}

impl Streams {
    /// Gives them to a user as the agent numbers it, before the pod's user namespace is joined.
    pub(super) fn give_to(&self, uid: Option<u32>) {
        match self {
            Self::Terminal(fd) => give(fd.as_fd(), uid),
            Self::Separate(all) => {
                all.iter().filter(|(_, ours)| *ours).for_each(|(fd, _)| give(fd.as_fd(), uid));
            }
        }
    }

    /// With a terminal, it is opened in the container's own devpts and its primary end goes to the agent. What is not
    /// given becomes the container's /dev/null. The mounts are there by now; the process is still in the agent's root
    /// unless `root` is its root already, for which `null` is the agent's own null device.
    pub(super) fn open(
        stdio: ChildStdio,
        terminal: Option<(u16, u16)>,
        root: &Root,
        own: &OwnProc,
        null: BorrowedFd<'_>,
        reporter: &Reporter,
    ) -> Result<Self, Failure> {
        if let Some(size) = terminal {
            let (primary, replica) = open_terminal(root, own, size)
                .during(Stage::Stdio, || "cannot open a terminal in the container's /dev/pts")?;
            reporter
                .terminal(primary.as_fd())
                .during(Stage::Stdio, || "cannot hand the terminal to the agent")?;
            return Ok(Self::Terminal(replica));
        }
        let one = |given: Option<OwnedFd>| -> io::Result<(OwnedFd, bool)> {
            match given {
                // Above 2, so that no later dup2 hits one that is still needed.
                Some(fd) => Ok((rustix::io::fcntl_dupfd_cloexec(&fd, 3)?, true)),
                None => Ok((container_null(root, own).or_else(|_| null.try_clone_to_owned())?, false)),
            }
        };
        let all = || -> io::Result<_> { Ok([one(stdio.stdin)?, one(stdio.stdout)?, one(stdio.stderr)?]) };
        all().map(Self::Separate).during(Stage::Stdio, || "cannot open the standard streams")
    }

    /// Makes them 0, 1 and 2, gives pipes and terminal to the user (who reopens them as /dev/stdout), and makes a
    /// terminal the controlling one of the session.
    pub(super) fn install(&self, uid: u32) -> Result<(), Failure> {
        let fds: [(BorrowedFd<'_>, bool); 3] = match self {
            Self::Terminal(fd) => [(fd.as_fd(), true); 3],
            Self::Separate(all) => all.each_ref().map(|(fd, ours)| (fd.as_fd(), *ours)),
        };
        for (fd, ours) in fds {
            if ours && uid != 0 {
                give(fd, Some(uid));
            }
        }
        let install = || -> rustix::io::Result<()> {
            rustix::stdio::dup2_stdin(fds[0].0)?;
            rustix::stdio::dup2_stdout(fds[1].0)?;
            rustix::stdio::dup2_stderr(fds[2].0)?;
            if let Self::Terminal(fd) = self {
                rustix::process::ioctl_tiocsctty(fd)?;
            }
            Ok(())
        };
        install().during(Stage::Stdio, || "cannot set up the standard streams")
    }

    /// Binds the terminal at /dev/console. The node is made by us in a fresh tmpfs or found; never followed.
    pub(super) fn bind_console(&self, root: &Root) -> Result<(), Failure> {
        use hull_sys::mount::{OpenTreeFlags, open_tree};
        let Self::Terminal(replica) = self else { return Ok(()) };
        let doing = || "cannot bind the terminal at /dev/console";
        let console = root.create("/dev/console", Kind::File, Links::Refuse).during(Stage::Stdio, doing)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree =
            open_tree(replica, "", flags | OpenTreeFlags::AT_EMPTY_PATH).during(Stage::Stdio, doing)?;
        attach(tree.as_fd(), console.as_fd(), "/dev/console")
    }
}

/// The agent's own null device; the process must be in the agent's root.
pub(super) fn agent_null() -> Result<OwnedFd, Failure> {
    rustix::fs::open(layout::NULL, OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())
        .during(Stage::Stdio, || "cannot open the agent's null device")
}

/// Opens /dev/null of the container if it really is the null device.
fn container_null(root: &Root, own: &OwnProc) -> io::Result<OwnedFd> {
    open_device(root, own, "/dev/null", rustix::fs::makedev(1, 3), OFlags::RDWR)
}

/// Opens a character device after checking that it is the one that is meant; a container may have replaced it.
fn open_device(root: &Root, own: &OwnProc, path: &str, number: u64, flags: OFlags) -> io::Result<OwnedFd> {
    let found = root.resolve(path, Links::Refuse)?;
    let stat = rustix::fs::fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || stat.st_rdev != number {
        return Err(io::Error::other(format!("{path} is not the device that it should be")));
    }
    own.reopen(found.as_fd(), flags)
}

fn open_terminal(root: &Root, own: &OwnProc, size: (u16, u16)) -> io::Result<(OwnedFd, OwnedFd)> {
    let multiplexer = rustix::fs::makedev(5, 2);
    let primary = open_device(root, own, "/dev/pts/ptmx", multiplexer, OFlags::RDWR | OFlags::NOCTTY)?;
    if rustix::fs::fstatfs(&primary)?.f_type as u64 != DEVPTS {
        return Err(io::Error::other("/dev/pts/ptmx is not in devpts"));
    }
    rustix::pty::unlockpt(&primary)?;
    // By descriptor: no path of the container is looked up.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let replica = rustix::pty::ioctl_tiocgptpeer(&primary, flags)?;
    let (rows, columns) = size;
    if rows != 0 && columns != 0 {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&primary, size)?;
    }
    Ok((primary, replica))
}
