//! Which mounts a container gets, and in which order.

use hull_sys::mount::MountAttrFlags as Attr;

use crate::protocol::messages::{self, Propagation};
use crate::sandbox::{Hierarchy, PodFacts, layout};

use super::plan::{MAX_LAYERS, PlanError, is_below, normalise};

/// Bytes of the tmpfs at /dev, as in other runtimes.
const DEV_SIZE: u64 = 64 << 20;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountStep {
    /// Normalised, absolute.
    pub(super) destination: String,
    pub(super) source: Source,
    pub(super) flags: Flags,
    pub(super) propagation: Propagation,
    /// If the destination is missing.
    pub(super) missing: Missing,
    /// Symbolic links in the destination are refused: for the mounts that a container's safety rests on.
    pub(super) exact: bool,
    /// Ids on the source's file system are those of the pod's user namespace.
    pub(super) idmapped: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Proc,
    Sysfs,
    /// A tmpfs with the default device nodes and links.
    Dev {
        size: u64,
        mode: u32,
    },
    Devpts,
    /// The message queues of the IPC namespace, with the container's label only where that is the pod's own.
    Mqueue {
        labelled: bool,
    },
    /// A file or directory that the agent keeps for the pod, by its path in the agent's own root.
    Pod(&'static str),
    /// A mount of cgroup2, from inside the container's own cgroup namespace.
    Cgroup2,
    /// A tmpfs with all the v1 hierarchies (and on hybrid the unified one) as [`PodFacts`] lists them.
    CgroupV1(Vec<Hierarchy>),
    /// A tree or file that the request brought.
    Slot(u32),
    /// An image: the slots of its layers, the uppermost first, and what of it is mounted (empty: all).
    Image {
        layers: Vec<u32>,
        sub_path: String,
    },
    Tmpfs {
        size: u64,
        mode: u32,
    },
}

/// Attributes of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) set: Attr,
    pub(super) clear: Attr,
    pub(super) readonly: bool,
    /// Read-only for all mounts below it as well.
    pub(super) recursive_readonly: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    Create,
    /// No mount then. For defaults below a /dev or /sys that the request brought: nothing is made in the host's.
    Skip,
}

const NONE: Attr = Attr::empty();
const NOSUID_NOEXEC: Attr = Attr::MOUNT_ATTR_NOSUID.union(Attr::MOUNT_ATTR_NOEXEC);
const NO_ALL: Attr = NOSUID_NOEXEC.union(Attr::MOUNT_ATTR_NODEV);

/// All mounts of a container, those of the request in the place of a default with the same destination, a directory
/// before what lies below it (else in the request's order). The second is false if the request brings its own /dev.
pub(super) fn order(
    spec: &messages::StartContainer,
    pod: &PodFacts,
) -> Result<(Vec<MountStep>, bool), PlanError> {
    let requested = spec.mounts.iter().map(requested).collect::<Result<Vec<_>, _>>()?;
    let replaced = |path: &str| requested.iter().any(|mount| mount.destination == path);
    let mut steps: Vec<MountStep> =
        defaults(spec, pod).into_iter().filter(|step| !replaced(&step.destination)).collect();
    for mount in &requested {
        let slot = matches!(mount.source, Source::Slot(_));
        let shared = mount.propagation == Propagation::Bidirectional;
        let below = |step: &MountStep| is_below(&step.destination, &mount.destination);
        if slot && shared {
            // A default mounted there would be mounted on the host as well.
            steps.retain(|step| !below(step));
        } else if slot {
            steps.iter_mut().filter(|step| below(step)).for_each(|step| step.missing = Missing::Skip);
        }
    }
    let own_dev = !requested.iter().any(|mount| mount.destination == "/dev" && is_slot(mount));
    steps.extend(requested);
    steps.sort_by_key(|step| step.destination.matches('/').count());
    Ok((steps, own_dev))
}

const fn is_slot(mount: &MountStep) -> bool {
    matches!(mount.source, Source::Slot(_))
}

