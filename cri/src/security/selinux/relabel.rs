//! Gives files the label that lets a container use them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;

/// The attribute that has a file's label.
const ATTRIBUTE: &str = "security.selinux";
/// Deepest tree that is relabelled: each level holds a descriptor.
const MAX_DEPTH: usize = 2048;
/// What is the system's and never a volume's; the same that other runtimes refuse.
const SYSTEM: [&str; 23] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
];

/// Labels what is behind `place` and, if it is a directory, everything below it, on file systems below it, too. Blocks.
///
/// No symbolic link is followed, no directory of the system's is changed, and what disappears meanwhile is no error. A
/// file system that keeps no labels (NFS, most of FUSE) stays as it is: whether containers may use it, the policy says.
pub fn relabel(place: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    let path = std::fs::read_link(Path::new("/proc/self/fd").join(place.as_raw_fd().to_string()))?;
    if SYSTEM.iter().any(|system| path == Path::new(system)) || path == Path::new("/var/log") {
        return Err(io::Error::other(format!("the labels of {} are the system's own", path.display())));
    }
    let own = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    // Through the link of procfs, whose own label it is not to be.
    if !settle(rustix::fs::setxattr(&own, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()))? {
        return Ok(());
    }
    if FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode) != FileType::Directory {
        return Ok(());
    }
    let root = open(place, c".")?;
    below(&root, label, 0)
}

fn below(directory: &OwnedFd, label: &str, depth: usize) -> io::Result<()> {
    if depth >= MAX_DEPTH {
        return Err(io::Error::other(format!("its directories are more than {MAX_DEPTH} deep")));
    }
    let base = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = base.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let labelled = rustix::fs::lsetxattr(&path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty());
        if !settle(labelled)? {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => kind(directory, name)?,
            known => known,
        };
        if kind == FileType::Directory {
            match open(directory, name) {
                Ok(inner) => below(&inner, label, depth + 1)?,
                // It has gone, or something else has taken its place.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// False if there is nothing to go on with: it has gone, or its file system keeps no labels.
fn settle(result: rustix::io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOENT | Errno::ROFS) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_gone(error: &io::Error) -> bool {
    [Errno::NOENT, Errno::NOTDIR, Errno::LOOP]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn kind(directory: &OwnedFd, name: &std::ffi::CStr) -> io::Result<FileType> {
    match rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(status) => Ok(FileType::from_raw_mode(u32::from(status.stx_mode))),
        Err(Errno::NOENT) => Ok(FileType::Unknown),
        Err(errno) => Err(errno.into()),
    }
}

fn open(at: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;

    /// A kernel without SELinux keeps the attribute all the same, on file systems that have attributes.
    fn label(path: &Path) -> Option<String> {
        let mut value = [0; 256];
        let length = rustix::fs::lgetxattr(path, ATTRIBUTE, &mut value[..]).ok()?;
        Some(String::from_utf8_lossy(&value[..length]).trim_end_matches('\0').to_owned())
    }

    #[test]
    fn a_tree_is_labelled_whole_and_nothing_behind_a_link() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (root, outside) = (directory.path().join("volume"), directory.path().join("outside"));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/file"), "x").unwrap();
        fs::write(&outside, "x").unwrap();
        std::os::unix::fs::symlink(&outside, root.join("a/link")).unwrap();
        let before = label(&outside);
        let new = "system_u:object_r:container_file_t:s0:c1,c2";
        relabel(fs::File::open(&root).unwrap().as_fd(), new).unwrap();
        for path in ["", "a", "a/b", "a/b/file", "a/link"] {
            assert_eq!(label(&root.join(path)).as_deref(), Some(new), "{path}");
        }
        assert_eq!(label(&outside), before);
        let file = root.join("a/b/file");
        relabel(fs::File::open(&file).unwrap().as_fd(), "u:r:t").unwrap();
        assert_eq!(label(&file).as_deref(), Some("u:r:t"));
    }

    #[test]
    fn the_systems_directories_keep_their_labels() {
        for path in ["/", "/etc", "/usr/../usr"] {
            let error = relabel(fs::File::open(path).unwrap().as_fd(), "u:r:t").unwrap_err();
            assert!(error.to_string().contains("the system's own"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_labelled_or_has_gone_is_passed_by() {
        for errno in [Errno::OPNOTSUPP, Errno::NOENT, Errno::ROFS] {
            assert!(!settle(Err(errno)).unwrap());
        }
        assert!(settle(Ok(())).unwrap());
        assert!(settle(Err(Errno::PERM)).is_err());
    }
}
