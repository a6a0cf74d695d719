//! The daemon's directories: its own, closed to others, and used by one daemon at a time.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use thiserror::Error;

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// It could not be made or closed to others.
    #[error("cannot prepare the directory {}: {source}", path.display())]
    Prepare {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It belongs to somebody else.
    #[error("the directory {} belongs to user {owner}, not to the user hulld runs as ({own})", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        own: u32,
    },
    /// Its lock is held.
    #[error("another hulld{holder} uses {}; give each its own --state and --root", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// " (pid N)", or empty if that cannot be told.
        holder: String,
    },
}

/// Makes `path` where it is missing and closes it to others (0700): state directories that others can enter have been
/// a way to images and sockets of pods (containerd CVE-2024-25621).
pub fn prepare(path: &Path) -> Result<(), DirectoryError> {
    let failed = |source| DirectoryError::Prepare { path: path.into(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(DirectoryError::Owner { path: path.into(), owner: metadata.uid(), own });
    }
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// Held for as long as the daemon uses a directory.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

/// Takes the directory for this process; the kernel gives it back when the process ends, however it ends.
pub fn lock(path: &Path) -> Result<DirectoryLock, DirectoryError> {
    let failed = |source| DirectoryError::Prepare { path: path.into(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(path.join("hulld.lock")).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(DirectoryError::InUse { path: path.into(), holder: holder(&mut file) });
        }
        Err(error) => return Err(failed(error.into())),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(DirectoryLock { _file: file })
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!(" (pid {pid})"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn directories_are_closed_to_others_whether_new_or_found() {
        let base = tempfile::tempdir().unwrap();
        let (new, found) = (base.path().join("a/b"), base.path().join("found"));
        fs::create_dir(&found).unwrap();
        fs::set_permissions(&found, Permissions::from_mode(0o755)).unwrap();
        for path in [&new, &found] {
            prepare(path).unwrap();
            assert_eq!(mode(path), 0o700, "{}", path.display());
        }
        fs::write(base.path().join("file"), "").unwrap();
        assert!(prepare(&base.path().join("file")).is_err());
    }

    #[test]
    fn a_second_daemon_on_the_same_directory_is_told_who_has_it() {
        let base = tempfile::tempdir().unwrap();
        let held = lock(base.path()).unwrap();
        let error = lock(base.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("another hulld (pid {})", std::process::id())), "{error}");
        drop(held);
        lock(base.path()).unwrap();
    }
}
