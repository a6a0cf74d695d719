//! hulld's part of volumes from the host: puts a directory or a file of the host at /volumes/N of a running
//! hull-virtiofsd.
//!
//! The volume is a clone of the source's mount, and of each mount below it, with ids mapped so that a user of the guest is
//! the user of the same number on the host, and nothing can be executed, no device opened, no set-user-ID bit believed
//! through it. Read-only is an attribute of these mounts: neither the guest nor the server can change it.

/// Mounts of this process.
mod mounts;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use hull_sys::mount::{
    self, Attributes, MountAttrFlags as Attr, MoveMountFlags, OpenTreeFlags, Propagation, UnmountFlags,
};
use hull_sys::namespace::on_thread_in;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use thiserror::Error;

use mounts::Mounts;

/// Most mounts below a volume.
const MAX_SUBMOUNTS: usize = 256;
const RESTRICTED: Attr = Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NODEV).union(Attr::MOUNT_ATTR_NOEXEC);

/// Why a source cannot be a volume. The message is for the user who asked for it.
#[derive(Debug, Error)]
pub enum AttachError {
    /// It is neither a directory nor a regular file.
    #[error(
        "{path} is {what}: only directories and regular files of the host can be shared with a microVM",
        path = .path.display()
    )]
    Type {
        /// The source.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Its file system cannot be seen with other ids.
    #[error(
        "{path} is on {filesystem}, whose files cannot be shared with a microVM for writing: the file system cannot map \
         ids (idmapped mounts); what everybody may read can be mounted read-only",
        path = .path.display()
    )]
    Unmappable {
        /// The source.
        path: PathBuf,
        /// Type of the file system.
        filesystem: String,
    },
    /// There are too many mounts below the source.
    #[error("{path} has {count} mounts below it, more than the {MAX_SUBMOUNTS} that are allowed", path = .path.display())]
    TooManyMounts {
        /// The source.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// A step failed.
    #[error("cannot {doing} {path}: {source}", path = .path.display())]
    Step {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn step<'a, E: Into<io::Error>>(doing: &'static str, path: &'a Path) -> impl FnOnce(E) -> AttachError + 'a {
    move |error| AttachError::Step { doing, path: path.to_owned(), source: error.into() }
}

/// What a volume is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// A directory; else a regular file.
    pub directory: bool,
    /// It cannot be written to.
    pub readonly: bool,
}

/// How a mount point is opened: an O_PATH descriptor of it, links not followed. `TimedOut` if its file system does not
/// answer.
pub type Reach = fn(&Path) -> io::Result<OwnedFd>;

/// A running hull-virtiofsd, as hulld reaches it.
#[derive(Debug)]
pub struct Server {
    mounts: File,
    users: File,
    reach: Reach,
}

impl Server {
    /// The hull-virtiofsd with this number in the caller's PID namespace.
    ///
    /// # Errors
    /// There is no such process, or no permission.
    pub fn of(pid: i32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let process = rustix::fs::openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())?;
        Self::at(process.as_fd())
    }

    /// The one whose directory in /proc this is: a caller that made sure of whose it is can be sure of what follows.
    ///
    /// # Errors
    /// The process has ended, or no permission.
    pub fn at(process: BorrowedFd<'_>) -> io::Result<Self> {
        let open = |name: &str| -> io::Result<File> {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            Ok(rustix::fs::openat(process, name, flags, Mode::empty())?.into())
        };
        Ok(Self { mounts: open("ns/mnt")?, users: open("ns/user")?, reach: mounts::open })
    }

    /// With another way to open mount points below a source: behind one there may be a server that is gone.
    #[must_use]
    pub fn reaching_by(self, reach: Reach) -> Self {
        Self { reach, ..self }
    }

    /// Whether it lives in the same user namespace as the process with this directory in /proc.
    ///
    /// # Errors
    /// That process has ended, or no permission.
    pub fn shares_users_with(&self, process: BorrowedFd<'_>) -> io::Result<bool> {
        let theirs = rustix::fs::statat(process, "ns/user", AtFlags::empty())?;
        let ours = rustix::fs::fstat(&self.users)?;
        Ok((ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino))
    }

    /// Makes the file or directory `place` of the caller's mount namespace (any descriptor of it, O_PATH will do) the
    /// volume `index`; `source` is what messages call it. If the volume is there already, nothing changes: give each
    /// source a number of its own. Blocks; needs root on the host and a thread for a moment.
    ///
    /// # Errors
    /// See [`AttachError`]; nothing is left then.
    pub fn attach(
        &self,
        index: u32,
        source: &Path,
        place: BorrowedFd<'_>,
        readonly: bool,
    ) -> Result<Attached, AttachError> {
        let plan = Plan::make(self, source, place, readonly)?;
        on_thread_in(&[self.mounts.as_fd()], || plan.carry_out(index))
            .map_err(step("enter the server of volumes for", source))??;
        Ok(plan.attached)
    }

    /// Takes the volume `index` away: what is open of it in the guest stays readable, new lookups fail. One that is not
    /// there is fine.
    ///
    /// # Errors
    /// The mount cannot be detached.
    pub fn detach(&self, index: u32) -> io::Result<()> {
        on_thread_in(&[self.mounts.as_fd()], || take_away(&format!("/volumes/{index}")))??;
        Ok(())
    }
}

