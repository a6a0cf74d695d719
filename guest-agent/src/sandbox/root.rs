//! The agent's own mount root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::mount::{
    self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MoveMountFlags, OpenTreeFlags,
    Propagation, UnmountFlags,
};
use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::{Doing, SandboxError, layout};
use crate::container::with_label;
use crate::protocol::messages;

/// Bytes of the root's tmpfs. Containers can write to the files in it (/etc/hosts), so this bounds what they can fill.
const ROOT_SIZE: &str = "1m";
/// Inodes of it: a directory for each of the most layers that overlayfs stacks, and some.
const ROOT_INODES: &str = "1024";
/// Bytes of /dev/shm if the request does not say, as in other runtimes.
const DEFAULT_SHM: u64 = 64 << 20;

const NO_ALL: Attr = Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NODEV).union(Attr::MOUNT_ATTR_NOEXEC);

/// Replaces the mount namespace's whole tree by a new root with this label, in which is what all pods have in common. The
/// old one is out of reach for paths, and detached by [`forget_host`].
pub(super) fn leave_host(layout: &messages::CgroupLayout, label: &str) -> Result<(), SandboxError> {
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    mount::set_attributes_at(CWD, c"/", true, &private).doing("make the agent's mounts private")?;
    let cgroup = host_cgroup(layout)?;
    let root = new_root(label)?;
    rustix::process::fchdir(&root).doing("enter the agent's root")?;
    fill()?;
    // Unmasked: it is what a procfs in a user namespace is checked against, and what sysctls are written to.
    attach(filesystem("proc", &[], NO_ALL)?.as_fd(), "proc")?;
    if let Some(tree) = cgroup {
        mount::set_attributes(tree.as_fd(), true, &private).doing("make the cgroup mount private")?;
        attach(tree.as_fd(), relative(layout::CGROUP))?;
    }
    mount::pivot_root(".", ".").doing("change to the agent's root")?;
    rustix::process::chdir("/").doing("enter the agent's root")?;
    Ok(())
}

/// Adds what is this pod's own, but for its shared memory. What containers see of it belongs to `owner`: user and group of
/// their root.
pub(super) fn furnish(spec: &messages::CreateSandbox, owner: (u32, u32)) -> Result<(), SandboxError> {
    let files = [
        (layout::ETC_HOSTNAME, &spec.etc_hostname),
        (layout::ETC_HOSTS, &spec.etc_hosts),
        (layout::ETC_RESOLV_CONF, &spec.etc_resolv_conf),
    ];
    without_umask(|| {
        files.into_iter().filter_map(|(path, content)| Some((path, content.as_ref()?))).try_for_each(
            |(path, content)| {
                write_file(path, content, owner).doing(format!("write {path} for the containers"))
            },
        )
    })?;
    // It shows the devices of the network namespace in which it is mounted.
    attach(filesystem("sysfs", &[], NO_ALL)?.as_fd(), "/sys")
}

/// Detaches the old root. Apart from the rest because the kernel lets it wait for a grace period of RCU: from a tenth of a
/// millisecond on an idle machine to tens of them on a busy one.
pub(super) fn forget_host() -> Result<(), SandboxError> {
    // The old root lies over the new one, and both at ".", until it is detached.
    mount::unmount(".", UnmountFlags::DETACH).doing("leave the host's mounts")?;
    rustix::process::chdir("/").doing("enter the agent's root")?;
    Ok(())
}

