//! Paths inside a root filesystem that may be hostile: nothing resolved here ever leads out of the root.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Symbolic links followed in one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// Tries against a path that somebody else keeps changing.
const MAX_RACES: usize = 64;

/// A directory that is the root of all paths resolved below it (chroot semantics, race-free).
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

/// What a missing last component becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

/// Whether symbolic links on the way are followed (inside the root) or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    Follow,
    Refuse,
}

impl Root {
    pub(super) const fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens `path`, absolute or relative to the root, following links inside the root only.
    pub(super) fn open(&self, path: &str, flags: OFlags, links: Links) -> io::Result<OwnedFd> {
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if links == Links::Refuse {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        let mut races = 0;
        loop {
            match rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename somewhere in the tree made the kernel unsure whether the path stayed inside.
                Err(Errno::AGAIN) if races < MAX_RACES => races += 1,
                result => return Ok(result?),
            }
        }
    }

    /// An O_PATH descriptor of what is at `path`.
    pub(super) fn resolve(&self, path: &str, links: Links) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH, links)
    }

    /// Like [`Root::resolve`], but makes what is missing: directories on the way (0755) and at the end a directory or
    /// an empty file (0644). What exists is left as it is, whatever its kind.
    pub(super) fn create(&self, path: &str, kind: Kind, links: Links) -> io::Result<OwnedFd> {
        match self.resolve(path, links) {
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            result => return result,
        }
        let mut walk =
            Walk { root: self.0.as_fd(), above: Vec::new(), current: self.0.try_clone()?, links: 0 };
        let mut todo = Vec::new();
        push_components(&mut todo, path.as_bytes());
        while let Some(name) = todo.pop() {
            let last = todo.is_empty();
            match walk.step(&name, if last { kind } else { Kind::Directory }, links)? {
                Step::Into => {}
                Step::Link(target) => push_components(&mut todo, &walk.follow(target)?),
                Step::End(found) if last => return Ok(found),
                Step::End(_) => return Err(Errno::NOTDIR.into()),
            }
        }
        Ok(walk.current)
    }

    /// Makes the parent of `path` and returns it with the last component.
    pub(super) fn create_parent<'a>(&self, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if name.is_empty() || name == "." || name == ".." {
            return Err(Errno::INVAL.into());
        }
        let parent = if parent.is_empty() { "/" } else { parent };
        Ok((self.create(parent, Kind::Directory, Links::Follow)?, name))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Components in reverse, so that the next one is at the end. Empty ones and "." say nothing.
fn push_components(todo: &mut Vec<Vec<u8>>, path: &[u8]) {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    todo.extend(parts.rev().map(<[u8]>::to_vec));
}

/// A path walked one component at a time, each opened in the directory before it and never followed by the kernel.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    /// The directories from the root down to, not including, `current`. ".." goes back here, so never above the root.
    above: Vec<OwnedFd>,
    current: OwnedFd,
    links: usize,
}

enum Step {
    /// `current` is now that directory.
    Into,
    /// The component is a link to this.
    Link(Vec<u8>),
    /// The component is something that nothing can be below.
    End(OwnedFd),
}

