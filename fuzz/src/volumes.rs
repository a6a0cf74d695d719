//! A root of its own for a thread that serves volumes, which holds a few files.

use std::fs::{self, File};
use std::os::fd::OwnedFd;

/// This process's /proc/self/fd, which is out of reach afterwards.
pub fn own_descriptors() -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/proc/self/fd", flags, rustix::fs::Mode::empty()).unwrap()
}

/// Makes a file system in memory the root of this thread; it goes with the process.
pub fn enter_root() {
    use hull_sys::mount::{
        self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, Propagation,
    };
    hull_sys::namespace::unshare_filesystem_attributes().unwrap();
    hull_sys::namespace::unshare(hull_sys::namespace::Namespaces::MOUNT).unwrap();
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    mount::set_attributes_at(rustix::fs::CWD, c"/", true, &private).unwrap();
    let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    mount::fsconfig_set_string(&context, "size", "16m").unwrap();
    mount::fsconfig_create(&context).unwrap();
    let flags = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let root = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags).unwrap();
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    mount::move_mount(&root, "", rustix::fs::CWD, "/mnt", empty).unwrap();
    rustix::process::chroot("/mnt").unwrap();
    rustix::process::chdir("/").unwrap();
}

/// A directory as it should be before each input.
pub fn prepare() {
    let _ = fs::remove_dir_all("/volumes");
    fs::create_dir_all("/volumes/d/e").unwrap();
    fs::write("/volumes/f", "content").unwrap();
    std::os::unix::fs::symlink("../f", "/volumes/d/l").unwrap();
    drop(File::create("/volumes/d/empty"));
}
