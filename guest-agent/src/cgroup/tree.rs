//! What containers may have made below their leaf: cgroups of their own (systemd in a container does).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Dir, FileType, unlinkat};
use rustix::io::Errno;

use super::files;

/// Deepest nesting that is followed; a container that nests deeper has only itself to blame for what is left to
/// `cgroup.kill`, which has no such bound.
const MAX_DEPTH: usize = 128;

/// Names of the directories directly below an open directory.
pub(super) fn children(directory: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if entry.file_type() != FileType::Directory {
            continue;
        }
        match entry.file_name().to_str() {
            Ok("." | "..") | Err(_) => {}
            Ok(name) => names.push(name.to_owned()),
        }
    }
    Ok(names)
}

/// Adds to `found` every process in the cgroup at `path` below `base` and in the cgroups below that. What vanishes
/// meanwhile is skipped. Processes of another PID namespace (shown as 0) are left out.
pub(super) fn processes(base: BorrowedFd<'_>, path: &str, found: &mut Vec<i32>) -> io::Result<()> {
    collect(base, path, found, 0)
}

fn collect(base: BorrowedFd<'_>, path: &str, found: &mut Vec<i32>, depth: usize) -> io::Result<()> {
    let directory = match files::open_directory(base, path) {
        Ok(directory) => directory,
        Err(error) if files::is_missing(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    match files::read(directory.as_fd(), "cgroup.procs") {
        Ok(text) => {
            found.extend(text.lines().filter_map(|line| line.parse().ok()).filter(|pid: &i32| *pid > 0))
        }
        Err(error) if files::is_missing(&error) => return Ok(()),
        // A threaded cgroup of v2 has no list of processes; its domain above does.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    if depth < MAX_DEPTH {
        for child in children(directory.as_fd())? {
            collect(directory.as_fd(), &child, found, depth + 1)?;
        }
    }
    Ok(())
}

/// Removes the cgroup at `path` below `base` with all that is below it. `Ok(false)` means that something in it is
/// still in use. A missing one counts as removed.
pub(super) fn remove(base: BorrowedFd<'_>, path: &str) -> io::Result<bool> {
    remove_to(base, path, 0)
}

fn remove_to(base: BorrowedFd<'_>, path: &str, depth: usize) -> io::Result<bool> {
    match unlinkat(base, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::BUSY | Errno::NOTEMPTY) if depth < MAX_DEPTH => {}
        Err(Errno::BUSY | Errno::NOTEMPTY) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    }
    let directory = match files::open_directory(base, path) {
        Ok(directory) => directory,
        Err(error) if files::is_missing(&error) => return Ok(true),
        Err(error) => return Err(error),
    };
    let below = children(directory.as_fd())?;
    if below.is_empty() {
        return Ok(false);
    }
    for child in below {
        if !remove_to(directory.as_fd(), &child, depth + 1)? {
            return Ok(false);
        }
    }
    match unlinkat(base, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::BUSY | Errno::NOTEMPTY) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
