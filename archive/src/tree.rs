//! A whole tree, as an archive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, OFlags, Statx, StatxFlags, statx};
use rustix::io::Errno;

use crate::entry::{Entry, Kind, Timestamp, Writer, Xattrs};
use crate::error::{ArchiveError, printable};
use crate::sparse::{self, Segment};
use crate::walk::Walk;

/// Most files with several names whose first name is remembered at one time.
const MAX_LINKED: usize = 1 << 20;
/// Bytes of all extended attributes of one entry, as in archives that are read.
const MAX_XATTRS: usize = 64 << 10;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";

/// What overlayfs' marks mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// The tree is an upper directory: a device 0:0 becomes a whiteout `.wh.NAME`, an opaque directory gets the entry
    /// `.wh..wh..opq`.
    ToWhiteouts,
    /// The tree is what a container sees; there are no marks.
    None,
}

/// How owners in the tree become owners in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// As they are.
    Same,
    /// The tree belongs to a user namespace that maps `count` ids from 0 on to `base`; others become 65534 (nobody), as
    /// they look inside.
    From {
        /// The host's id of the namespace's 0.
        base: u32,
        /// How many ids are mapped.
        count: u32,
    },
}

impl Ids {
    fn inside(self, id: u32) -> u32 {
        match self {
            Ids::Same => id,
            Ids::From { base, count } => id.checked_sub(base).filter(|id| *id < count).unwrap_or(65_534),
        }
    }
}

/// What to write and what not.
#[derive(Clone, Copy, Debug)]
pub struct Options<'o> {
    /// Overlay marks.
    pub marks: Marks,
    /// Owners.
    pub ids: Ids,
    /// Stay on the filesystem of the root: mounts of a running container are not part of it.
    pub one_filesystem: bool,
    /// Paths that are left out with all below them, relative to the root.
    pub skip: &'o [&'o [u8]],
    /// Most entries.
    pub max_entries: u64,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { marks: Marks::None, ids: Ids::Same, one_filesystem: true, skip: &[], max_entries: 2_000_000 }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Entries, whiteouts included.
    pub entries: u64,
    /// Bytes of all files, holes included.
    pub content: u64,
    /// Bytes of the archive.
    pub bytes: u64,
}

/// Writes everything below `root` to `out`, which should be buffered, and ends the archive. Sockets are left out, as is
/// what vanishes while it is looked at; a file that changes meanwhile is in the archive with the size it had at first.
/// `root` must be a directory that may be read. Blocking.
pub fn write_tree(
    root: BorrowedFd<'_>,
    out: impl Write,
    options: &Options<'_>,
) -> Result<Summary, ArchiveError> {
    let mut tree = Tree {
        walk: Walk::new(root, options.one_filesystem)?,
        writer: Writer::new(out),
        options,
        linked: HashMap::new(),
        summary: Summary::default(),
    };
    tree.root_marks(root)?;
    while let Some(path) = tree.walk.next()? {
        if options.skip.contains(&path.as_slice()) {
            continue;
        }
        tree.add(path)?;
    }
    let Tree { writer, mut summary, .. } = tree;
    summary.bytes = writer.written() + 1024;
    writer.finish()?;
    Ok(summary)
}

/// One name in the upper directory of an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// Relative to the directory.
    pub path: Vec<u8>,
    /// It hides what a lower layer has there and is nothing itself.
    pub is_whiteout: bool,
}

/// Tells `visit` of every name in the upper directory `root`, parents first, in order, until it answers false.
pub fn list_upper(root: BorrowedFd<'_>, mut visit: impl FnMut(Name) -> bool) -> Result<(), ArchiveError> {
    let mut walk = Walk::new(root, true)?;
    while let Some(path) = walk.next()? {
        let Some(place) = walk.open(&path, OFlags::PATH)? else { continue };
        let status = look_at(&place, &path)?;
        let kind = FileType::from_raw_mode(status.stx_mode.into());
        if kind == FileType::Directory {
            walk.enter()?;
        }
        if !visit(Name { path, is_whiteout: is_whiteout(kind, &status) }) {
            break;
        }
    }
    Ok(())
}

fn is_whiteout(kind: FileType, status: &Statx) -> bool {
    kind == FileType::CharacterDevice && status.stx_rdev_major == 0 && status.stx_rdev_minor == 0
}

/// A file with several names, until the last of them was seen.
struct Linked {
    first: Vec<u8>,
    left: u32,
}

struct Tree<'t, W> {
    walk: Walk<'t>,
    writer: Writer<W>,
    options: &'t Options<'t>,
    linked: HashMap<(u32, u32, u64), Linked>,
    summary: Summary,
}