/// All mounts of a volume, cloned and not attached anywhere.
struct Plan {
    source: PathBuf,
    attached: Attached,
    top: OwnedFd,
    /// By path below the source, parents first.
    below: Vec<(PathBuf, OwnedFd)>,
}

impl Plan {
    fn make(
        server: &Server,
        source: &Path,
        place: BorrowedFd<'_>,
        readonly: bool,
    ) -> Result<Self, AttachError> {
        // As the kernel knows it: its server is not asked, for it may be gone.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat =
            rustix::fs::statx(place, "", flags, StatxFlags::BASIC_STATS).map_err(step("look at", source))?;
        let mode = u32::from(stat.stx_mode);
        let directory = match FileType::from_raw_mode(mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            other => return Err(AttachError::Type { path: source.to_owned(), what: name(other) }),
        };
        let mounts = Mounts::read().map_err(step("read the mounts around", source))?;
        let of_source = mounts.of(place).map_err(step("find the mount of", source))?;
        let open = if directory { 0o005 } else { 0o004 };
        let world_readable = mode & open == open;
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let top = mount::open_tree(place, "", tree | OpenTreeFlags::AT_EMPTY_PATH)
            .map_err(step("take the mount of", source))?;
        if !server.restrict(&top, readonly).map_err(step("restrict the mount of", source))? {
            if !(readonly && world_readable) {
                let filesystem = of_source.filesystem.clone();
                return Err(AttachError::Unmappable { path: source.to_owned(), filesystem });
            }
            restrict_unmapped(&top).map_err(step("restrict the mount of", source))?;
        }
        let below = if directory { server.below(&mounts, place, source, readonly)? } else { Vec::new() };
        Ok(Self { source: source.to_owned(), attached: Attached { directory, readonly }, top, below })
    }

    /// In the server's mount namespace.
    fn carry_out(&self, index: u32) -> Result<(), AttachError> {
        let place = PathBuf::from(format!("/volumes/{index}"));
        if is_mounted(&place) {
            return Ok(());
        }
        // Assembled beside its place, and moved there whole: nobody sees a part of it.
        let beside = format!("/volumes/.{index}");
        let result = take_away(&beside).map_err(step("clear a place for", &self.source)).and_then(|()| {
            self.assemble(Path::new(&beside))?;
            self.make_place(&place)?;
            mount::move_mount(CWD, beside.as_str(), CWD, &place, MoveMountFlags::empty())
                .map_err(step("put in its place", &self.source))
        });
        let cleared = take_away(&beside).map_err(step("clear up after", &self.source));
        if result.is_err() {
            // The mount is not there, only what it was to lie on.
            let _ = take_away(&format!("/volumes/{index}"));
        }
        result.and(cleared)
    }

