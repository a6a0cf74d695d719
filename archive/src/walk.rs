//! The way through a tree: every name once, parents first, each directory's names in order.

use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::error::{ArchiveError, printable};

/// Longest path that is archived, as the longest that is taken from an archive (PATH_MAX).
const MAX_PATH: usize = 4096;
/// Most names of one directory that are kept while it is read.
const MAX_NAMES: usize = 4_000_000;

const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Walks a tree without following links. Only the names of directories on the way are held.
pub(crate) struct Walk<'t> {
    root: BorrowedFd<'t>,
    one_filesystem: bool,
    /// For each level the names that are left, the next one last.
    levels: Vec<Vec<CString>>,
    path: Vec<u8>,
    /// How long `path` was before each level.
    lengths: Vec<usize>,
}

impl<'t> Walk<'t> {
    /// Of everything below `root`; with `one_filesystem` mount points below it are not entered.
    pub(crate) fn new(root: BorrowedFd<'t>, one_filesystem: bool) -> Result<Self, ArchiveError> {
        let mut walk =
            Self { root, one_filesystem, levels: Vec::new(), path: Vec::new(), lengths: Vec::new() };
        walk.descend(b".")?;
        Ok(walk)
    }

    /// The next path, relative to the root.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, ArchiveError> {
        loop {
            let Some(level) = self.levels.last_mut() else { return Ok(None) };
            let length = self.lengths.last().copied().unwrap_or(0);
            self.path.truncate(length);
            let Some(name) = level.pop() else {
                self.levels.pop();
                self.lengths.pop();
                continue;
            };
            if length > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.as_bytes());
            if self.path.len() > MAX_PATH {
                let path = printable(&self.path);
                return Err(ArchiveError::Unrepresentable {
                    path,
                    reason: "its path is longer than 4096 bytes",
                });
            }
            return Ok(Some(self.path.clone()));
        }
    }

    /// Goes into the directory that [`Walk::next`] gave last. One that has vanished has no names.
    pub(crate) fn enter(&mut self) -> Result<(), ArchiveError> {
        let path = self.path.clone();
        self.descend(&path)
    }

    /// Opens a path of the tree; None if it is no more, or is something else by now.
    pub(crate) fn open(&self, path: &[u8], flags: OFlags) -> Result<Option<OwnedFd>, ArchiveError> {
        open(self.root, path, flags, self.one_filesystem).map_err(|errno| ArchiveError::Tree {
            action: "open",
            path: printable(path),
            source: errno.into(),
        })
    }

    fn descend(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        let failed =
            |errno: Errno| ArchiveError::Tree { action: "list", path: printable(path), source: errno.into() };
        let Some(directory) = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)? else { return Ok(()) };
        let mut names = Vec::new();
        for entry in Dir::new(directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_owned();
            if !matches!(name.as_bytes(), b"." | b"..") {
                names.push(name);
            }
            if names.len() > MAX_NAMES {
                return Err(ArchiveError::TooLarge {
                    what: "names in one directory",
                    limit: MAX_NAMES as u64,
                });
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        self.lengths.push(self.path.len());
        self.levels.push(names);
        Ok(())
    }
}

fn open(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    one_filesystem: bool,
) -> Result<Option<OwnedFd>, Errno> {
    let resolve = if one_filesystem { BENEATH | ResolveFlags::NO_XDEV } else { BENEATH };
    let mut flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if !flags.contains(OFlags::PATH) {
        // A FIFO would make us wait, a terminal would become ours.
        flags |= OFlags::NONBLOCK | OFlags::NOCTTY;
    }
    loop {
        match openat2(root, path, flags, Mode::empty(), resolve) {
            Ok(fd) => return Ok(Some(fd)),
            // Renamed somewhere on the way, meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO | Errno::XDEV) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    }
}