/// On v2, a clone of the host's cgroup2 mount: containers in the host's cgroup namespace get it, since a mount of
/// cgroup2 made in that namespace would reset the hierarchy's options.
fn host_cgroup(layout: &messages::CgroupLayout) -> Result<Option<OwnedFd>, SandboxError> {
    if !layout.unified_controllers {
        return Ok(None);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    mount::open_tree(CWD, &layout.unified, flags)
        .map(Some)
        .doing(format!("take the cgroup hierarchy at {}", layout.unified))
}

/// A tmpfs with this label, mounted over /proc: any directory does, and every root that the agent starts in has this one.
fn new_root(label: &str) -> Result<OwnedFd, SandboxError> {
    let attributes = Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NOEXEC;
    let options = [("size", ROOT_SIZE), ("nr_inodes", ROOT_INODES), ("mode", "755")];
    // Containers see what is on it: /etc/hosts, and what hides masked paths.
    let root = filesystem("tmpfs", &with_label(&options, label), attributes)?;
    attach(root.as_fd(), "/proc")?;
    Ok(root)
}

fn filesystem(kind: &str, options: &[(&str, &str)], attributes: Attr) -> Result<OwnedFd, SandboxError> {
    let make = || {
        let context = mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            mount::fsconfig_set_string(&context, *key, *value)?;
        }
        mount::fsconfig_create(&context)?;
        mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().doing(format!("mount a {kind} for the agent"))
}

fn attach(tree: BorrowedFd<'_>, path: &str) -> Result<(), SandboxError> {
    mount::move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(format!("mount {path} for the agent"))
}

/// The path relative to the new root, which is the current directory.
fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// The umask of the caller must not take anything away.
fn without_umask<T>(work: impl FnOnce() -> T) -> T {
    let umask = rustix::process::umask(Mode::empty());
    let result = work();
    rustix::process::umask(umask);
    result
}

/// Directories, and the null device.
fn fill() -> Result<(), SandboxError> {
    let directories = [
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        // A starting container's process goes through it with no privileges but those of its user namespace.
        (relative(layout::RUN), 0o711),
        ("run/hull/etc", 0o755),
        (relative(layout::SHM), 0o755),
        (relative(layout::EMPTY), 0o555),
        (relative(layout::CGROUP), 0o755),
        (relative(layout::LAYERS), 0o700),
        (relative(layout::SCAFFOLDS), 0o700),
        (relative(layout::WRITABLE), 0o700),
        (relative(layout::VOLUME), 0o700),
        (relative(layout::ROOTFS), 0o755),
    ];
    let null = rustix::fs::makedev(1, 3);
    without_umask(|| {
        for (path, mode) in directories {
            rustix::fs::mkdir(path, Mode::from_raw_mode(mode))
                .doing(format!("make /{path} for the agent"))?;
        }
        let (path, mode) = (relative(layout::NULL), Mode::from_raw_mode(0o666));
        rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, null)
            .doing("make the agent's null device")
    })
}

fn write_file(path: &str, content: &[u8], (uid, gid): (u32, u32)) -> std::io::Result<()> {
    use rustix::fs::{Gid, Uid};
    use std::io::Write;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?;
    rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    std::fs::File::from(file).write_all(content)
}

/// Whether the pod's shared memory is like nearly every pod's.
pub(super) fn wants_usual_shm(spec: &messages::CreateSandbox) -> bool {
    matches!(spec.shm_size, 0 | DEFAULT_SHM) && spec.mount_label.is_empty()
}

/// Shared memory like nearly every pod's; [`mount_shm`] may put another one over it.
pub(super) fn mount_usual_shm() -> Result<(), SandboxError> {
    mount_shm(None, &messages::CreateSandbox::default(), (0, 0))
}

/// The pod's shared memory: the given tree, or a new one.
pub(super) fn mount_shm(
    given: Option<BorrowedFd<'_>>,
    spec: &messages::CreateSandbox,
    owner: (u32, u32),
) -> Result<(), SandboxError> {
    if let Some(tree) = given {
        let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
        mount::set_attributes(tree, true, &private).doing("make the shared memory's mount private")?;
        return attach(tree, layout::SHM);
    }
    let size = if spec.shm_size == 0 { DEFAULT_SHM } else { spec.shm_size };
    let (size, uid, gid) = (size.to_string(), owner.0.to_string(), owner.1.to_string());
    let options = [("size", size.as_str()), ("mode", "1777"), ("uid", &uid), ("gid", &gid)];
    let tmpfs = filesystem("tmpfs", &with_label(&options, &spec.mount_label), NO_ALL)?;
    attach(tmpfs.as_fd(), layout::SHM)
}
