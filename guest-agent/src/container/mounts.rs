//! Carries out the mounts of a plan, each by descriptor: a path of the image is resolved inside the root, once, and
//! what was resolved is what is mounted on.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use hull_sys::mount::{
    self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MoveMountFlags, OpenTreeFlags,
    Propagation,
};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use rustix::io::Errno;

use crate::protocol::messages;
use crate::sandbox::Hierarchy;

use super::failure::{During, Failure, Stage};
use super::inside::{Kind, Links, Root, file_type, is_procfs};
use super::mount_plan::{Flags, Missing, MountStep, Source};
use super::own_proc::is_missing;
use super::plan::{ContainerPlan, is_below};
use super::rootfs::{image_volume, map_ids, with_log};
use super::{Slots, devices};

/// What may be mounted over in procfs: what lxcfs and the like emulate. Anything else there would let an image or a
/// volume redirect what reads or writes /proc (CVE-2019-16884, CVE-2025-52881).
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/net/dev",
];

/// Which mounts are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Without a user namespace: all.
    All,
    /// Outside of the pod's user namespace: all but /proc and what lies below it.
    Outside,
    /// Inside of it: the rest. A procfs belongs to the PID namespace that it is mounted from.
    Inside,
}

/// The group that terminals belong to in every distribution.
const TTY: u32 = 5;

/// Mounts everything of a part in the plan's order.
pub(super) fn mount_all(
    root: &Root,
    plan: &ContainerPlan,
    slots: &Slots<'_>,
    part: Part,
) -> Result<(), Failure> {
    for step in &plan.mounts {
        let tree = match (part, is_below(&step.destination, "/proc")) {
            (Part::All, _) | (Part::Outside, false) => tree(plan, step, slots)?,
            // What it brings along is made ready where that is allowed.
            (Part::Outside, true) if is_brought(&step.source) => {
                tree(plan, step, slots)?;
                continue;
            }
            (Part::Outside, true) | (Part::Inside, false) => continue,
            (Part::Inside, true) => match &step.source {
                Source::Slot(slot) => Tree::Brought(brought(step, *slot, slots)?),
                _ => tree(plan, step, slots)?,
            },
        };
        mount_step(root, plan, step, &tree)?;
    }
    Ok(())
}

const fn is_brought(source: &Source) -> bool {
    matches!(source, Source::Slot(_))
}

fn mount_step(root: &Root, plan: &ContainerPlan, step: &MountStep, tree: &Tree<'_>) -> Result<(), Failure> {
    let Some(target) = target(root, step, tree.as_fd())? else { return Ok(()) };
    attach(tree.as_fd(), target.as_fd(), &step.destination)?;
    match &step.source {
        Source::Dev { .. } => {
            let dev = tree.as_fd().try_clone_to_owned();
            let dev = dev.during(Stage::Device, || "cannot open the container's /dev")?;
            devices::populate(&Root::new(dev), &plan.devices)
        }
        Source::CgroupV1(hierarchies) => {
            mount_hierarchies(tree.as_fd(), hierarchies, step.flags)?;
            set_flags(tree.as_fd(), step.flags, None, &step.destination)
        }
        _ => Ok(()),
    }
}

/// A mount that is made here, or one that the request brought.
enum Tree<'a> {
    Made(OwnedFd),
    Brought(BorrowedFd<'a>),
}

impl Tree<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Made(fd) => fd.as_fd(),
            Self::Brought(fd) => *fd,
        }
    }
}