impl<W: Write> Tree<'_, W> {
    /// The root itself has no entry: its owner and mode are the base image's. What it hides is told.
    fn root_marks(&mut self, root: BorrowedFd<'_>) -> Result<(), ArchiveError> {
        let is_opaque = self.options.marks == Marks::ToWhiteouts && is_opaque(root, b".")?;
        if is_opaque { self.mark(OPAQUE_MARK.to_vec(), Timestamp::default()) } else { Ok(()) }
    }

    fn add(&mut self, path: Vec<u8>) -> Result<(), ArchiveError> {
        let Some(place) = self.walk.open(&path, OFlags::PATH)? else { return Ok(()) };
        let status = look_at(&place, &path)?;
        let kind = FileType::from_raw_mode(status.stx_mode.into());
        if kind == FileType::Socket {
            return Ok(());
        }
        let translated = self.options.marks == Marks::ToWhiteouts;
        let mtime = Timestamp { seconds: status.stx_mtime.tv_sec, nanoseconds: status.stx_mtime.tv_nsec };
        if translated {
            if is_whiteout(kind, &status) {
                return self.mark(beside(&path, WHITEOUT), mtime);
            }
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            if name.starts_with(WHITEOUT) {
                let reason = "names that begin with .wh. mean deletions in an image";
                return Err(ArchiveError::Unrepresentable { path: printable(&path), reason });
            }
        }
        let mut entry = Entry {
            xattrs: xattrs(place.as_fd(), &path)?,
            path,
            kind: Kind::Fifo,
            mode: u32::from(status.stx_mode) & 0o7777,
            uid: self.options.ids.inside(status.stx_uid),
            gid: self.options.ids.inside(status.stx_gid),
            mtime,
        };
        match kind {
            FileType::Directory => {
                entry.kind = Kind::Directory;
                let opaque = translated && is_opaque(place.as_fd(), &entry.path)?;
                let inside = [entry.path.as_slice(), b"/", OPAQUE_MARK].concat();
                self.put(&entry)?;
                if opaque {
                    self.mark(inside, mtime)?;
                }
                self.walk.enter()
            }
            FileType::RegularFile => match self.first_name(&status, &entry.path) {
                Some(first) => {
                    entry.kind = Kind::HardLink(first);
                    entry.xattrs.clear();
                    self.put(&entry)
                }
                None => self.regular(entry, &status),
            },
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&place, c"", Vec::new());
                let target = target.map_err(failed("read the link", &entry.path))?;
                entry.kind = Kind::Link(target.into_bytes());
                self.put(&entry)
            }
            FileType::CharacterDevice => {
                entry.kind = Kind::Character(status.stx_rdev_major, status.stx_rdev_minor);
                self.put(&entry)
            }
            FileType::BlockDevice => {
                entry.kind = Kind::Block(status.stx_rdev_major, status.stx_rdev_minor);
                self.put(&entry)
            }
            FileType::Fifo => self.put(&entry),
            _ => Ok(()),
        }
    }

    fn regular(&mut self, mut entry: Entry, before: &Statx) -> Result<(), ArchiveError> {
        let Some(file) = self.walk.open(&entry.path, OFlags::RDONLY)? else { return Ok(()) };
        let mut file = File::from(file);
        let status = look_at(&file, &entry.path)?;
        if status.stx_ino != before.stx_ino
            || FileType::from_raw_mode(status.stx_mode.into()) != FileType::RegularFile
        {
            // Something else has its name by now.
            return Ok(());
        }
        let size = status.stx_size;
        self.count()?;
        self.summary.content = self.summary.content.saturating_add(size);
        let segments = sparse::segments(&file, size).map_err(io_failed("look for holes in", &entry.path))?;
        let Some(segments) = segments else {
            file.seek(SeekFrom::Start(0)).map_err(io_failed("read", &entry.path))?;
            entry.kind = Kind::File(size);
            return self.writer.file(&entry, &mut file);
        };
        let map = sparse::map(&segments, size);
        let data: u64 = segments.iter().map(|segment| segment.length).sum();
        entry.kind = Kind::Sparse { stored: map.len() as u64 + data, size };
        let data = SegmentReader { file, segments: segments.into_iter(), left: 0 };
        self.writer.file(&entry, &mut map.as_slice().chain(data))
    }

    /// The name under which a file with several was written before.
    fn first_name(&mut self, status: &Statx, path: &[u8]) -> Option<Vec<u8>> {
        if status.stx_nlink < 2 {
            return None;
        }
        let key = (status.stx_dev_major, status.stx_dev_minor, status.stx_ino);
        if let Some(linked) = self.linked.get_mut(&key) {
            linked.left = linked.left.saturating_sub(1);
            let first = linked.first.clone();
            if linked.left == 0 {
                self.linked.remove(&key);
            }
            return Some(first);
        }
        // Beyond the bound the names become files of their own, which is as true.
        if self.linked.len() < MAX_LINKED {
            self.linked.insert(key, Linked { first: path.to_vec(), left: status.stx_nlink - 1 });
        }
        None
    }

    fn put(&mut self, entry: &Entry) -> Result<(), ArchiveError> {
        self.count()?;
        self.writer.entry(entry)
    }

    /// An empty file that says something about the layer.
    fn mark(&mut self, path: Vec<u8>, mtime: Timestamp) -> Result<(), ArchiveError> {
        self.put(&Entry { path, kind: Kind::File(0), mode: 0, uid: 0, gid: 0, mtime, xattrs: Vec::new() })
    }

    fn count(&mut self) -> Result<(), ArchiveError> {
        self.summary.entries += 1;
        match self.summary.entries > self.options.max_entries {
            true => Err(ArchiveError::TooLarge { what: "entries", limit: self.options.max_entries }),
            false => Ok(()),
        }
    }
}

