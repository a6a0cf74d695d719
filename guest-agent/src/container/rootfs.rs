//! The root filesystem: layers under overlayfs, with the container's writable directory on top.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::mount::{
    self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::sandbox::{UserNamespace, layout};

use super::Slots;
use super::failure::{During, Failure, Stage};
use super::inside::{Links, Root, set_owner};
use super::plan::RootfsPlan;

/// Assembles the root filesystem and attaches it at [`layout::ROOTFS`] in the calling process's own mount namespace.
///
/// `scaffold` is the lowest layer, a directory of the agent's; `label` is SELinux's, empty for none. Ids on layers and in
/// the writable directory are those of `user`, if there is one: what is made in the root filesystem must be made by a
/// user that it maps.
pub(super) fn assemble(
    plan: &RootfsPlan,
    scaffold: Option<String>,
    label: &str,
    slots: &Slots<'_>,
    user: Option<&UserNamespace>,
) -> Result<Root, Failure> {
    let mut lower = attach_layers(&plan.layers, slots, user)?;
    lower.extend(scaffold);
    let writable = tree(slots, plan.writable, "the writable directory")?;
    let attached = map_ids(writable, user, false).and_then(|()| attach(writable, layout::WRITABLE));
    attached.during(Stage::Rootfs, || "cannot attach the writable directory of the root filesystem")?;
    prepare_writable(writable, &lower[0])
        .during(Stage::Rootfs, || "cannot prepare the writable directory of the root filesystem")?;
    mount_overlay(&lower, label).map(Root::new).during(Stage::Rootfs, || {
        format!("cannot mount the root filesystem of {} layers with overlayfs", lower.len())
    })
}

/// Attaches layers, the uppermost first, in the directories of layers, and returns these. Those of an earlier call are
/// covered, which disturbs no overlay that was made of them.
fn attach_layers(
    layers: &[u32],
    slots: &Slots<'_>,
    user: Option<&UserNamespace>,
) -> Result<Vec<String>, Failure> {
    let mut lower = Vec::with_capacity(layers.len());
    for (number, slot) in layers.iter().enumerate() {
        let path = format!("{}/{number}", layout::LAYERS);
        // The directories stay on the agent's tmpfs for the next container; the mounts on them are this process's.
        match rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(Failure::system(Stage::Rootfs, format!("cannot make {path}"), error)),
        }
        let layer = tree(slots, *slot, "a layer")?;
        map_ids(layer, user, false).and_then(|()| attach(layer, &path)).during(Stage::Rootfs, || {
            format!("cannot attach layer {number} (counted from the uppermost) of an image")
        })?;
        lower.push(path);
    }
    Ok(lower)
}

/// Has the ids on a detached mount's file system mean those of `user`; with `below`, on every mount below it as well, if
/// all of them can.
pub(super) fn map_ids(tree: BorrowedFd<'_>, user: Option<&UserNamespace>, below: bool) -> io::Result<()> {
    let Some(user) = user else { return Ok(()) };
    let attributes = Attributes { user_namespace: Some(user.as_fd()), ..Attributes::default() };
    match mount::set_attributes(tree, below, &attributes) {
        Err(error) if below && error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            mount::set_attributes(tree, false, &attributes)
        }
        result => result,
    }
}

/// An image, or what it has at `sub_path`, as a detached read-only mount.
pub(super) fn image_volume(
    layers: &[u32],
    sub_path: &str,
    label: &str,
    slots: &Slots<'_>,
    user: Option<&UserNamespace>,
) -> Result<OwnedFd, Failure> {
    let mut lower = attach_layers(layers, slots, user)?;
    // An overlay without a writable directory has two layers at least; and one alone would show its whiteouts.
    lower.push(layout::EMPTY.to_owned());
    let overlay = match overlay(&lower, false, label) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            overlay_with_options(&lower, false, label, layout::VOLUME).map_err(|_| error)
        }
        result => result.and_then(|overlay| attach(overlay.as_fd(), layout::VOLUME).map(|()| overlay)),
    };
    let doing = || format!("cannot mount an image of {} layers with overlayfs", layers.len());
    let root = Root::new(overlay.during(Stage::Mount, doing)?);
    let doing = || format!("cannot take {sub_path:?} of an image");
    let sub_path = if sub_path.is_empty() { "/" } else { sub_path };
    let found = root.resolve(sub_path, Links::Follow).during(Stage::Mount, doing)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    mount::open_tree(&found, "", flags | OpenTreeFlags::AT_EMPTY_PATH).during(Stage::Mount, doing)
}