impl Walk<'_> {
    fn step(&mut self, name: &[u8], missing: Kind, links: Links) -> io::Result<Step> {
        if name == b".." {
            if let Some(parent) = self.above.pop() {
                self.current = parent;
            }
            return Ok(Step::Into);
        }
        let found = self.open_or_make(name, missing)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) {
            FileType::Symlink if links == Links::Refuse => Err(Errno::LOOP.into()),
            FileType::Symlink => Ok(Step::Link(rustix::fs::readlinkat(&found, "", Vec::new())?.into_bytes())),
            FileType::Directory => {
                self.above.push(std::mem::replace(&mut self.current, found));
                Ok(Step::Into)
            }
            _ => Ok(Step::End(found)),
        }
    }

    fn open_or_make(&self, name: &[u8], missing: Kind) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for _ in 0..MAX_RACES {
            match rustix::fs::openat(&self.current, name, flags, Mode::empty()) {
                Err(Errno::NOENT) => {}
                result => return Ok(result?),
            }
            let made = match missing {
                Kind::Directory => rustix::fs::mkdirat(&self.current, name, Mode::from_raw_mode(0o755)),
                Kind::File => {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    let mode = Mode::from_raw_mode(0o644);
                    rustix::fs::openat(&self.current, name, flags | OFlags::NOFOLLOW, mode).map(drop)
                }
            };
            match made {
                // Made by somebody else meanwhile, or by us: look at what it is.
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::AGAIN.into())
    }

    fn follow(&mut self, target: Vec<u8>) -> io::Result<Vec<u8>> {
        self.links += 1;
        if self.links > MAX_LINKS || target.is_empty() {
            return Err(Errno::LOOP.into());
        }
        if target.starts_with(b"/") {
            self.current = self.root.try_clone_to_owned()?;
            self.above.clear();
        }
        Ok(target)
    }
}

/// The kind of file behind a descriptor, O_PATH ones included.
pub(super) fn file_type(fd: BorrowedFd<'_>) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// True if `fd` is on procfs.
pub(super) fn is_procfs(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(fd)?.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// Gives what is at `name` in `directory` (no link is followed) an owner.
pub(super) fn set_owner(directory: BorrowedFd<'_>, name: &str, uid: u32, gid: u32) -> io::Result<()> {
    use rustix::fs::{Gid, Uid};
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL.into());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    /// A directory that contains `root`, so that an escape would land beside it.
    fn scratch() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        let root = Root::new(File::open(directory.path().join("root")).unwrap().into());
        (directory, root)
    }

    #[test]
    fn missing_directories_and_files_are_made_inside() {
        let (directory, root) = scratch();
        root.create("/a/b/c", Kind::Directory, Links::Follow).unwrap();
        root.create("/a/b/file", Kind::File, Links::Follow).unwrap();
        assert!(directory.path().join("root/a/b/c").is_dir());
        assert!(directory.path().join("root/a/b/file").is_file());
    }

    #[test]
    fn dots_and_absolute_links_stay_below_the_root() {
        let (directory, root) = scratch();
        let inner = directory.path().join("root");
        symlink("/../../escape", inner.join("absolute")).unwrap();
        symlink("../../escape-too", inner.join("relative")).unwrap();
        root.create("/../../up/x", Kind::Directory, Links::Follow).unwrap();
        root.create("/absolute/x", Kind::Directory, Links::Follow).unwrap();
        root.create("/relative", Kind::File, Links::Follow).unwrap();
        assert!(inner.join("up/x").is_dir());
        assert!(inner.join("escape/x").is_dir());
        assert!(inner.join("escape-too").is_file());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing beside the root");
    }

    #[test]
    fn links_can_be_refused() {
        let (directory, root) = scratch();
        symlink("real", directory.path().join("root/proc")).unwrap();
        for path in ["/proc", "/proc/sys"] {
            let error = root.create(path, Kind::Directory, Links::Refuse).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        }
        assert!(!directory.path().join("root/real").exists());
    }

    #[test]
    fn a_ring_of_links_ends() {
        let (directory, root) = scratch();
        symlink("two", directory.path().join("root/one")).unwrap();
        symlink("one/x", directory.path().join("root/two")).unwrap();
        assert!(root.create("/one/y", Kind::Directory, Links::Follow).is_err());
    }

    #[test]
    fn nothing_is_made_below_a_file() {
        let (directory, root) = scratch();
        fs::write(directory.path().join("root/file"), "").unwrap();
        assert!(root.create("/file/below", Kind::Directory, Links::Follow).is_err());
        assert!(root.create_parent("/file/below/node").is_err());
        assert!(root.create_parent("/").is_err());
    }
}
