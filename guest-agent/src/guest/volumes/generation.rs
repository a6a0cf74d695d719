//! Volumes that are followed: each generation of files in a directory of its own, put in the place of the one before
//! by one rename of the link `..data`, in the layout that kubelet's AtomicWriter has on hosts. So programs that watch
//! the link or a file see one event, and never a half of an update.

use std::collections::BTreeSet;
use std::io;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::inside::{components, write_all};
use crate::protocol::messages::WriteVolume;

/// Link to the directory of the generation that is in place.
const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";
/// Deepest directory that is cleared away.
const MAX_DEPTH: usize = 70;

/// The generation in place and the one that is being written.
#[derive(Debug, Default)]
pub(super) struct Generations {
    current: Option<u64>,
    next: Option<u64>,
}

fn directory(generation: u64) -> String {
    format!("..{generation}")
}

impl Generations {
    /// Takes a part of a generation, and with the last one puts it in place.
    pub(super) fn write(&mut self, root: BorrowedFd<'_>, call: &WriteVolume) -> io::Result<()> {
        if call.generation == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a generation is not 0"));
        }
        if self.current == Some(call.generation) {
            return Ok(());
        }
        for entry in &call.entries {
            if components(&entry.path)?.first().is_some_and(|name| name.starts_with("..")) {
                let reason = format!("{:?} begins with two dots", entry.path);
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
        }
        let name = directory(call.generation);
        if self.next != Some(call.generation) {
            if let Some(abandoned) = self.next.take() {
                remove_tree(root, &directory(abandoned), 0)?;
            }
            rustix::fs::mkdirat(root, &name, Mode::from_raw_mode(0o755))?;
            rustix::fs::chmodat(root, &name, Mode::from_raw_mode(0o755), AtFlags::empty())?;
            self.next = Some(call.generation);
        }
        let new = open_directory(root, &name)?;
        write_all(new.as_fd(), &call.entries)?;
        if call.last {
            put_in_place(root, new.as_fd(), &name)?;
            self.next = None;
            if let Some(old) = self.current.replace(call.generation) {
                remove_tree(root, &directory(old), 0)?;
            }
        }
        Ok(())
    }
}

fn put_in_place(root: BorrowedFd<'_>, new: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(root, DATA_NEW, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    rustix::fs::symlinkat(name, root, DATA_NEW)?;
    rustix::fs::renameat(root, DATA_NEW, root, DATA)?;
    let wanted = names(new)?;
    for name in &wanted {
        match rustix::fs::symlinkat(format!("{DATA}/{name}"), root, name.as_str()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for gone in names(root)?.difference(&wanted) {
        // Only links: a container that may write here may have made something of its own.
        if kind(root, gone)? == FileType::Symlink {
            rustix::fs::unlinkat(root, gone.as_str(), AtFlags::empty())?;
        }
    }
    Ok(())
}

fn kind(directory: BorrowedFd<'_>, name: &str) -> io::Result<FileType> {
    let facts = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(facts.st_mode))
}

/// Names in a directory that do not begin with two dots.
fn names(directory: BorrowedFd<'_>) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in Dir::new(open_directory(directory, ".")?)? {
        if let Ok(name) = entry?.file_name().to_str()
            && !name.starts_with("..")
            && name != "."
        {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

fn open_directory(root: BorrowedFd<'_>, name: &str) -> io::Result<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(root, name, flags, Mode::empty(), resolve)?)
}

/// Removes a directory with all that is in it; links are not followed. What is gone already is no error.
fn remove_tree(above: BorrowedFd<'_>, name: &str, depth: usize) -> io::Result<()> {
    let directory = match open_directory(above, name) {
        Ok(directory) if depth < MAX_DEPTH => directory,
        Ok(_) => return Err(io::Error::other("directories are nested too deeply")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let name = name.to_str().map_err(|_| io::Error::other("a name is no text"))?;
        if kind(directory.as_fd(), name)? == FileType::Directory {
            remove_tree(directory.as_fd(), name, depth + 1)?;
        } else {
            rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
        }
    }
    Ok(rustix::fs::unlinkat(above, name, AtFlags::REMOVEDIR)?)
}
