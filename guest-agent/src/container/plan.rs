use std::sync::Arc;

use crate::protocol::messages;
use crate::sandbox::{PodFacts, UserNamespace};

use super::mount_plan::{self, MountStep};
use super::process_plan::{MAX_PATH, ProcessPlan, settled};
use super::report::Identity;
use super::users::UserError;
use super::{Launched, process_plan};

/// Layers that overlayfs can stack (OVL_MAX_STACK).
pub(super) const MAX_LAYERS: usize = 500;

/// Why a request cannot become a container.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// `args` is empty.
    #[error("cannot start a process without a command: args is empty")]
    NoCommand,
    /// A zero byte would cut the text off in the kernel.
    #[error("cannot use {0:?}: it contains a zero byte")]
    ZeroByte(String),
    /// Control characters, or longer than a path can be.
    #[error("cannot use {0:?}: it contains control characters or is too long")]
    BadText(String),
    /// Working directories are absolute.
    #[error("cannot use the working directory {0:?}: it is not absolute")]
    RelativeWorkingDirectory(String),
    /// Not an RLIMIT_*.
    #[error("cannot set the resource limit {0:?}: unknown type")]
    UnknownLimit(String),
    /// One capability set exceeds another that must contain it.
    #[error("cannot set capabilities: the {0} set has some that the {1} set lacks")]
    Capabilities(&'static str, &'static str),
    /// See [`UserError`].
    #[error(transparent)]
    User(#[from] UserError),
    /// A part that every container needs is missing from the message.
    #[error("cannot start a container without a {0}")]
    Missing(&'static str),
    /// None, or more than overlayfs stacks.
    #[error("cannot assemble a root filesystem from {0} layers: 1 to {MAX_LAYERS} are possible")]
    Layers(usize),
    /// A path inside the container that is not absolute, too long, or the root itself.
    #[error("cannot use {path:?} as {what}: {reason}")]
    Path {
        /// What it is for.
        what: &'static str,
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A mount option that is not nosuid, nodev, noexec or noatime (or their opposites).
    #[error("cannot mount {destination}: unknown option {option:?}")]
    Option {
        /// Where.
        destination: String,
        /// The option.
        option: String,
    },
    /// A mount with no source.
    #[error("cannot mount {0}: it has no source")]
    NoSource(String),
    /// Masking a path below a Bidirectional mount would mask it on the host.
    #[error("cannot mask or protect {path}: it lies below {mount}, which propagates to the host")]
    MaskOnHost {
        /// The masked or read-only path.
        path: String,
        /// The mount.
        mount: String,
    },
    /// A device node that cannot be.
    #[error("cannot create the device {path}: {reason}")]
    Device {
        /// Its path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What to do for a container, in order, and nothing left to decide: [`super::launch`] only makes system calls.
#[derive(Clone, Debug)]
pub struct ContainerPlan {
    pub(super) rootfs: RootfsPlan,
    pub(super) mounts: Vec<MountStep>,
    /// False if the request brings its own /dev: then that one's nodes are used as they are.
    pub(super) own_dev: bool,
    /// Beyond the default ones.
    pub(super) devices: Vec<DeviceNode>,
    pub(super) readonly_paths: Vec<String>,
    pub(super) masked_paths: Vec<String>,
    pub(super) cgroup_namespace: CgroupNamespace,
    pub(super) process: ProcessPlan,
    /// SELinux label of what is mounted for the container alone; empty: none.
    pub(super) mount_label: String,
    /// The slot of the file that takes its processes into their class of cache and memory bandwidth.
    pub(super) rdt_tasks: Option<u32>,
    /// Where the container lives; `None`: where the agent does.
    pub(super) user_namespace: Option<Arc<UserNamespace>>,
    /// As it was asked for; the settled form is what execs inherit.
    request: messages::Process,
}

/// The root filesystem. Numbers are slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RootfsPlan {
    /// The uppermost first.
    pub(super) layers: Vec<u32>,
    pub(super) writable: u32,
    pub(super) readonly: bool,
    pub(super) propagation: messages::Propagation,
}

/// Whose view of the cgroups the container has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CgroupNamespace {
    /// The agent's (the host's).
    Agent,
    /// Its own.
    Private,
    /// The agent's, but the mounts below /sys/fs/cgroup are made from inside an own one, so that they show the
    /// container's part of each v1 hierarchy only, as other runtimes do by bind mounts.
    PrivateWhileMounting,
}

/// A device node or FIFO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceNode {
    pub(super) path: String,
    pub(super) kind: DeviceKind,
    pub(super) major: u32,
    pub(super) minor: u32,
    /// Permission bits.
    pub(super) mode: u32,
    /// User and group as the agent numbers them; `None`: the container's root.
    pub(super) owner: Option<(u32, u32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceKind {
    Character,
    Block,
    Fifo,
}

impl ContainerPlan {
    /// Checks the request and orders what it asks for. Pure: no system call is made.
    pub fn new(spec: &messages::StartContainer, pod: &PodFacts) -> Result<Self, PlanError> {
        let process = spec.process.as_ref().ok_or(PlanError::Missing("process"))?;
        let (mounts, own_dev) = mount_plan::order(spec, pod)?;
        let masked_paths = guarded_paths(&spec.masked_paths, "masked path", &mounts)?;
        let readonly_paths = guarded_paths(&spec.readonly_paths, "read-only path", &mounts)?;
        let cgroup_namespace = match (spec.private_cgroup_namespace, pod.cgroups.is_v2()) {
            (true, _) => CgroupNamespace::Private,
            (false, true) => CgroupNamespace::Agent,
            (false, false) => CgroupNamespace::PrivateWhileMounting,
        };
        Ok(Self {
            rootfs: rootfs(spec)?,
            mounts,
            own_dev,
            devices: spec
                .devices
                .iter()
                .map(|node| device(node, pod.user_namespace.as_deref()))
                .collect::<Result<_, _>>()?,
            readonly_paths,
            masked_paths,
            cgroup_namespace,
            process: ProcessPlan::new(process)?,
            mount_label: process_plan::label(&spec.mount_label)?.to_owned(),
            rdt_tasks: spec.rdt_tasks,
            user_namespace: pod.user_namespace.clone(),
            request: process.clone(),
        })
    }

    /// What an exec in this container inherits: the request with the user that `launched` got, in numbers.
    pub fn process_of(&self, launched: &Launched) -> messages::Process {
        let (uid, gid) = (launched.uid, launched.gid);
        settled(&self.request, &Identity { uid, gid, groups: launched.groups.clone() })
    }
}

fn rootfs(spec: &messages::StartContainer) -> Result<RootfsPlan, PlanError> {
    let rootfs = spec.rootfs.as_ref().ok_or(PlanError::Missing("root filesystem"))?;
    if rootfs.layers.is_empty() || rootfs.layers.len() > MAX_LAYERS {
        return Err(PlanError::Layers(rootfs.layers.len()));
    }
    Ok(RootfsPlan {
        layers: rootfs.layers.clone(),
        writable: rootfs.writable,
        readonly: rootfs.readonly,
        propagation: rootfs.propagation(),
    })
}

/// An absolute path inside the container in its shortest form: no empty components, "." or "..", no slash at the end.
/// ".." ends at the root. Never empty; "/" is refused.
pub(super) fn normalise(path: &str, what: &'static str) -> Result<String, PlanError> {
    let bad = |reason| PlanError::Path { what, path: path.chars().take(200).collect(), reason };
    if !path.starts_with('/') {
        return Err(bad("it is not absolute"));
    }
    if path.len() >= MAX_PATH {
        return Err(bad("it is longer than 4095 bytes"));
    }
    if path.contains('\0') {
        return Err(bad("it contains a zero byte"));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(bad("it is the root"));
    }
    Ok(parts.iter().flat_map(|part| ["/", part]).collect())
}

/// True if `path` is `above` or lies below it; both normalised.
pub(super) fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn guarded_paths(
    paths: &[String],
    what: &'static str,
    mounts: &[MountStep],
) -> Result<Vec<String>, PlanError> {
    let mut result = Vec::with_capacity(paths.len());
    for path in paths {
        let path = normalise(path, what)?;
        let shared = |mount: &&MountStep| {
            mount.propagation == messages::Propagation::Bidirectional && is_below(&path, &mount.destination)
        };
        if let Some(mount) = mounts.iter().find(shared) {
            return Err(PlanError::MaskOnHost { path, mount: mount.destination.clone() });
        }
        result.push(path);
    }
    Ok(result)
}

fn device(device: &messages::Device, user: Option<&UserNamespace>) -> Result<DeviceNode, PlanError> {
    let bad = |reason: &str| PlanError::Device { path: device.path.clone(), reason: reason.into() };
    let kind = match device.r#type.as_str() {
        "c" | "u" => DeviceKind::Character,
        "b" => DeviceKind::Block,
        "p" => DeviceKind::Fifo,
        other => return Err(bad(&format!("unknown type {other:?}"))),
    };
    // dev_t of the kernel: 12 bits of major, 20 of minor.
    if device.major >= 1 << 12 || device.minor >= 1 << 20 {
        return Err(bad("its number is too large"));
    }
    if device.uid == u32::MAX || device.gid == u32::MAX {
        return Err(bad("its owner is not a usable ID"));
    }
    Ok(DeviceNode {
        path: normalise(&device.path, "a device")?,
        kind,
        major: device.major,
        minor: device.minor,
        mode: device.mode & 0o777,
        owner: owner(device, user),
    })
}

/// An id that the pod's user namespace does not map stays what it is outside: to the container nobody's.
fn owner(device: &messages::Device, user: Option<&UserNamespace>) -> Option<(u32, u32)> {
    match user {
        None if (device.uid, device.gid) == (0, 0) => None,
        Some(user) if !device.host_owner => Some((
            user.uids.outside(device.uid).unwrap_or(device.uid),
            user.gids.outside(device.gid).unwrap_or(device.gid),
        )),
        _ => Some((device.uid, device.gid)),
    }
}

/// The plan of a process in a running container.
pub(super) fn exec_process(
    container: &messages::Process,
    request: &messages::Process,
    inherit: bool,
) -> Result<ProcessPlan, PlanError> {
    if inherit {
        ProcessPlan::new(&process_plan::inherit(container, request))
    } else {
        ProcessPlan::new(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::mount_plan::tests::{pod, pod_in_user_namespace, slot_mount, spec};

    #[test]
    fn paths_are_absolute_and_shortest() {
        assert_eq!(normalise("//a/./b/../c//", "x").unwrap(), "/a/c");
        assert_eq!(normalise("/../../a", "x").unwrap(), "/a");
        for path in ["", "a/b", "/", "/..", "/a/..", "/a\0b"] {
            assert!(normalise(path, "x").is_err(), "{path:?}");
        }
        assert!(normalise(&format!("/{}", "a".repeat(MAX_PATH)), "x").is_err());
    }

    #[test]
    fn below_is_by_component() {
        assert!(is_below("/dev", "/dev") && is_below("/dev/shm", "/dev"));
        assert!(!is_below("/device", "/dev") && !is_below("/de", "/dev"));
    }

    /// docs/SPECIFICATION.md: the agent's plan of a start.
    const ALLOCATIONS: u64 = 120;

    #[test]
    fn a_plan_asks_for_memory_no_more_often_than_promised() {
        use prost::Message;
        let mut spec = spec();
        let process = spec.process.as_mut().unwrap();
        process.env = (0..12).map(|number| format!("SERVICE_{number}=tcp://10.96.0.1:443")).collect();
        spec.mounts = (0..4).map(|number| slot_mount(&format!("/volume/{number}"), number + 2)).collect();
        let bytes = spec.encode_to_vec();
        let pod = pod();
        let (plan, count) = hull_sys::memory::count_allocations(|| {
            let spec = messages::StartContainer::decode(bytes.as_slice()).unwrap();
            ContainerPlan::new(&spec, &pod).unwrap()
        });
        assert!(plan.mounts.len() > 4);
        println!("allocations of the agent's plan of a start: {count}");
        assert!((20..=ALLOCATIONS).contains(&count), "{count}");
    }

    #[test]
    fn a_container_needs_layers_and_a_process() {
        let refused = |change: fn(&mut messages::StartContainer)| {
            let mut spec = spec();
            change(&mut spec);
            ContainerPlan::new(&spec, &pod()).unwrap_err()
        };
        assert_eq!(refused(|spec| spec.rootfs = None), PlanError::Missing("root filesystem"));
        assert_eq!(refused(|spec| spec.process = None), PlanError::Missing("process"));
        assert_eq!(refused(|spec| spec.rootfs.as_mut().unwrap().layers.clear()), PlanError::Layers(0));
        assert_eq!(
            refused(|spec| spec.rootfs.as_mut().unwrap().layers = vec![0; 501]),
            PlanError::Layers(501)
        );
    }

    #[test]
    fn a_mask_never_reaches_the_host() {
        let mut spec = spec();
        let mut mount = slot_mount("/sys", 3);
        mount.propagation = messages::Propagation::Bidirectional.into();
        spec.mounts.push(mount);
        spec.masked_paths.push("/sys/firmware".into());
        assert!(matches!(ContainerPlan::new(&spec, &pod()), Err(PlanError::MaskOnHost { .. })));
    }

    #[test]
    fn devices_are_checked() {
        let fuse = messages::Device {
            path: "/dev/fuse".into(),
            r#type: "c".into(),
            major: 10,
            minor: 229,
            mode: 0o100_666,
            ..Default::default()
        };
        assert_eq!(device(&fuse, None).unwrap().mode, 0o666);
        assert!(device(&messages::Device { major: 4096, ..fuse.clone() }, None).is_err());
        assert!(device(&messages::Device { r#type: "x".into(), ..fuse.clone() }, None).is_err());
        assert!(device(&messages::Device { path: "fuse".into(), ..fuse }, None).is_err());
    }

    #[test]
    fn a_device_of_a_pod_with_a_user_namespace_is_its_own_or_the_hosts() {
        let user = pod_in_user_namespace().user_namespace.unwrap();
        let disk =
            messages::Device { path: "/dev/disk".into(), r#type: "b".into(), gid: 6, ..Default::default() };
        assert_eq!(device(&disk, Some(&user)).unwrap().owner, Some((100_000, 200_006)));
        let disk = messages::Device { host_owner: true, ..disk };
        assert_eq!(device(&disk, Some(&user)).unwrap().owner, Some((0, 6)));
        assert_eq!(device(&disk, None).unwrap().owner, Some((0, 6)));
        let root = messages::Device { gid: 0, ..disk };
        assert_eq!(device(&root, None).unwrap().owner, None);
        let beyond = messages::Device { gid: 70_000, host_owner: false, ..root };
        assert_eq!(device(&beyond, Some(&user)).unwrap().owner, Some((100_000, 70_000)));
    }

    #[test]
    fn without_its_own_cgroup_namespace_a_v1_container_still_sees_only_its_own_groups() {
        let mut spec = spec();
        spec.private_cgroup_namespace = false;
        let plan = ContainerPlan::new(&spec, &pod()).unwrap();
        assert_eq!(plan.cgroup_namespace, CgroupNamespace::PrivateWhileMounting);
    }
}
