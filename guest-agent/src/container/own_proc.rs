use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::inside::{Links, Root, file_type};

/// The calling thread's directory in the agent's procfs, which no container can have touched; still usable after the
/// agent's root has been left.
#[derive(Debug)]
pub(super) struct OwnProc(OwnedFd);

impl OwnProc {
    /// The process must still be in the agent's root.
    pub(super) fn open() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open("/proc/thread-self", flags, Mode::empty())?))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens the very file behind an O_PATH descriptor that has been checked.
    pub(super) fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let path = format!("fd/{}", fd.as_raw_fd());
        Ok(rustix::fs::openat(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// The content of a regular file inside `root`; empty if there is none. More than `limit` bytes are an error, and
    /// so is anything that is not a regular file (opening a device or FIFO of an image could do or hang anything).
    pub(super) fn read_inside(&self, root: &Root, path: &str, limit: usize) -> io::Result<Vec<u8>> {
        let found = match root.resolve(path, Links::Follow) {
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            result => result?,
        };
        if file_type(found.as_fd())? != FileType::RegularFile {
            return Err(io::Error::other("not a regular file"));
        }
        let file = std::fs::File::from(self.reopen(found.as_fd(), OFlags::RDONLY)?);
        let mut content = Vec::new();
        let read = file.take(limit as u64 + 1).read_to_end(&mut content)?;
        if read > limit { Err(io::Error::other(format!("larger than {limit} bytes"))) } else { Ok(content) }
    }

    /// Writes a security label for the next execve to attr/`name`.
    pub(super) fn write_attribute(&self, name: &str, value: &str) -> io::Result<()> {
        let path = format!("attr/{name}");
        let file = rustix::fs::openat(&self.0, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, value.as_bytes())?;
        Ok(())
    }

    /// The process's current cgroup namespace.
    pub(super) fn cgroup_namespace(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, "ns/cgroup", flags, Mode::empty())?)
    }
}

/// Nothing is there, or something on the way is no directory.
pub(super) fn is_missing(error: &io::Error) -> bool {
    [Errno::NOENT, Errno::NOTDIR].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    // CVE-2026-47262: an unbounded /etc/group.
    #[test]
    fn files_of_an_image_are_read_with_a_bound_and_only_if_they_are_files() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(fs::File::open(directory.path()).unwrap().into());
        let own = OwnProc::open().unwrap();
        fs::write(directory.path().join("file"), "12345").unwrap();
        symlink("/dev/zero", directory.path().join("device")).unwrap();
        symlink("/etc/passwd", directory.path().join("hosts-own")).unwrap();
        fs::create_dir(directory.path().join("directory")).unwrap();
        assert_eq!(own.read_inside(&root, "/file", 5).unwrap(), b"12345");
        assert!(own.read_inside(&root, "/file", 4).is_err());
        assert_eq!(own.read_inside(&root, "/missing/file", 4).unwrap(), b"");
        assert_eq!(own.read_inside(&root, "/device", 4).unwrap(), b"", "followed inside the root only");
        assert_eq!(own.read_inside(&root, "/hosts-own", 1 << 20).unwrap(), b"");
        assert!(own.read_inside(&root, "/directory", 4).is_err());
    }
}