    fn make_place(&self, place: &Path) -> Result<(), AttachError> {
        let made = if self.attached.directory {
            rustix::fs::mkdir(place, Mode::from_raw_mode(0o555))
        } else {
            let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::open(place, flags, Mode::from_raw_mode(0o444)).map(drop)
        };
        match made {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(step("make a place for", &self.source)(error)),
        }
    }

    fn assemble(&self, place: &Path) -> Result<(), AttachError> {
        self.make_place(place)?;
        let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        mount::move_mount(&self.top, "", CWD, place, empty).map_err(step("attach", &self.source))?;
        let root = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(step("open the volume of", &self.source))?;
        for (path, tree) in &self.below {
            // Whoever may write there may have put a link in the way meanwhile.
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let target = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)
                .map_err(step("find the mount point below", &self.source))?;
            mount::move_mount(tree, "", &target, "", empty | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)
                .map_err(step("attach what is mounted below", &self.source))?;
        }
        Ok(())
    }
}

impl Server {
    /// Maps the ids of a cloned mount and restricts it; false if its file system cannot map ids.
    fn restrict(&self, tree: &OwnedFd, readonly: bool) -> io::Result<bool> {
        let readonly = if readonly { Attr::MOUNT_ATTR_RDONLY } else { Attr::empty() };
        let attributes = Attributes {
            set: RESTRICTED | readonly,
            propagation: Some(Propagation::Private),
            user_namespace: Some(self.users.as_fd()),
            ..Attributes::default()
        };
        match mount::set_attributes(tree.as_fd(), false, &attributes) {
            Ok(()) => Ok(true),
            // EPERM: the mount is mapped already (a container's), or its file system belongs to a user namespace.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What is mounted below the source and can be seen there. What cannot be mapped is there read-only, and of it what
    /// everybody may read.
    fn below(
        &self,
        mounts: &Mounts,
        place: BorrowedFd<'_>,
        source: &Path,
        readonly: bool,
    ) -> Result<Vec<(PathBuf, OwnedFd)>, AttachError> {
        let found = mounts.below(place, self.reach).map_err(step("find the mounts below", source))?;
        if found.len() > MAX_SUBMOUNTS {
            return Err(AttachError::TooManyMounts { path: source.to_owned(), count: found.len() });
        }
        let mut below = Vec::new();
        for (path, opened) in found {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH;
            let tree = mount::open_tree(&opened, "", flags).map_err(step("take a mount below", source))?;
            if !self.restrict(&tree, readonly).map_err(step("restrict a mount below", source))? {
                restrict_unmapped(&tree).map_err(step("restrict a mount below", source))?;
            }
            below.push((path, tree));
        }
        Ok(below)
    }
}

/// Without mapped ids nobody of the pod owns anything in it: it can be read as far as everybody can.
fn restrict_unmapped(tree: &OwnedFd) -> io::Result<()> {
    let attributes = Attributes {
        set: RESTRICTED | Attr::MOUNT_ATTR_RDONLY,
        propagation: Some(Propagation::Private),
        ..Attributes::default()
    };
    mount::set_attributes(tree.as_fd(), false, &attributes)
}

/// Whether something is mounted on the path.
fn is_mounted(path: &Path) -> bool {
    let id = |path: &Path| mounts::id_of(CWD, path, AtFlags::SYMLINK_NOFOLLOW).ok();
    path.parent().is_some_and(|parent| id(path).is_some() && id(path) != id(parent))
}

/// Unmounts what is at the path, if anything is, and removes what it lay on.
fn take_away(path: &str) -> io::Result<()> {
    while is_mounted(Path::new(path)) {
        mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    }
    for flags in [AtFlags::REMOVEDIR, AtFlags::empty()] {
        match rustix::fs::unlinkat(CWD, path, flags) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

const fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::Socket => "a socket",
        FileType::Fifo => "a named pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "no file",
    }
}