/// Only the stretches of a file that have data, one after the other.
struct SegmentReader {
    file: File,
    segments: std::vec::IntoIter<Segment>,
    left: u64,
}

impl Read for SegmentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let Some(segment) = self.segments.next() else { return Ok(0) };
            self.file.seek(SeekFrom::Start(segment.offset))?;
            self.left = segment.length;
        }
        let wanted = self.left.min(buffer.len() as u64) as usize;
        let read = self.file.read(&mut buffer[..wanted])?;
        if read == 0 {
            // Shorter by now. The stream must keep its length: zeros take the place of what is gone.
            buffer[..wanted].fill(0);
            self.left -= wanted as u64;
            return Ok(wanted);
        }
        self.left -= read as u64;
        Ok(read)
    }
}

fn look_at(place: impl AsFd, path: &[u8]) -> Result<Statx, ArchiveError> {
    statx(place, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map_err(failed("look at", path))
}

/// `a/b` with a prefix of its last name: `a/.wh.b`.
fn beside(path: &[u8], prefix: &[u8]) -> Vec<u8> {
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    [&path[..at], prefix, &path[at..]].concat()
}

/// An `O_PATH` descriptor's file by a name that calls without a descriptor variant take; it ends at the file itself, also
/// when that is a symbolic link.
fn by_descriptor(place: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", place.as_raw_fd())
}

/// overlayfs.rst, "whiteouts and opaque directories"; `user.` where it was mounted with `userxattr`.
fn is_opaque(place: BorrowedFd<'_>, path: &[u8]) -> Result<bool, ArchiveError> {
    for name in [c"trusted.overlay.opaque", c"user.overlay.opaque"] {
        let mut value = [0; 8];
        match rustix::fs::getxattr(by_descriptor(place), name, &mut value[..]) {
            Ok(1) if value[0] == b'y' => return Ok(true),
            Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::RANGE) => {}
            Err(errno) => return Err(failed("read the overlay's mark of", path)(errno)),
        }
    }
    Ok(false)
}

/// Those attributes that mean the same wherever the image runs: `user.*`, file capabilities, ACLs.
fn xattrs(place: BorrowedFd<'_>, path: &[u8]) -> Result<Xattrs, ArchiveError> {
    let place = by_descriptor(place);
    let mut names = vec![0; MAX_XATTRS];
    let length = match rustix::fs::listxattr(&place, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(failed("list the attributes of", path)(errno)),
    };
    let mut kept = Vec::new();
    let mut bytes = 0;
    for name in names[..length].split(|byte| *byte == 0).filter(|name| is_kept(name)) {
        let mut value = vec![0; MAX_XATTRS];
        match rustix::fs::getxattr(&place, name, &mut value[..]) {
            Ok(length) => value.truncate(length),
            Err(Errno::NODATA) => continue,
            Err(errno) => return Err(failed("read an attribute of", path)(errno)),
        }
        bytes += name.len() + value.len();
        if bytes > MAX_XATTRS {
            let reason = "it has more than 64 KiB of extended attributes";
            return Err(ArchiveError::Unrepresentable { path: printable(path), reason });
        }
        value.shrink_to_fit();
        kept.push((name.to_vec(), value));
    }
    kept.sort();
    Ok(kept)
}

fn is_kept(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

fn failed(action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> ArchiveError {
    let path = printable(path);
    move |errno| ArchiveError::Tree { action, path, source: errno.into() }
}

fn io_failed(action: &'static str, path: &[u8]) -> impl FnOnce(io::Error) -> ArchiveError {
    let path = printable(path);
    move |source| ArchiveError::Tree { action, path, source }
}
