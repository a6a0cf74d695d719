//! What a container needs from outside its pod, and how it is opened on the host.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::Propagation;
use hull_images::LayerId;
use hull_sys::mount::{OpenTreeFlags, open_tree};
use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::SandboxError;

/// One thing from outside the pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The tree of an image's layer.
    Layer(LayerId),
    /// A host path that was asked for as a mount.
    Tree(HostTree),
    /// A directory of the container's own below hull's root.
    Own(PathBuf),
    /// The log file, opened for append; made with its directory if missing.
    Log(PathBuf),
}

/// A host path to be mounted in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTree {
    /// Absolute; symbolic links are followed.
    pub path: PathBuf,
    /// How mounts pass between host and container; what the host's mount must allow.
    pub propagation: Propagation,
}

/// A detached copy of the mounts at `path`, with all below it.
pub(super) fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// Opens a host path that was asked for; a missing one is made as a directory, as kubelet's users have come to expect
/// of every runtime.
pub(super) fn open_host_tree(tree: &HostTree) -> Result<OwnedFd, SandboxError> {
    let path = &tree.path;
    match clone_tree(path) {
        Ok(fd) => {
            check_propagation(tree)?;
            Ok(fd)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(SandboxError::host("make the missing mount source", path))?;
            check_propagation(tree)?;
            clone_tree(path).map_err(SandboxError::host("open the mount source", path))
        }
        Err(error) => Err(SandboxError::host("open the mount source", path)(error)),
    }
}

/// A directory of hull's own.
pub(super) fn open_own(path: &Path) -> Result<OwnedFd, SandboxError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).map_err(|errno| SandboxError::host("open", path)(errno.into()))
}

/// Opens a container's log. The last component is never followed if it is a link: pods that may write to the log
/// directory could point it at any file of the host.
pub fn open_log(path: &Path) -> Result<OwnedFd, SandboxError> {
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.append(true).create(true).mode(0o640);
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32).open(path)
    };
    let opened = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(directory) = path.parent() {
                let mut builder = fs::DirBuilder::new();
                let made = builder.recursive(true).mode(0o755).create(directory);
                made.map_err(SandboxError::host("make the log directory", directory))?;
            }
            open()
        }
        other => other,
    };
    let file = opened.map_err(SandboxError::host("open the log", path))?;
    let kind = file.metadata().map_err(SandboxError::host("look at the log", path))?.file_type();
    if !kind.is_file() {
        return Err(SandboxError::Source(format!("the log {} is not a regular file", path.display())));
    }
    Ok(file.into())
}

/// Propagation works only if the host's mount takes part in it (mount_namespaces(7)).
fn check_propagation(tree: &HostTree) -> Result<(), SandboxError> {
    if tree.propagation == Propagation::Private {
        return Ok(());
    }
    let path = &tree.path;
    let status = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)
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
        open_host_tree(&HostTree { path: path.clone(), propagation: Propagation::Private }).unwrap();
        assert!(path.is_dir());
    }

    #[test]
    fn a_dangling_link_is_no_mount_source() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        std::os::unix::fs::symlink("/nowhere/at/all", &path).unwrap();
        let error = open_host_tree(&HostTree { path, propagation: Propagation::Private }).unwrap_err();
        assert!(error.to_string().contains("make the missing mount source"), "{error}");
    }

    #[test]
    fn a_log_is_made_with_its_directory_and_never_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("pod/name/0.log");
        open_log(&log).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o7777, 0o640);
        let target = directory.path().join("shadow");
        fs::write(&target, "").unwrap();
        let link = directory.path().join("pod/name/1.log");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(open_log(&link).is_err());
        assert!(open_log(Path::new("/dev/null")).is_err());
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