/// runtime-spec config-linux.md, "Default Filesystems", with the attributes that containerd gives them.
fn defaults(spec: &messages::StartContainer, pod: &PodFacts) -> Vec<MountStep> {
    let step = |destination: &str, source, set, readonly| MountStep {
        destination: destination.to_owned(),
        source,
        flags: Flags { set, clear: NONE, readonly, recursive_readonly: false },
        propagation: Propagation::Private,
        missing: Missing::Create,
        exact: true,
        idmapped: false,
    };
    let dev = Source::Dev { size: DEV_SIZE, mode: 0o755 };
    let mut steps = vec![
        step("/proc", Source::Proc, NO_ALL, false),
        step("/dev", dev, Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_STRICTATIME, false),
        step("/dev/pts", Source::Devpts, NOSUID_NOEXEC, false),
        step("/dev/mqueue", Source::Mqueue { labelled: pod.own_ipc }, NO_ALL, false),
        step("/sys", Source::Sysfs, NO_ALL, !spec.writable_sys),
        step("/sys/fs/cgroup", cgroup_source(spec, pod), NO_ALL, !spec.writable_cgroup),
    ];
    if !spec.no_shm {
        steps.push(step("/dev/shm", Source::Pod(layout::SHM), NO_ALL, false));
    }
    let readonly = spec.rootfs.as_ref().is_some_and(|rootfs| rootfs.readonly);
    let files = [
        (pod.etc_hostname, "/etc/hostname", layout::ETC_HOSTNAME),
        (pod.etc_hosts, "/etc/hosts", layout::ETC_HOSTS),
        (pod.etc_resolv_conf, "/etc/resolv.conf", layout::ETC_RESOLV_CONF),
    ];
    for (_, destination, path) in files.into_iter().filter(|(present, ..)| *present) {
        // Images have links here (/etc/resolv.conf to /run/…): followed inside the root.
        steps.push(MountStep { exact: false, ..step(destination, Source::Pod(path), NONE, readonly) });
    }
    steps
}

fn cgroup_source(spec: &messages::StartContainer, pod: &PodFacts) -> Source {
    if !pod.cgroups.is_v2() {
        return Source::CgroupV1(pod.cgroups.hierarchies());
    }
    // A mount made in the host's cgroup namespace would reset the hierarchy's options (nsdelegate and others).
    if spec.private_cgroup_namespace { Source::Cgroup2 } else { Source::Pod(layout::CGROUP) }
}

fn requested(mount: &messages::Mount) -> Result<MountStep, PlanError> {
    let destination = normalise(&mount.destination, "a mount's destination")?;
    let source = match &mount.source {
        None => return Err(PlanError::NoSource(destination)),
        Some(messages::mount::Source::Slot(slot)) => Source::Slot(*slot),
        Some(messages::mount::Source::Image(image)) => {
            if image.layers.is_empty() || image.layers.len() >= MAX_LAYERS {
                return Err(PlanError::Layers(image.layers.len()));
            }
            Source::Image { layers: image.layers.clone(), sub_path: image.sub_path.clone() }
        }
        Some(messages::mount::Source::Tmpfs(tmpfs)) => {
            let (size, mode) = (tmpfs.size, tmpfs.mode & 0o7777);
            if destination == "/dev" { Source::Dev { size, mode } } else { Source::Tmpfs { size, mode } }
        }
    };
    let (set, clear) = options(&destination, &mount.options)?;
    let recursive_readonly = mount.recursive_readonly;
    // KEP-4639: an image volume is read-only, whatever is asked for.
    let readonly = mount.readonly || recursive_readonly || matches!(source, Source::Image { .. });
    Ok(MountStep {
        source,
        flags: Flags { set, clear, readonly, recursive_readonly },
        propagation: mount.propagation(),
        missing: Missing::Create,
        exact: false,
        idmapped: mount.idmapped,
        destination,
    })
}

