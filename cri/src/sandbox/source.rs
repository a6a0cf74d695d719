//! What a container needs from outside its pod, and how it is opened on the host.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::Propagation;
use hull_images::LayerId;
use hull_sys::mount::{OpenTreeFlags, open_tree};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::SandboxError;
use super::reach::reach;
use crate::security::selinux::relabel;

/// One thing from outside the pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The tree of an image's layer.
    Layer(LayerId),
    /// A host path that was asked for as a mount.
    Tree(HostTree),
    /// A directory of the container's own below hull's root.
    Own(PathBuf),
    /// The log file, opened for append; made with its directories if missing.
    Log(LogPlace),
    /// A file of resctrl's that takes processes, opened for writing.
    Tasks(PathBuf),
}

/// Where a container's log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPlace {
    /// The pod's directory for logs; absolute, symbolic links are followed.
    pub directory: PathBuf,
    /// The file below it; no link is followed.
    pub file: PathBuf,
}

impl LogPlace {
    /// The whole path.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.file)
    }
}

/// A host path to be mounted in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTree {
    /// Absolute; symbolic links are followed.
    pub path: PathBuf,
    /// How mounts pass between host and container; what the host's mount must allow.
    pub propagation: Propagation,
    /// SELinux label that everything there gets first.
    pub label: Option<String>,
}

/// A detached copy of the mounts at `path`, with all below it.
pub(super) fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    clone_reached(&reach(path)?)
}

fn clone_reached(place: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(place, "", flags)?)
}

/// Opens a host path that was asked for; a missing one is made as a directory, as kubelet's users have come to expect
/// of every runtime. One that is to be labelled is no longer once `is_over` says that its pod is ending.
pub(super) fn open_host_tree(tree: &HostTree, is_over: &dyn Fn() -> bool) -> Result<OwnedFd, SandboxError> {
    let path = &tree.path;
    let place = match reach(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(SandboxError::host("make the missing mount source", path))?;
            reach(path)
        }
        other => other,
    };
    let place = place.map_err(SandboxError::host("open the mount source", path))?;
    check_propagation(tree, &place)?;
    if let Some(label) = &tree.label {
        relabel(place.as_fd(), label, is_over).map_err(SandboxError::host("label for SELinux", path))?;
    }
    clone_reached(&place).map_err(SandboxError::host("open the mount source", path))
}

/// A directory of hull's own.
pub(super) fn open_own(path: &Path) -> Result<OwnedFd, SandboxError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).map_err(|errno| SandboxError::host("open", path)(errno.into()))
}

/// Opens what a class of cache and memory bandwidth takes its processes by.
pub(super) fn open_tasks(path: &Path) -> Result<OwnedFd, SandboxError> {
    let opened = fs::OpenOptions::new().write(true).open(path);
    opened.map(OwnedFd::from).map_err(SandboxError::host("open the RDT class's", path))
}

/// Opens a container's log. Below the pod's directory no link is followed and nothing but a plain file is opened: a
/// pod that may write there could point it at any file of the host, or put a FIFO there that makes us wait for ever.
pub fn open_log(place: &LogPlace) -> Result<OwnedFd, SandboxError> {
    let (path, directory) = (place.path(), &place.directory);
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o755).create(directory);
    made.map_err(SandboxError::host("make the log directory", directory))?;
    let below = fs::File::open(directory).map_err(SandboxError::host("open", directory))?;
    let opened = match open_below(&below, &place.file) {
        Err(Errno::NOENT) => make_parents(&below, &place.file).and_then(|()| open_below(&below, &place.file)),
        other => other,
    };
    let file = opened.map_err(|errno| SandboxError::host("open the log", &path)(errno.into()))?;
    let status = rustix::fs::fstat(&file);
    let status = status.map_err(|errno| SandboxError::host("look at the log", &path)(errno.into()))?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(SandboxError::Source(format!("the log {} is not a regular file", path.display())));
    }
    Ok(file)
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

fn open_below(directory: &fs::File, file: &Path) -> Result<OwnedFd, Errno> {
    // A regular file knows no waiting; a FIFO without a reader is ENXIO instead of a wait.
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, file, flags | OFlags::NOCTTY, Mode::from_raw_mode(0o640), BENEATH)
}