/// The detached mount with all its attributes.
fn tree<'a>(plan: &ContainerPlan, step: &MountStep, slots: &Slots<'a>) -> Result<Tree<'a>, Failure> {
    let user = plan.user_namespace.as_deref();
    let attributes =
        if step.flags.readonly { step.flags.set | Attr::MOUNT_ATTR_RDONLY } else { step.flags.set };
    let make = |kind: &str, options: &[(&str, &str)], attributes| {
        filesystem(kind, options, attributes)
            .during(Stage::Mount, || format!("cannot mount {kind} at {}", step.destination))
            .map(Tree::Made)
    };
    let label = plan.mount_label.as_str();
    match &step.source {
        Source::Proc => make("proc", &[], attributes),
        Source::Sysfs => make("sysfs", &[], attributes),
        Source::Mqueue { labelled } => {
            let tree = make("mqueue", &[], attributes)?;
            // One for the whole IPC namespace: the kernel lets no mount of it have an own label.
            if *labelled {
                label_root(tree.as_fd(), label)?;
            }
            Ok(tree)
        }
        Source::Cgroup2 => make("cgroup2", &[], attributes),
        // runtime-spec config-linux.md, "Default Filesystems".
        Source::Devpts => {
            let mut options = vec![("ptmxmode", "0666"), ("mode", "0620")];
            let group = user.map_or(Some(TTY), |user| user.gids.outside(TTY)).map(|gid| gid.to_string());
            options.extend(group.iter().map(|gid| ("gid", gid.as_str())));
            make("devpts", &with_label(&options, label), attributes)
        }
        Source::Dev { size, mode } | Source::Tmpfs { size, mode } => {
            let (size, mode) = (size.to_string(), format!("{mode:o}"));
            let all = [("mode", mode.as_str()), ("size", size.as_str())];
            let wanted = if size == "0" { &all[..1] } else { &all };
            make("tmpfs", &with_label(wanted, label), attributes)
        }
        // Read-only only when its directories are made.
        Source::CgroupV1(_) => {
            let options = [("mode", "755"), ("size", "64k")];
            make("tmpfs", &with_label(&options, label), step.flags.set)
        }
        Source::Pod(path) => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = mount::open_tree(CWD, *path, flags)
                .during(Stage::Mount, || format!("cannot take the pod's {path} for {}", step.destination))?;
            set_flags(tree.as_fd(), step.flags, None, &step.destination)?;
            Ok(Tree::Made(tree))
        }
        Source::Slot(slot) => {
            let tree = brought(step, *slot, slots)?;
            if step.idmapped {
                map_ids(tree, user, true).map_err(|error| unmapped(step, error))?;
            }
            set_flags(tree, step.flags, propagation(step.propagation), &step.destination)?;
            Ok(Tree::Brought(tree))
        }
        Source::Image { layers, sub_path } => {
            let tree = image_volume(layers, sub_path, label, slots, user)?;
            set_flags(tree.as_fd(), step.flags, None, &step.destination)?;
            Ok(Tree::Made(tree))
        }
    }
}

fn brought<'a>(step: &MountStep, slot: u32, slots: &Slots<'a>) -> Result<BorrowedFd<'a>, Failure> {
    slots.get(slot).ok_or_else(|| {
        let message = format!("cannot mount {}: the request brought no slot {slot}", step.destination);
        Failure::new(Stage::Mount, message)
    })
}

/// mount_setattr(2) says only EINVAL for a file system that knows no mapped ids.
fn unmapped(step: &MountStep, error: std::io::Error) -> Failure {
    let destination = &step.destination;
    let mut failure =
        Failure::system(Stage::Mount, format!("cannot map the ids of the mount at {destination}"), error);
    if failure.errno == rustix::io::Errno::INVAL.raw_os_error() {
        failure.message +=
            " (its file system cannot map ids: such a volume cannot be used in a pod with a user namespace)";
    }
    failure
}

/// A clone of a shared mount stays in its peer group: that is Bidirectional. It leaves the group for Private, and
/// becomes its slave for HostToContainer.
const fn propagation(wanted: messages::Propagation) -> Option<Propagation> {
    match wanted {
        messages::Propagation::Private => Some(Propagation::Private),
        messages::Propagation::HostToContainer => Some(Propagation::Slave),
        messages::Propagation::Bidirectional => None,
    }
}

/// Options of a mount whose files all have the SELinux label, if there is one.
pub(crate) fn with_label<'a>(options: &[(&'a str, &'a str)], label: &'a str) -> Vec<(&'a str, &'a str)> {
    let context = (!label.is_empty()).then_some(("context", label));
    options.iter().copied().chain(context).collect()
}

/// Gives the root of a detached mount an SELinux label, where its file system can have some.
fn label_root(tree: BorrowedFd<'_>, label: &str) -> Result<(), Failure> {
    if label.is_empty() {
        return Ok(());
    }
    let path = format!("/proc/thread-self/fd/{}", tree.as_raw_fd());
    match rustix::fs::setxattr(path, "security.selinux", label.as_bytes(), XattrFlags::empty()) {
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(Failure::system(
            Stage::Mount,
            format!("cannot give a mount the SELinux label {label}"),
            error,
        )),
    }
}

