//! The namespace of layer mounts: made, pinned to a file, found again, removed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_sys::namespace::{Namespaces, enter, unshare, unshare_filesystem_attributes};
use rustix::fs::{AtFlags, CWD, StatxFlags, statfs, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_bind, mount_change, mount_move, move_mount,
    unmount,
};

use super::error::MountError;

/// Magic number of nsfs (linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// The file at STATE/ns/layers on which the namespace is mounted.
///
/// STATE/ns is bound to itself with private propagation: a mount namespace cannot be pinned on a mount that propagates
/// into it (unshare(1), "--mount=file").
#[derive(Clone)]
pub(super) struct Pin {
    directory: PathBuf,
    path: PathBuf,
}

impl Pin {
    pub(super) fn new(state: &Path) -> Self {
        let directory = state.join("ns");
        Self { path: directory.join("layers"), directory }
    }

    /// The pinned namespace, if there is one.
    pub(super) fn open(&self) -> Result<Option<OwnedFd>, MountError> {
        if !self.is_namespace()? {
            return Ok(None);
        }
        File::open(&self.path).map(|file| Some(file.into())).map_err(self.io_failed("open"))
    }

    /// Makes the place for the pin. Must run in the host's mount namespace, as [`Pin::set`].
    pub(super) fn prepare(&self) -> Result<(), MountError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(self.io_failed("create the directory"))?;
        if !self.is_mount_point()? {
            mount_bind(&self.directory, &self.directory).map_err(self.failed("bind the directory"))?;
        }
        mount_change(&self.directory, MountPropagationFlags::PRIVATE)
            .map_err(self.failed("make it private"))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&self.path);
        file.map(drop).map_err(self.io_failed("create the file"))
    }

    /// Pins the mount namespace of thread `tid` of this process.
    pub(super) fn set(&self, tid: i32) -> Result<(), MountError> {
        let namespace = format!("/proc/self/task/{tid}/ns/mnt");
        mount_bind(namespace.as_str(), &self.path).map_err(self.failed("pin"))
    }

    /// Takes the pin and its place away. The namespace goes when nothing else uses it. Idempotent.
    pub(super) fn remove(&self) -> Result<(), MountError> {
        while self.is_namespace()? {
            unmount(&self.path, UnmountFlags::DETACH).map_err(self.failed("unpin"))?;
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.io_failed("delete")(error));
            }
            _ => {}
        }
        if self.directory.exists() {
            while self.is_mount_point()? {
                unmount(&self.directory, UnmountFlags::DETACH)
                    .map_err(self.failed("unmount the directory"))?;
            }
            // Something else may live there.
            let _ = fs::remove_dir(&self.directory);
        }
        Ok(())
    }

    /// Moves the calling thread into a namespace of its own that holds nothing but an empty tmpfs.
    pub(super) fn unshare_empty(&self) -> Result<(), MountError> {
        unshare_filesystem_attributes().map_err(self.io_failed("unshare file system attributes"))?;
        unshare(Namespaces::MOUNT).map_err(self.io_failed("unshare"))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(self.failed("make all mounts private"))?;
        let root = empty_root().map_err(self.failed("make the root"))?;
        let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(root.as_fd(), "", CWD, &self.directory, onto).map_err(self.failed("mount the root"))?;
        rustix::process::chdir(&self.directory).map_err(self.failed("enter the root"))?;
        // The old root ends up on top of the new one and is taken off (pivot_root(2), "pivot_root(".", ".")").
        match rustix::process::pivot_root(".", ".") {
            Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(self.failed("leave the host's mounts"))?,
            // A machine that runs from its initramfs: that root cannot be left, only covered.
            Err(Errno::INVAL) => self.cover_root()?,
            Err(error) => return Err(self.failed("pivot_root")(error)),
        }
        rustix::process::chdir("/").map_err(self.failed("enter the root"))
    }

    /// Takes all mounts but the first root off and moves the current directory's mount over it.
    fn cover_root(&self) -> Result<(), MountError> {
        let table =
            fs::read_to_string("/proc/thread-self/mountinfo").map_err(self.io_failed("list the mounts"))?;
        // proc(5): the fifth field is the mount point. The list has parents before children. What is not unmounted here
        // (a name with escapes) only stays visible in a place that nobody looks at.
        let points: Vec<&str> = table.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        for point in
            points.into_iter().rev().filter(|point| *point != "/" && Path::new(point) != self.directory)
        {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
        mount_move(".", "/").map_err(self.failed("move the root"))?;
        rustix::process::chroot(".").map_err(self.failed("chroot"))
    }

    /// Moves the calling thread into the pinned namespace.
    pub(super) fn enter(&self, namespace: &OwnedFd) -> Result<(), MountError> {
        unshare_filesystem_attributes().map_err(self.io_failed("unshare file system attributes"))?;
        enter(namespace.as_fd(), Namespaces::MOUNT).map_err(self.io_failed("setns"))
    }

    /// For `map_err`: the error of one step.
    pub(super) fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> MountError {
        let path = self.path.clone();
        move |source| MountError::Namespace { path, step, source }
    }

    fn io_failed(&self, step: &'static str) -> impl FnOnce(io::Error) -> MountError {
        let failed = self.failed(step);
        move |error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    fn is_namespace(&self) -> Result<bool, MountError> {
        match statfs(&self.path) {
            Ok(found) => Ok(found.f_type as u64 == NSFS_MAGIC),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(error) => Err(self.failed("look at")(error)),
        }
    }

    fn is_mount_point(&self) -> Result<bool, MountError> {
        let mount = |path: &Path| {
            statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID).map(|found| found.stx_mnt_id)
        };
        let parent = self.directory.parent().unwrap_or(Path::new("/"));
        let own = mount(&self.directory).map_err(self.failed("look at the directory of"))?;
        Ok(own != mount(parent).map_err(self.failed("look at the parent of"))?)
    }
}

/// A detached tmpfs that only root may enter.
fn empty_root() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "mode", "0700")?;
    fsconfig_set_string(context.as_fd(), "size", "1m")?;
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC)
}