/// The directories on the way to the file, from the top.
fn make_parents(directory: &fs::File, file: &Path) -> Result<(), Errno> {
    let above = |path: &Path| path.parent().map(Path::to_owned).filter(|path| !path.as_os_str().is_empty());
    let parents: Vec<PathBuf> = std::iter::successors(above(file), |path| above(path)).collect();
    for path in parents.iter().rev() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = above(path).unwrap_or_else(|| ".".into());
        let parent = rustix::fs::openat2(directory, parent, flags, Mode::empty(), BENEATH)?;
        let name = path.file_name().ok_or(Errno::INVAL)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Propagation works only if the host's mount takes part in it (mount_namespaces(7)).
fn check_propagation(tree: &HostTree, place: &OwnedFd) -> Result<(), SandboxError> {
    if tree.propagation == Propagation::Private {
        return Ok(());
    }
    let path = &tree.path;
    let status = rustix::fs::statx(place, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|errno| SandboxError::host("look at the mount source", path)(errno.into()))?;
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(SandboxError::host("read", "/proc/self/mountinfo"))?;
    let (shared, slave) = peer_group(&table, status.stx_mnt_id);
    let (fits, wanted, name) = match tree.propagation {
        Propagation::Bidirectional => (shared, "a shared mount", "Bidirectional"),
        _ => (shared || slave, "a shared or slave mount", "HostToContainer"),
    };
    if fits {
        return Ok(());
    }
    Err(SandboxError::Source(format!(
        "{} cannot be mounted with {name} propagation: it does not lie on {wanted}",
        path.display()
    )))
}

/// Whether the mount with this id is shared, and whether it is a slave (proc(5), mountinfo, optional fields).
fn peer_group(table: &str, mount_id: u64) -> (bool, bool) {
    let id = mount_id.to_string();
    let line = table.lines().find(|line| line.split(' ').next() == Some(&id)).unwrap_or_default();
    let optional: Vec<&str> = line.split(' ').skip(6).take_while(|field| *field != "-").collect();
    let has = |tag: &str| optional.iter().any(|field| field.starts_with(tag));
    (has("shared:"), has("master:"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_missing_mount_source_becomes_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let tree = HostTree { path: path.clone(), propagation: Propagation::Private, label: None };
        open_host_tree(&tree, &|| false).unwrap();
        assert!(path.is_dir());
    }

    #[test]
    fn a_dangling_link_is_no_mount_source() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        std::os::unix::fs::symlink("/nowhere/at/all", &path).unwrap();
        let tree = HostTree { path, propagation: Propagation::Private, label: None };
        let error = open_host_tree(&tree, &|| false).unwrap_err();
        assert!(error.to_string().contains("make the missing mount source"), "{error}");
    }

    #[test]
    fn a_log_is_made_with_its_directory_and_never_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let place = |file: &str| LogPlace { directory: root.join("link-to-pod"), file: file.into() };
        fs::create_dir(root.join("pod")).unwrap();
        std::os::unix::fs::symlink("pod", root.join("link-to-pod")).unwrap();
        open_log(&place("a/b/0.log")).unwrap();
        let log = root.join("pod/a/b/0.log");
        assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::metadata(root.join("pod/a")).unwrap().permissions().mode() & 0o7777, 0o755);
        open_log(&place("0.log")).unwrap();

        let target = root.join("shadow");
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, root.join("pod/a/1.log")).unwrap();
        std::os::unix::fs::symlink(root, root.join("pod/up")).unwrap();
        for file in ["a/1.log", "up/shadow", "up/new.log", "up/new/0.log", "a", "../shadow", "/etc/passwd"] {
            assert!(open_log(&place(file)).is_err(), "{file}");
        }
        assert!(!root.join("new.log").exists() && !root.join("new").exists());
        let null = LogPlace { directory: "/dev".into(), file: "null".into() };
        assert!(open_log(&null).is_err());
    }

    #[test]
    fn a_fifo_in_a_logs_place_makes_nobody_wait() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("0.log");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(open_log(&LogPlace { directory: directory.path().into(), file: "0.log".into() }).is_err());
    }

    #[test]
    fn peer_groups_are_read_from_the_mount_table() {
        let table = "22 1 0:1 / /a rw shared:7 - ext4 x rw\n\
                     23 1 0:1 / /b rw master:7 propagate_from:2 - ext4 x rw\n\
                     24 1 0:1 / /c rw - ext4 shared:1 rw\n";
        assert_eq!(peer_group(table, 22), (true, false));
        assert_eq!(peer_group(table, 23), (false, true));
        assert_eq!(peer_group(table, 24), (false, false));
        assert_eq!(peer_group(table, 99), (false, false));
    }
}
