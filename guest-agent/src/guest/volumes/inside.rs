//! Files below a volume's root. Containers may write there, so nothing is resolved beyond it and no link is trusted.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use crate::protocol::messages::write_volume::{Entry, entry::Content};

/// Longest path below a root.
const MAX_PATH: usize = 4095;
const MAX_COMPONENTS: usize = 64;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
const NO_LINKS: ResolveFlags = BENEATH.union(ResolveFlags::NO_SYMLINKS);
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

/// The components of a relative path.
pub(super) fn components(path: &str) -> io::Result<Vec<&str>> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if path.len() > MAX_PATH || path.starts_with('/') || parts.len() > MAX_COMPONENTS {
        return Err(invalid("the path is absolute or too long"));
    }
    if parts.contains(&"..") || path.contains('\0') {
        return Err(invalid("the path leads upwards or has a zero byte"));
    }
    Ok(parts)
}

/// What is at `path`, links followed as long as they stay below `root`. With `make`, directories that are missing are
/// made with these permissions.
pub(super) fn place(root: BorrowedFd<'_>, path: &str, make: Option<Mode>) -> io::Result<OwnedFd> {
    let parts = components(path)?;
    if parts.is_empty() {
        return root.try_clone_to_owned();
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match rustix::fs::openat2(root, parts.join("/"), flags, Mode::empty(), BENEATH) {
        Err(Errno::NOENT) => {}
        found => return Ok(found?),
    }
    let mode = make.ok_or_else(|| io::Error::from(Errno::NOENT))?;
    let mut here = root.try_clone_to_owned()?;
    for (number, _) in parts.iter().enumerate() {
        let upto = parts[..=number].join("/");
        here = match rustix::fs::openat2(root, &upto, DIRECTORY, Mode::empty(), BENEATH) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&here, parts[number], mode)?;
                let made = rustix::fs::openat2(&here, parts[number], DIRECTORY, Mode::empty(), NO_LINKS)?;
                // The umask may have taken something away, and the group is the one above.
                let above = rustix::fs::fstat(&here)?;
                let group = Gid::from_raw(above.st_gid);
                rustix::fs::chownat(&made, "", None, Some(group), AtFlags::EMPTY_PATH)?;
                rustix::fs::chmodat(&made, ".", mode, AtFlags::empty())?;
                made
            }
            found => found?,
        };
    }
    Ok(here)
}

/// Writes each entry where it belongs below `root`.
pub(super) fn write_all(root: BorrowedFd<'_>, entries: &[Entry]) -> io::Result<()> {
    for entry in entries {
        write(root, entry)
            .map_err(|error| io::Error::new(error.kind(), format!("{:?}: {error}", entry.path)))?;
    }
    Ok(())
}

fn write(root: BorrowedFd<'_>, entry: &Entry) -> io::Result<()> {
    let parts = components(&entry.path)?;
    let Some((name, above)) = parts.split_last() else { return Err(invalid("it has no name")) };
    let directory = directories(root, above)?;
    match &entry.content {
        None => Err(invalid("it has no content")),
        Some(Content::Directory(_)) => {
            let made = directories(directory.as_fd(), &[name])?;
            chown(made.as_fd(), entry)?;
            Ok(rustix::fs::chmodat(&made, ".", permissions(entry, 0o755), AtFlags::empty())?)
        }
        Some(Content::Link(target)) => {
            // A link that was there before is replaced.
            match rustix::fs::unlinkat(&directory, *name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            rustix::fs::symlinkat(target, &directory, *name)?;
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            Ok(rustix::fs::chownat(&directory, *name, Some(uid), Some(gid), flags)?)
        }
        Some(Content::File(bytes)) => write_file(directory.as_fd(), name, entry, bytes),
    }
}

fn write_file(directory: BorrowedFd<'_>, name: &str, entry: &Entry, bytes: &[u8]) -> io::Result<()> {
    // A mode without O_CREAT is refused by openat2.
    let (how, mode) = if entry.append {
        (OFlags::APPEND, Mode::empty())
    } else {
        (OFlags::CREATE | OFlags::TRUNC, Mode::RUSR | Mode::WUSR)
    };
    // Not waiting for a reader, should a container have put a pipe there.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | how;
    let file = rustix::fs::openat2(directory, name, flags, mode, NO_LINKS)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(invalid("there is something that is no file"));
    }
    let mut file = File::from(file);
    file.write_all(bytes)?;
    if !entry.append {
        chown(file.as_fd(), entry)?;
        rustix::fs::fchmod(&file, permissions(entry, 0o644))?;
    }
    Ok(())
}

/// Opens directories one below the other and makes those that are missing.
fn directories(root: BorrowedFd<'_>, parts: &[&str]) -> io::Result<OwnedFd> {
    let mut here = root.try_clone_to_owned()?;
    for part in parts {
        match rustix::fs::mkdirat(&here, *part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        here = rustix::fs::openat2(&here, *part, DIRECTORY, Mode::empty(), NO_LINKS)?;
    }
    Ok(here)
}

fn chown(file: BorrowedFd<'_>, entry: &Entry) -> io::Result<()> {
    // All ones means "unchanged" to the kernel, which nobody asked for.
    if entry.uid == u32::MAX || entry.gid == u32::MAX {
        return Err(invalid("its owner is no user"));
    }
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    Ok(rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?)
}

fn permissions(entry: &Entry, default: u32) -> Mode {
    Mode::from_raw_mode(if entry.mode == 0 { default } else { entry.mode & 0o7777 })
}

/// At most `limit` bytes of a file, the last ones.
pub(super) fn read(root: BorrowedFd<'_>, path: &str, limit: u32, links: bool) -> io::Result<Vec<u8>> {
    let parts = components(path)?;
    if parts.is_empty() {
        return Err(invalid("it has no name"));
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = if links { BENEATH } else { NO_LINKS };
    let file = rustix::fs::openat2(root, parts.join("/"), flags, Mode::empty(), resolve)?;
    let facts = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
        return Err(invalid("it is no file"));
    }
    let mut file = File::from(file);
    let size = u64::try_from(facts.st_size).unwrap_or(0);
    file.seek(SeekFrom::Start(size.saturating_sub(limit.into())))?;
    let mut bytes = Vec::new();
    file.take(limit.into()).read_to_end(&mut bytes)?;
    Ok(bytes)
}
