use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, fspick, mount_change, move_mount, open_tree, unmount,
};
pub use rustix::process::pivot_root;

/// How mounts and unmounts pass between a mount and its copies (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Neither way.
    Private,
    /// From the peers to here only.
    Slave,
    /// Both ways.
    Shared,
    /// Neither way, and it cannot be bound.
    Unbindable,
}

impl Propagation {
    const fn flag(self) -> u64 {
        match self {
            Self::Private => libc::MS_PRIVATE,
            Self::Slave => libc::MS_SLAVE,
            Self::Shared => libc::MS_SHARED,
            Self::Unbindable => libc::MS_UNBINDABLE,
        }
    }
}

/// What to change about a mount.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    /// Attributes to set.
    pub set: MountAttrFlags,
    /// Attributes to clear.
    pub clear: MountAttrFlags,
    /// New propagation; absent: unchanged.
    pub propagation: Option<Propagation>,
    /// User namespace whose ID maps the mount gets (sets MOUNT_ATTR_IDMAP; a detached mount only).
    pub user_namespace: Option<BorrowedFd<'a>>,
}

impl Default for Attributes<'_> {
    fn default() -> Self {
        Self {
            set: MountAttrFlags::empty(),
            clear: MountAttrFlags::empty(),
            propagation: None,
            user_namespace: None,
        }
    }
}

/// struct mount_attr of linux/mount.h.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes attributes of the mount whose root is `mount` (a descriptor from open_tree or fsmount, or any O_PATH one of
/// a mount's root); with `recursive` of all mounts below it as well, all or none (mount_setattr(2), Linux ≥ 5.12).
pub fn set_attributes(mount: BorrowedFd<'_>, recursive: bool, attributes: &Attributes<'_>) -> io::Result<()> {
    set_attributes_at(mount, c"", recursive, attributes)
}

/// Like [`set_attributes`], for the mount at `path` below `directory`.
pub fn set_attributes_at(
    directory: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
    attributes: &Attributes<'_>,
) -> io::Result<()> {
    let mut attr = MountAttr {
        attr_set: u64::from(attributes.set.bits()),
        attr_clr: u64::from(attributes.clear.bits()),
        propagation: attributes.propagation.map_or(0, Propagation::flag),
        userns_fd: 0,
    };
    if let Some(namespace) = attributes.user_namespace {
        attr.attr_set |= u64::from(MountAttrFlags::MOUNT_ATTR_IDMAP.bits());
        attr.userns_fd = namespace.as_raw_fd() as u64;
    }
    let mut flags = 0;
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: `path` is zero-terminated, `attr` has the layout and size given; both live across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_detached_tmpfs_becomes_read_only() {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_create(&context).unwrap();
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        let create = || {
            use rustix::fs::{Mode, OFlags};
            rustix::fs::openat(&mount, "file", OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR)
        };
        create().unwrap();
        let attributes = Attributes {
            set: MountAttrFlags::MOUNT_ATTR_RDONLY,
            propagation: Some(Propagation::Private),
            ..Attributes::default()
        };
        set_attributes(mount.as_fd(), true, &attributes).unwrap();
        assert_eq!(create().unwrap_err(), rustix::io::Errno::ROFS);
    }
}
