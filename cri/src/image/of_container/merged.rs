//! The layers of an image, and what lies on them, as one tree: an overlay that only one thread sees.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use hull_sys::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use hull_sys::namespace::{Namespaces, unshare, unshare_filesystem_attributes};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

/// Runs `work` with the root of what `layers` (detached trees, lowest first) give together, and `upper` on top of them.
/// `place` is an existing directory, which that thread will not see. Nothing of it is left afterwards.
pub(super) fn with_merged<T: Send>(
    layers: &[OwnedFd],
    upper: Option<&Path>,
    place: &Path,
    work: impl FnOnce(&File) -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("merged-layers".into());
        let thread = thread.spawn_scoped(scope, || mounted(layers, upper, place).map(|root| work(&root)))?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that reads the files broke off")))
    })
}

/// The thread's mounts are its own from here on, and end with it.
fn mounted(layers: &[OwnedFd], upper: Option<&Path>, place: &Path) -> io::Result<File> {
    unshare_filesystem_attributes()?;
    unshare(Namespaces::MOUNT)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let upper = upper.map(|upper| open_tree(CWD, upper, clone)).transpose()?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("tmpfs", place, "tmpfs", flags, None::<&std::ffi::CStr>)?;
    rustix::process::chdir(place)?;
    let mut names = Vec::new();
    // Two layers are the least that overlayfs takes without an upper one.
    std::fs::create_dir("empty")?;
    std::fs::create_dir("root")?;
    for (number, tree) in layers.iter().chain(&upper).enumerate() {
        let name = number.to_string();
        std::fs::create_dir(&name)?;
        move_mount(tree, "", CWD, name.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        names.push(name);
    }
    names.reverse();
    names.push("empty".to_owned());
    let options = CString::new(format!("lowerdir={},index=off,xino=off", names.join(":")))?;
    mount("overlay", "root", "overlay", flags | MountFlags::RDONLY, options.as_c_str())?;
    File::open("root")
}

/// Whether the tree has something at this path. No link on the way is followed: what is behind one is elsewhere.
pub(super) fn exists(root: &File, path: &[u8]) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root.as_fd(), path, flags, Mode::empty(), resolve).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_link_of_the_image_is_not_in_the_image() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", directory.path().join("elsewhere")).unwrap();
        std::fs::create_dir(directory.path().join("here")).unwrap();
        let root = File::open(directory.path()).unwrap();
        assert!(exists(&root, b"here") && exists(&root, b"elsewhere"));
        assert!(!exists(&root, b"elsewhere/passwd") && !exists(&root, b"here/../../etc"));
    }
}
