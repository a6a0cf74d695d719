//! The empty root of a confined process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::mount::{
    self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MoveMountFlags, OpenTreeFlags,
    Propagation, UnmountFlags,
};
use rustix::fs::{CWD, Mode};

use super::error::{Doing, JailError};

/// On every mount that a confined process sees.
const NO_ALL: Attr = Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NODEV).union(Attr::MOUNT_ATTR_NOEXEC);
/// Bytes and inodes of a root: it holds at most the empty files and directories that volumes are mounted on.
const SIZE: &str = "256k";
const INODES: &str = "2048";

/// A detached tmpfs. Its owner is the caller's root; `mode` is that of its directory.
pub(super) fn detached(mode: &str) -> Result<OwnedFd, JailError> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in [("size", SIZE), ("nr_inodes", INODES), ("mode", mode)] {
            mount::fsconfig_set_string(&context, key, value)?;
        }
        mount::fsconfig_create(&context)?;
        mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, NO_ALL)
    };
    make().doing("make an empty file system for the root")
}

/// The root of the process that serves volumes, with the directory /volumes. Made by the host's root, to whom it
/// belongs: hulld makes mount points in it, and no capability in the pod's user namespace reaches it.
pub(super) fn detached_with_volumes() -> Result<OwnedFd, JailError> {
    let root = detached("755")?;
    let umask = rustix::process::umask(Mode::empty());
    let made = rustix::fs::mkdirat(&root, "volumes", Mode::from_raw_mode(0o755));
    rustix::process::umask(umask);
    made.doing("make /volumes")?;
    Ok(root)
}

/// Makes `root` the whole tree of the caller's mount namespace, which must be its own; the old tree is detached and gone.
pub(super) fn enter(root: BorrowedFd<'_>) -> Result<(), JailError> {
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    mount::set_attributes_at(CWD, c"/", true, &private).doing("make the mounts private")?;
    // Any directory does as a place, and every root that a process starts in has this one.
    mount::move_mount(root, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing("mount the empty root")?;
    rustix::process::fchdir(root).doing("enter the empty root")?;
    mount::pivot_root(".", ".").doing("change to the empty root")?;
    // The old root lies over the new one now, and both at ".".
    mount::unmount(".", UnmountFlags::DETACH).doing("leave the host's mounts")?;
    rustix::process::chdir("/").doing("enter the empty root")
}

/// Makes the root read-only, for good: nobody in the user namespace will have the capability to change it back.
pub(super) fn freeze() -> Result<(), JailError> {
    let readonly = Attributes { set: Attr::MOUNT_ATTR_RDONLY | NO_ALL, ..Attributes::default() };
    mount::set_attributes_at(CWD, c"/", false, &readonly).doing("make the root read-only")
}

/// The caller's own /proc/self/fd as a mount of its own, attached nowhere: `..` leads out of it to nothing.
pub(super) fn own_descriptors() -> Result<OwnedFd, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = mount::open_tree(CWD, "/proc/self/fd", flags).doing("take /proc/self/fd")?;
    let attributes = Attributes { set: NO_ALL, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), false, &attributes).doing("restrict /proc/self/fd")?;
    Ok(tree)
}