/// After the step into a user namespace every mount that came along is locked to its place, and no root can be changed
/// to one: a copy of the tree is not.
pub(super) fn unlocked() -> Result<Root, Failure> {
    let copy = || -> io::Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = mount::open_tree(CWD, layout::ROOTFS, flags | OpenTreeFlags::AT_RECURSIVE)?;
        attach(tree.as_fd(), layout::ROOTFS)?;
        Ok(tree)
    };
    copy().map(Root::new).during(Stage::Rootfs, || "cannot take the root filesystem into the user namespace")
}

fn tree<'a>(slots: &Slots<'a>, slot: u32, what: &str) -> Result<BorrowedFd<'a>, Failure> {
    slots.get(slot).ok_or_else(|| {
        Failure::new(Stage::Rootfs, format!("the request brought no slot {slot}, which is to be {what}"))
    })
}

fn attach(tree: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    Ok(mount::move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Makes `upper` and `work` where they are missing. The root directory of an overlay has the attributes of `upper`, so
/// that gets those of the uppermost layer.
fn prepare_writable(writable: BorrowedFd<'_>, uppermost: &str) -> io::Result<()> {
    match rustix::fs::mkdirat(writable, "upper", Mode::from_raw_mode(0o755)) {
        Ok(()) => {
            let image = rustix::fs::stat(uppermost)?;
            set_owner(writable, "upper", image.st_uid, image.st_gid)?;
            let mode = Mode::from_raw_mode(image.st_mode & 0o7777);
            rustix::fs::chmodat(writable, "upper", mode, AtFlags::empty())?;
        }
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    match rustix::fs::mkdirat(writable, "work", Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => allow_again(writable),
        Err(error) => Err(error.into()),
    }
}

/// Takes away the mark with which a volatile overlay refuses to be mounted a second time (overlayfs.rst, "Volatile
/// mount"): a writable layer has no promise to outlive a crash of the machine, only one to be found after a restart of
/// the container.
fn allow_again(writable: BorrowedFd<'_>) -> io::Result<()> {
    let mark = [
        ("work/work/incompat/volatile/dirty", AtFlags::empty()),
        ("work/work/incompat/volatile", AtFlags::REMOVEDIR),
    ];
    for (path, flags) in mark {
        match rustix::fs::unlinkat(writable, path, flags) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Mounts the overlay at [`layout::ROOTFS`] and returns its root.
fn mount_overlay(lower: &[String], label: &str) -> io::Result<OwnedFd> {
    match overlay(lower, true, label) {
        Ok(overlay) => attach(overlay.as_fd(), layout::ROOTFS).map(|()| overlay),
        // Linux before 6.8 does not know layers given one by one, and answers only this.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            overlay_with_options(lower, true, label, layout::ROOTFS).map_err(|_| error)
        }
        Err(error) => Err(error),
    }
}

/// The old way: all layers in one option of mount(2), by their short names in the directory of layers, so that the most
/// that overlayfs stacks still fit into the page that options can have.
fn overlay_with_options(lower: &[String], writable: bool, label: &str, target: &str) -> io::Result<OwnedFd> {
    let below = format!("{}/", layout::LAYERS);
    let names: Vec<&str> = lower.iter().map(|path| path.strip_prefix(&below).unwrap_or(path)).collect();
    let mut options = format!("lowerdir={},index=off,xino=off", names.join(":"));
    if writable {
        options += &format!(",upperdir={0}/upper,workdir={0}/work,volatile", layout::WRITABLE);
    }
    if !label.is_empty() {
        // Categories are separated by commas, as options are.
        options += &format!(",context=\"{label}\"");
    }
    let options = std::ffi::CString::new(options)?;
    rustix::process::chdir(layout::LAYERS)?;
    let flags = rustix::mount::MountFlags::empty();
    let mounted = rustix::mount::mount("overlay", target, "overlay", flags, options.as_c_str());
    rustix::process::chdir("/")?;
    mounted?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(target, flags, Mode::empty())?)
}

/// A detached overlay. Layers are given one by one and by path: their number is not bounded by the length of one
/// option, and by descriptor is EBADF on Linux 6.12. Volatile: without it the end of every container syncs the whole
/// filesystem of the writable directory.
fn overlay(lower: &[String], writable: bool, label: &str) -> io::Result<OwnedFd> {
    let context = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || -> rustix::io::Result<OwnedFd> {
        mount::fsconfig_set_string(&context, "source", "overlay")?;
        for layer in lower {
            mount::fsconfig_set_string(&context, "lowerdir+", layer.as_str())?;
        }
        if writable {
            mount::fsconfig_set_string(&context, "upperdir", format!("{}/upper", layout::WRITABLE))?;
            mount::fsconfig_set_string(&context, "workdir", format!("{}/work", layout::WRITABLE))?;
            mount::fsconfig_set_flag(&context, "volatile")?;
        }
        mount::fsconfig_set_string(&context, "index", "off")?;
        mount::fsconfig_set_string(&context, "xino", "off")?;
        if !label.is_empty() {
            mount::fsconfig_set_string(&context, "context", label)?;
        }
        mount::fsconfig_create(&context)?;
        mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    configure().map_err(|error| with_log(context.as_fd(), error.into()))
}

/// The kernel's own explanation, which can be read from the context, joined to the error.
pub(super) fn with_log(context: BorrowedFd<'_>, error: io::Error) -> io::Error {
    let mut buffer = [0; 512];
    let log: Vec<String> = std::iter::from_fn(|| {
        rustix::io::read(context, &mut buffer)
            .ok()
            .map(|read| String::from_utf8_lossy(&buffer[..read]).trim().to_owned())
    })
    .filter(|line| !line.is_empty())
    .take(8)
    .collect();
    if log.is_empty() { error } else { io::Error::new(error.kind(), format!("{error} ({})", log.join("; "))) }
}

/// Makes `root` the root of the mount namespace and detaches what was there before.
pub(super) fn pivot(root: &Root) -> Result<(), Failure> {
    let change = || -> rustix::io::Result<()> {
        rustix::process::fchdir(root.as_fd())?;
        // Both at ".": the old root lies over the new one until it is detached.
        mount::pivot_root(".", ".")?;
        mount::unmount(".", mount::UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    change().during(Stage::Rootfs, || "cannot change to the root filesystem")
}

/// The directory that is the calling process's root.
pub(super) fn current() -> io::Result<Root> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(Root::new(rustix::fs::open("/", flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_sys::mount::Propagation;
    use hull_sys::namespace::{self, Namespaces};
    use std::fs;

    /// In a mount namespace of this thread's own, with /run for the agent's directories.
    fn in_own_mounts(test: fn()) {
        let body = move || {
            namespace::unshare_filesystem_attributes().unwrap();
            namespace::unshare(Namespaces::MOUNT).unwrap();
            let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
            mount::set_attributes_at(CWD, c"/", true, &private).unwrap();
            rustix::mount::mount("test", "/run", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
            for path in [layout::LAYERS, layout::WRITABLE, layout::ROOTFS] {
                fs::create_dir_all(path).unwrap();
            }
            test();
        };
        std::thread::spawn(body).join().unwrap();
    }

    #[test]
    fn both_ways_to_mount_an_overlay_give_the_same() {
        in_own_mounts(|| {
            for number in 0..300 {
                let layer = format!("{}/{number}", layout::LAYERS);
                fs::create_dir(&layer).unwrap();
                fs::write(format!("{layer}/which"), number.to_string()).unwrap();
                fs::write(format!("{layer}/file-{number}"), "").unwrap();
            }
            fs::create_dir(format!("{}/upper", layout::WRITABLE)).unwrap();
            fs::create_dir(format!("{}/work", layout::WRITABLE)).unwrap();
            let seen = |root: OwnedFd| {
                let root = Root::new(root);
                let found = root.resolve("/file-299", super::super::inside::Links::Refuse);
                assert!(found.is_ok());
                fs::read_to_string(format!("{}/which", layout::ROOTFS)).unwrap()
            };
            let lower: Vec<String> = (0..300).map(|number| format!("{}/{number}", layout::LAYERS)).collect();
            assert_eq!(seen(overlay_with_options(&lower, true, "", layout::ROOTFS).unwrap()), "0");
            mount::unmount(layout::ROOTFS, mount::UnmountFlags::empty()).unwrap();
            let writable = fs::File::open(layout::WRITABLE).unwrap();
            allow_again(writable.as_fd()).unwrap();
            assert_eq!(seen(mount_overlay(&lower, "").unwrap()), "0");
        });
    }
}
