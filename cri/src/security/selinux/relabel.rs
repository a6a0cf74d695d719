//! Gives files the label that lets a container use them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, DirEntry, FileType, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;

/// The attribute that has a file's label.
const ATTRIBUTE: &str = "security.selinux";
/// Levels of directories of a tree that is relabelled: each holds a descriptor of hulld's.
const MAX_DEPTH: usize = 256;
/// What is the system's and never a volume's; the same that other runtimes refuse.
const SYSTEM: [&str; 24] = [
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
    "/var/log",
];

/// Labels what is behind `place` and, if it is a directory, everything below it, on file systems below it, too. Blocks,
/// for as long as the tree is large: `is_over` is asked before each file, and once it says so, this ends with an error
/// and leaves the rest of the tree as it was.
///
/// No symbolic link is followed, no directory of the system's is changed, and what disappears meanwhile is no error. A
/// file system that keeps no labels (NFS, most of FUSE) stays as it is: whether containers may use it, the policy says.
///
/// # Errors
/// A directory of the system's, more than [`MAX_DEPTH`] levels of directories, the pod's end, or what the kernel says.
pub fn relabel(place: BorrowedFd<'_>, label: &str, is_over: &dyn Fn() -> bool) -> io::Result<()> {
    let path = std::fs::read_link(Path::new("/proc/self/fd").join(place.as_raw_fd().to_string()))?;
    if SYSTEM.iter().any(|system| path == Path::new(system)) {
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
    below(Dir::new(open(place, c".")?)?, label, is_over)
}

/// The directories on the way down are on the heap: a thread's stack is no measure of what a volume may hold.
fn below(root: Dir, label: &str, is_over: &dyn Fn() -> bool) -> io::Result<()> {
    let mut way = vec![root];
    while let Some(directory) = way.last_mut() {
        let Some(entry) = directory.read() else {
            way.pop();
            continue;
        };
        if is_over() {
            return Err(io::Error::other("the pod is ending, and only a part has its label"));
        }
        let entry = entry?;
        let Some(inner) = label_entry(directory.fd()?, &entry, label)? else { continue };
        if way.len() >= MAX_DEPTH {
            return Err(io::Error::other(format!("its directories are more than {MAX_DEPTH} deep")));
        }
        way.push(inner);
    }
    Ok(())
}

/// Labels an entry; what is to be gone through next, if it is a directory.
fn label_entry(directory: BorrowedFd<'_>, entry: &DirEntry, label: &str) -> io::Result<Option<Dir>> {
    let name = entry.file_name();
    if name == c"." || name == c".." {
        return Ok(None);
    }
    let base = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let path = base.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
    if !settle(rustix::fs::lsetxattr(&path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()))? {
        return Ok(None);
    }
    let kind = match entry.file_type() {
        FileType::Unknown => kind(directory, name)?,
        known => known,
    };
    if kind != FileType::Directory {
        return Ok(None);
    }
    match open(directory, name) {
        Ok(inner) => Ok(Some(Dir::new(inner)?)),
        // It has gone, or something else has taken its place.
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
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

fn kind(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<FileType> {
    match rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(status) => Ok(FileType::from_raw_mode(u32::from(status.stx_mode))),
        Err(Errno::NOENT) => Ok(FileType::Unknown),
        Err(errno) => Err(errno.into()),
    }
}

fn open(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
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
        relabel(fs::File::open(&root).unwrap().as_fd(), new, &|| false).unwrap();
        for path in ["", "a", "a/b", "a/b/file", "a/link"] {
            assert_eq!(label(&root.join(path)).as_deref(), Some(new), "{path}");
        }
        assert_eq!(label(&outside), before);
        let file = root.join("a/b/file");
        relabel(fs::File::open(&file).unwrap().as_fd(), "u:r:t", &|| false).unwrap();
        assert_eq!(label(&file).as_deref(), Some("u:r:t"));
    }

    #[test]
    fn the_systems_directories_keep_their_labels() {
        for path in ["/", "/etc", "/usr/../usr", "/var/log"] {
            let error = relabel(fs::File::open(path).unwrap().as_fd(), "u:r:t", &|| false).unwrap_err();
            assert!(error.to_string().contains("the system's own"), "{error}");
        }
    }

    /// Descriptors of this process for anything in `directory`.
    fn held(directory: &Path) -> usize {
        let targets = fs::read_dir("/proc/self/fd").unwrap().flatten();
        targets.filter(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(directory))).count()
    }

    #[test]
    fn the_end_of_the_pod_ends_it_and_leaves_no_descriptor() {
        // Given directories within each other, each with a file
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = directory.path().join("volume");
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        for path in ["file", "a/file", "a/b/file", "a/b/c/file"] {
            fs::write(root.join(path), "x").unwrap();
        }
        let all = ["file", "a", "a/file", "a/b", "a/b/file", "a/b/c", "a/b/c/file"];
        let labelled =
            || all.iter().filter(|path| label(&root.join(path)).as_deref() == Some("u:r:t")).count();
        // When the pod ends after some of them ("." and ".." count)
        let volume = fs::File::open(&root).unwrap();
        let asked = std::cell::Cell::new(0);
        let error = relabel(volume.as_fd(), "u:r:t", &|| {
            asked.set(asked.get() + 1);
            asked.get() > 5
        });
        // Then no more is labelled
        assert!(error.unwrap_err().to_string().contains("the pod is ending"));
        assert_eq!(asked.get(), 6);
        assert!(labelled() < all.len());
        drop(volume);
        assert_eq!(held(directory.path()), 0);
    }

    #[test]
    fn a_tree_as_deep_as_can_be_needs_no_deep_stack_and_a_deeper_one_is_refused() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = directory.path().join("volume");
        // The root is the first level
        let deepest = root.join(vec!["d"; MAX_DEPTH - 1].join("/"));
        fs::create_dir_all(&deepest).unwrap();
        fs::write(deepest.join("file"), "x").unwrap();
        let volume = root.clone();
        let walk = move || relabel(fs::File::open(&volume).unwrap().as_fd(), "u:r:t", &|| false);
        // As large as the stack of tokio's threads
        let on_thread =
            || std::thread::Builder::new().stack_size(2 << 20).spawn(walk.clone()).unwrap().join().unwrap();
        on_thread().unwrap();
        assert_eq!(label(&deepest.join("file")).as_deref(), Some("u:r:t"));
        fs::create_dir(deepest.join("d")).unwrap();
        let error = on_thread().unwrap_err();
        assert!(error.to_string().contains("more than 256 deep"), "{error}");
        assert_eq!(held(directory.path()), 0);
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