fn options(destination: &str, options: &[String]) -> Result<(Attr, Attr), PlanError> {
    let (mut set, mut clear) = (NONE, NONE);
    for option in options {
        match option.as_str() {
            "nosuid" => set |= Attr::MOUNT_ATTR_NOSUID,
            "nodev" => set |= Attr::MOUNT_ATTR_NODEV,
            "noexec" => set |= Attr::MOUNT_ATTR_NOEXEC,
            // The access-time setting is one value of several bits: cleared whole before a new one is set.
            "noatime" => {
                set |= Attr::MOUNT_ATTR_NOATIME;
                clear |= Attr::MOUNT_ATTR__ATIME;
            }
            option => {
                return Err(PlanError::Option { destination: destination.into(), option: option.into() });
            }
        }
    }
    Ok((set, clear))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::sandbox::CgroupView;

    pub(in crate::container) fn spec() -> messages::StartContainer {
        messages::StartContainer {
            process: Some(messages::Process { args: vec!["sh".into()], ..Default::default() }),
            rootfs: Some(messages::Rootfs { layers: vec![0], writable: 1, ..Default::default() }),
            private_cgroup_namespace: true,
            ..Default::default()
        }
    }

    pub(in crate::container) fn pod() -> PodFacts {
        PodFacts {
            etc_hostname: true,
            etc_hosts: true,
            etc_resolv_conf: false,
            user_namespace: None,
            own_ipc: true,
            cgroups: CgroupView::new(&messages::CgroupLayout {
                unified: "/sys/fs/cgroup/unified".into(),
                unified_controllers: false,
                v1: vec![messages::CgroupV1Hierarchy {
                    mount_point: "/sys/fs/cgroup/cpu,cpuacct".into(),
                    controllers: vec!["cpu".into(), "cpuacct".into()],
                }],
            }),
        }
    }

    /// Users from 100000 and groups from 200000 on, 65536 of each.
    pub(in crate::container) fn pod_in_user_namespace() -> PodFacts {
        let map = |host| crate::sandbox::IdMap::new(0, host, 65_536).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let user = crate::sandbox::UserNamespace::new(null.into(), map(100_000), map(200_000));
        PodFacts { user_namespace: Some(std::sync::Arc::new(user)), ..pod() }
    }

    pub(in crate::container) fn slot_mount(destination: &str, slot: u32) -> messages::Mount {
        messages::Mount {
            destination: destination.into(),
            source: Some(messages::mount::Source::Slot(slot)),
            ..Default::default()
        }
    }

    fn destinations(steps: &[MountStep]) -> Vec<&str> {
        steps.iter().map(|step| step.destination.as_str()).collect()
    }

    #[test]
    fn defaults_come_first_and_each_directory_before_what_is_below_it() {
        let mut spec = spec();
        spec.mounts =
            vec![slot_mount("/dev/termination-log", 2), slot_mount("/data/inner", 3), slot_mount("/data", 4)];
        let (steps, own_dev) = order(&spec, &pod()).unwrap();
        assert!(own_dev);
        assert_eq!(
            destinations(&steps),
            [
                "/proc",
                "/dev",
                "/sys",
                "/data",
                "/dev/pts",
                "/dev/mqueue",
                "/dev/shm",
                "/etc/hostname",
                "/etc/hosts",
                "/dev/termination-log",
                "/data/inner",
                "/sys/fs/cgroup",
            ]
        );
    }

    #[test]
    fn a_request_replaces_the_default_at_its_destination() {
        let mut spec = spec();
        spec.mounts = vec![slot_mount("/etc/hosts/", 2), slot_mount("/sys/fs/cgroup", 3)];
        let (steps, _) = order(&spec, &pod()).unwrap();
        let of = |path: &str| steps.iter().filter(|step| step.destination == path).collect::<Vec<_>>();
        assert_eq!(of("/etc/hosts").len(), 1);
        assert_eq!(of("/etc/hosts")[0].source, Source::Slot(2));
        assert_eq!(of("/sys/fs/cgroup")[0].source, Source::Slot(3));
    }

    #[test]
    fn the_hosts_message_queues_keep_their_label() {
        for own_ipc in [true, false] {
            let pod = PodFacts { own_ipc, ..pod() };
            let (steps, _) = order(&spec(), &pod).unwrap();
            let queues = steps.iter().find(|step| step.destination == "/dev/mqueue").unwrap();
            assert_eq!(queues.source, Source::Mqueue { labelled: own_ipc });
        }
    }

    #[test]
    fn below_a_dev_of_the_host_nothing_is_made_and_below_a_shared_one_nothing_mounted() {
        let mut spec = spec();
        spec.mounts = vec![slot_mount("/dev", 2)];
        let (steps, own_dev) = order(&spec, &pod()).unwrap();
        assert!(!own_dev);
        let pts = steps.iter().find(|step| step.destination == "/dev/pts").unwrap();
        assert_eq!(pts.missing, Missing::Skip);
        spec.mounts[0].propagation = Propagation::Bidirectional.into();
        let (steps, _) = order(&spec, &pod()).unwrap();
        assert!(!destinations(&steps).iter().any(|path| path.starts_with("/dev/")));
    }

    #[test]
    fn read_only_and_options_become_attributes() {
        let mut spec = spec();
        spec.rootfs.as_mut().unwrap().readonly = true;
        let mut mount = slot_mount("/data", 2);
        mount.recursive_readonly = true;
        mount.options = ["nosuid", "noatime"].map(String::from).to_vec();
        spec.mounts = vec![mount];
        let (steps, _) = order(&spec, &pod()).unwrap();
        let of = |path: &str| steps.iter().find(|step| step.destination == path).unwrap();
        let flags = of("/data").flags;
        assert!(flags.readonly && flags.recursive_readonly);
        assert_eq!(flags.set, Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NOATIME);
        assert_eq!(flags.clear, Attr::MOUNT_ATTR__ATIME);
        assert!(of("/etc/hosts").flags.readonly && of("/sys").flags.readonly);
        assert!(!of("/dev/shm").flags.readonly);
        spec.mounts[0].options.push("suid=x".into());
        assert!(matches!(order(&spec, &pod()), Err(PlanError::Option { .. })));
    }

    #[test]
    fn an_image_volume_is_read_only_and_has_layers() {
        let mut spec = spec();
        let image = messages::ImageVolume { layers: vec![4, 5], sub_path: "etc".into() };
        let mount = |image| messages::Mount {
            destination: "/image".into(),
            source: Some(messages::mount::Source::Image(image)),
            ..Default::default()
        };
        spec.mounts = vec![mount(image)];
        let (steps, _) = order(&spec, &pod()).unwrap();
        let step = steps.iter().find(|step| step.destination == "/image").unwrap();
        assert!(step.flags.readonly);
        assert_eq!(step.source, Source::Image { layers: vec![4, 5], sub_path: "etc".into() });
        spec.mounts = vec![mount(messages::ImageVolume::default())];
        assert!(matches!(order(&spec, &pod()), Err(PlanError::Layers(0))));
    }

    #[test]
    fn the_root_is_no_destination_and_a_mount_needs_a_source() {
        let mut spec = spec();
        spec.mounts = vec![slot_mount("/data/..", 2)];
        assert!(matches!(order(&spec, &pod()), Err(PlanError::Path { .. })));
        spec.mounts = vec![messages::Mount { destination: "/data".into(), ..Default::default() }];
        assert!(matches!(order(&spec, &pod()), Err(PlanError::NoSource(_))));
    }

    #[test]
    fn cgroup_mounts_follow_the_machine() {
        let source = |private, layout: &messages::CgroupLayout| {
            let pod = PodFacts { cgroups: CgroupView::new(layout), ..pod() };
            let spec = messages::StartContainer { private_cgroup_namespace: private, ..spec() };
            cgroup_source(&spec, &pod)
        };
        let v2 = messages::CgroupLayout {
            unified: "/sys/fs/cgroup".into(),
            unified_controllers: true,
            v1: Vec::new(),
        };
        assert_eq!(source(true, &v2), Source::Cgroup2);
        assert_eq!(source(false, &v2), Source::Pod(layout::CGROUP));
        let Source::CgroupV1(hierarchies) = cgroup_source(&spec(), &pod()) else { panic!() };
        let named: Vec<_> = hierarchies.iter().map(|one| one.directory.as_str()).collect();
        assert_eq!(named, ["cpu,cpuacct", "unified"]);
    }
}