/// A new, detached filesystem.
pub(super) fn filesystem(kind: &str, options: &[(&str, &str)], attributes: Attr) -> std::io::Result<OwnedFd> {
    let context = mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let make = || {
        // What mount tables show as the source; df and others leave "none" out.
        mount::fsconfig_set_string(&context, "source", kind)?;
        for (key, value) in options {
            match *value {
                "" => mount::fsconfig_set_flag(&context, *key)?,
                value => mount::fsconfig_set_string(&context, *key, value)?,
            }
        }
        mount::fsconfig_create(&context)?;
        mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(|error| with_log(context.as_fd(), error.into()))
}

/// Attributes of the topmost mount; propagation and a recursive read-only of everything below it as well.
fn set_flags(
    tree: BorrowedFd<'_>,
    flags: Flags,
    propagation: Option<Propagation>,
    destination: &str,
) -> Result<(), Failure> {
    let readonly = Attr::MOUNT_ATTR_RDONLY;
    let recursive = if flags.recursive_readonly { readonly } else { Attr::empty() };
    if propagation.is_some() || flags.recursive_readonly {
        let attributes = Attributes { set: recursive, propagation, ..Attributes::default() };
        mount::set_attributes(tree, true, &attributes)
            .during(Stage::Mount, || format!("cannot set attributes of every mount of {destination}"))?;
    }
    let set = if flags.readonly { flags.set | readonly } else { flags.set };
    if !set.is_empty() || !flags.clear.is_empty() {
        let attributes = Attributes { set, clear: flags.clear, ..Attributes::default() };
        mount::set_attributes(tree, false, &attributes)
            .during(Stage::Mount, || format!("cannot set attributes of the mount at {destination}"))?;
    }
    Ok(())
}

/// What is to be mounted on; `None`: it is missing and the mount is only for where it is not.
fn target(root: &Root, step: &MountStep, tree: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Failure> {
    let destination = &step.destination;
    let doing = || format!("cannot mount {destination}");
    let directory = file_type(tree).during(Stage::Mount, doing)? == FileType::Directory;
    let links = if step.exact { Links::Refuse } else { Links::Follow };
    let found = match step.missing {
        Missing::Create => {
            root.create(destination, if directory { Kind::Directory } else { Kind::File }, links)
        }
        Missing::Skip => match root.resolve(destination, links) {
            Err(error) if is_missing(&error) => return Ok(None),
            result => result,
        },
    };
    let found = found.map_err(|error| unresolved(step, error))?;
    if (file_type(found.as_fd()).during(Stage::Mount, doing)? == FileType::Directory) != directory {
        let (source, there) = if directory { ("directory", "a file") } else { ("file", "a directory") };
        let message = format!("cannot mount {destination}: the source is a {source}, but {there} is there");
        return Err(Failure::new(Stage::Mount, message));
    }
    let in_proc = is_procfs(found.as_fd()).during(Stage::Mount, doing)?;
    if in_proc && !PROC_FILES.contains(&destination.as_str()) {
        let message = format!("cannot mount {destination}: it leads into /proc, where that is not allowed");
        return Err(Failure::new(Stage::Mount, message));
    }
    if destination == "/proc" && !is_procfs(tree).during(Stage::Mount, doing)? {
        return Err(Failure::new(Stage::Mount, "cannot mount /proc: the source is not procfs"));
    }
    Ok(Some(found))
}

fn unresolved(step: &MountStep, error: std::io::Error) -> Failure {
    let destination = &step.destination;
    if step.exact && error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        let message = format!("cannot mount {destination}: the image has a symbolic link there");
        return Failure {
            errno: rustix::io::Errno::LOOP.raw_os_error(),
            ..Failure::new(Stage::Mount, message)
        };
    }
    Failure::system(Stage::Mount, format!("cannot make the mount point {destination}"), error)
}

/// Attaches a detached mount on what is behind `target`.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    mount::move_mount(tree, "", target, "", flags).during(Stage::Mount, || format!("cannot mount {path}"))
}

/// Every hierarchy at its directory, and a link for each controller of one that has several.
fn mount_hierarchies(tmpfs: BorrowedFd<'_>, hierarchies: &[Hierarchy], flags: Flags) -> Result<(), Failure> {
    for hierarchy in hierarchies {
        let name = &hierarchy.directory;
        let doing = || format!("cannot mount the cgroup hierarchy {name}");
        rustix::fs::mkdirat(tmpfs, name, Mode::from_raw_mode(0o755)).during(Stage::Mount, doing)?;
        let attributes = if flags.readonly { flags.set | Attr::MOUNT_ATTR_RDONLY } else { flags.set };
        let tree = match hierarchy.controllers.as_slice() {
            [] => filesystem("cgroup2", &[], attributes),
            controllers => {
                let option = |controller: &'_ String| match controller.split_once('=') {
                    Some((key, value)) => (key.to_owned(), value.to_owned()),
                    None => (controller.clone(), String::new()),
                };
                let options: Vec<(String, String)> = controllers.iter().map(option).collect();
                let options: Vec<_> =
                    options.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
                filesystem("cgroup", &options, attributes)
            }
        };
        let tree = tree.during(Stage::Mount, doing)?;
        mount::move_mount(&tree, "", tmpfs, name.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .during(Stage::Mount, doing)?;
        for controller in &hierarchy.controllers {
            if controller != name && hierarchy.controllers.len() > 1 && !controller.contains(['=', '/']) {
                rustix::fs::symlinkat(name, tmpfs, controller.as_str()).during(Stage::Mount, doing)?;
            }
        }
    }
    Ok(())
}
