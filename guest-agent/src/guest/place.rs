//! Where things are in the root of a guest's agent, beside what every agent has ([`crate::sandbox::layout`]).

use hull_sys::mount::{
    self, FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MoveMountFlags, UnmountFlags,
};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;

use super::{Doing, GuestError};

/// Everything of a guest's own; a tmpfs that no container sees.
pub(crate) const GUEST: &str = "/run/hull/guest";
/// Exit records.
pub(crate) const STATE: &str = "/run/hull/guest/state";
/// Mounted ranges of the disks, by name.
pub(super) const RANGES: &str = "/run/hull/guest/ranges";
/// Volumes, by id.
pub(super) const VOLUMES: &str = "/run/hull/guest/volumes";
/// The virtio-fs device with the tag `volumes`.
pub(super) const SHARED: &str = "/run/hull/guest/shared";
/// Small files of containers, by container.
pub(super) const FILES: &str = "/run/hull/guest/files";

/// Makes all of it in the agent's root, and /dev again, which entering the pod has left behind.
pub(crate) fn make() -> Result<(), GuestError> {
    directory("/dev")?;
    attach(filesystem("devtmpfs", &[], DEVICES)?, "/dev")?;
    directory(GUEST)?;
    attach(filesystem("tmpfs", &[("mode", "700"), ("size", "4m")], NO_ALL)?, GUEST)?;
    for path in [STATE, RANGES, VOLUMES, SHARED, FILES] {
        directory(path)?;
    }
    Ok(())
}

pub(super) const NO_ALL: Attr =
    Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NODEV).union(Attr::MOUNT_ATTR_NOEXEC);
pub(super) const DEVICES: Attr = Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NOEXEC);

/// Makes a directory for root only, if it is missing.
pub(super) fn directory(path: &str) -> Result<(), GuestError> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(GuestError::system(format!("make {path}"), error)),
    }
}

/// A new, detached filesystem.
pub(super) fn filesystem(
    kind: &str,
    options: &[(&str, &str)],
    attributes: Attr,
) -> Result<OwnedFd, GuestError> {
    let make = || {
        let context = mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        if !options.iter().any(|(key, _)| *key == "source") {
            mount::fsconfig_set_string(&context, "source", kind)?;
        }
        for (key, value) in options {
            match *value {
                "" => mount::fsconfig_set_flag(&context, *key)?,
                value => mount::fsconfig_set_string(&context, *key, value)?,
            }
        }
        mount::fsconfig_create(&context)?;
        mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().doing(|| format!("mount {kind} ({})", described(options)))
}

fn described(options: &[(&str, &str)]) -> String {
    let options: Vec<_> = options.iter().map(|(key, value)| format!("{key}={value}")).collect();
    options.join(",")
}

/// Attaches a detached mount.
pub(super) fn attach(tree: OwnedFd, path: &str) -> Result<(), GuestError> {
    mount::move_mount(tree.as_fd(), "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(|| format!("attach a mount at {path}"))
}

/// Unmounts and removes the directory. EBUSY passes through only if `lazily` is false.
pub(super) fn detach(path: &str, lazily: bool) -> std::io::Result<()> {
    let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    mount::unmount(path, flags | UnmountFlags::NOFOLLOW)?;
    Ok(rustix::fs::rmdir(path)?)
}
