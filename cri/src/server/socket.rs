//! The daemon's socket: made safely, taken over only from the dead, removed at the end.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Owner and group may connect.
const MODE: u32 = 0o660;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{} is in use: another daemon answers there", .0.display())]
    InUse(PathBuf),
    /// There is something that is not a socket and not ours to remove.
    #[error("{} exists and is not a socket; remove it or choose another --listen", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket's file. Dropped after its listener, it removes the file unless another daemon answers there by then.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
}

/// Listens on `path` with mode 0660. A socket left by a daemon that ended is replaced; one that answers is not.
pub fn bind(path: &Path) -> Result<(Socket, UnixListener), SocketError> {
    let failed = |source: io::Error| SocketError::Listen { path: path.into(), source };
    fs::create_dir_all(directory_of(path)).map_err(failed)?;
    let _guard = guard(path).map_err(failed)?;
    remove_stale(path)?;
    let listener = listen(path).map_err(failed)?;
    Ok((Socket { path: path.into() }, listener))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// While it is held, nobody else looks at a socket of this directory and then replaces it.
fn guard(path: &Path) -> io::Result<File> {
    let directory = File::open(directory_of(path))?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |source: io::Error| SocketError::Listen { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full backlog (EAGAIN) or a missing permission is still somebody.
        Ok(_) | Err(_) => Err(SocketError::InUse(path.into())),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // bind gives the file the socket's own mode less the umask, so it is never open to others, not even for a moment.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(MODE))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

impl Drop for Socket {
    fn drop(&mut self) {
        let guard = guard(&self.path);
        match remove_stale(&self.path) {
            Ok(()) | Err(SocketError::InUse(_)) => {}
            Err(error) => tracing::warn!(%error, "cannot remove the socket"),
        }
        drop(guard);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_socket_is_for_owner_and_group_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/hull.sock");
        let (socket, listener) = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o660);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_answers_is_left_alone_and_a_dead_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        let first = UnixListener::bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        assert!(path.exists());
        drop(first);
        let (_socket, _listener) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_place_of_the_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_somebody_else_put_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        let (socket, listener) = bind(&path).unwrap();
        drop(listener);
        fs::remove_file(&path).unwrap();
        let (_other, _listener) = bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
