//! Network namespaces pinned as files, where `ip netns` looks for them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_sys::namespace::{Namespaces, enter, unshare};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use tokio::sync::oneshot;

use crate::NetworkError;
use crate::ledger::file_error;

/// That of the calling thread.
pub(crate) const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `before` on a fresh thread, then moves it into a network namespace (`given`, or a new one), pins that at `pin`,
/// and runs `inside` there with the namespace's descriptor and what `before` returned. The thread ends afterwards.
///
/// If anything fails, the pin is removed again.
pub(crate) async fn make<B, T: Send + 'static>(
    pin: PathBuf,
    given: Option<OwnedFd>,
    before: impl FnOnce() -> Result<B, NetworkError> + Send + 'static,
    inside: impl FnOnce(B, BorrowedFd<'_>) -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let (sender, receiver) = oneshot::channel();
    let body = move || {
        let outcome = before().and_then(|b| {
            let namespace = enter_and_pin(&pin, given)?;
            inside(b, namespace.as_fd()).inspect_err(|_| {
                if let Err(error) = remove(&pin) {
                    tracing::warn!(%error, "a namespace that could not be set up stays");
                }
            })
        });
        // The receiver is gone only if the runtime is.
        let _ = sender.send(outcome);
    };
    let failed =
        |source| NetworkError::Kernel { action: "starting a thread for a network namespace".into(), source };
    std::thread::Builder::new().name("pod network".into()).spawn(body).map_err(failed)?;
    receiver.await.unwrap_or_else(|_| Err(failed(io::Error::other("it panicked"))))
}

/// Moves the calling thread into its network namespace and pins that.
fn enter_and_pin(pin: &Path, given: Option<OwnedFd>) -> Result<File, NetworkError> {
    let mount = || -> io::Result<File> {
        // What is left of a pin without a namespace (the machine stopped without clearing /run) is in the way.
        remove_file_and_mounts(pin)?;
        match given {
            Some(namespace) => enter(namespace.as_fd(), Namespaces::NET)?,
            None => unshare(Namespaces::NET)?,
        }
        OpenOptions::new().write(true).create_new(true).mode(0o444).open(pin)?;
        rustix::mount::mount_bind(OWN, pin).inspect_err(|_| {
            let _ = fs::remove_file(pin);
        })?;
        File::open(OWN)
    };
    mount().map_err(|source| file_error("pinning a network namespace at", pin, source))
}

/// Makes the directory for pins. Where the mount below it is not shared, it becomes a shared mount of itself, as
/// `ip netns add` would make it later on top of our pins, which would then be hidden and could not be removed.
pub(crate) fn prepare_directory(directory: &Path) -> Result<(), NetworkError> {
    let prepare = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        if is_on_shared_mount(directory)? {
            return Ok(());
        }
        rustix::mount::mount_bind_recursive(directory, directory)?;
        Ok(rustix::mount::mount_change(directory, MountPropagationFlags::SHARED)?)
    };
    prepare().map_err(|source| file_error("preparing", directory, source))
}

/// Undoes what `prepare_directory` did, if no pin of anybody is left there.
pub(crate) fn release_directory(directory: &Path) {
    let is_empty = fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
    if is_empty && mount_options(directory).is_ok_and(|(at, _)| at == directory) {
        // Without MNT_DETACH: in use is in use.
        if let Err(error) = rustix::mount::unmount(directory, UnmountFlags::empty()) {
            tracing::debug!(%error, directory = %directory.display(), "the directory of namespaces stays mounted");
        }
    }
}

fn is_on_shared_mount(path: &Path) -> io::Result<bool> {
    Ok(mount_options(path)?.1.contains("shared:"))
}

/// Mount point that `path` lies on, and its optional fields, from /proc/thread-self/mountinfo (proc(5)).
fn mount_options(path: &Path) -> io::Result<(PathBuf, String)> {
    // By number: a path may also match a mount that another one hides.
    let facts = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?;
    let id = facts.stx_mnt_id.to_string();
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let line = table.lines().find(|line| line.split(' ').next() == Some(&id)).ok_or(ErrorKind::NotFound)?;
    let mut fields = line.split(' ');
    // Octal escapes only matter for names that none of ours have.
    let at = fields.nth(4).unwrap_or_default();
    let optional = fields.skip(1).take_while(|field| *field != "-").collect::<Vec<_>>().join(" ");
    Ok((PathBuf::from(at), optional))
}

/// Removes a pin; one that is gone is fine. The namespace itself ends with its last process.
pub(crate) fn remove(pin: &Path) -> Result<(), NetworkError> {
    remove_file_and_mounts(pin).map_err(|source| file_error("removing network namespace", pin, source))
}

fn remove_file_and_mounts(pin: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(pin, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(Errno::INVAL) => break,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    // Other mount namespaces that still have the mount lose it with the file.
    match fs::remove_file(pin) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The pinned namespace, if it is one.
pub(crate) fn open(pin: &Path) -> Result<File, NetworkError> {
    // linux/magic.h
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    let open = || -> io::Result<File> {
        let file = File::open(pin)?;
        let kind = rustix::fs::fstatfs(&file)?.f_type as u64;
        if kind == NSFS_MAGIC { Ok(file) } else { Err(io::Error::other("it is not a namespace")) }
    };
    open().map_err(|source| file_error("opening network namespace", pin, source))
}
