//! A container: CRI's ContainerConfig and the image's configuration become the agent's StartContainer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::{self, PidMode};
use hull_images::LayerId;

use super::devices::Devices;
use super::{check_text, invalid, mounts, pod, process, resources, signal, user, user_namespace};
use crate::api::runtime::{
    ContainerConfig, ContainerMetadata, LinuxContainerSecurityContext, NamespaceMode, PodSandboxConfig,
};
use crate::runtime::Error;
use crate::sandbox::{LogPlace, Source};
use crate::security;
use crate::security::cdi::Edits;
use crate::security::selinux::Labels;
use crate::store::record::{ContainerRecord, ImageFacts, SandboxRecord};
use crate::systemd::slice;

/// Name, below the container's own directory, of the one that holds overlayfs's upper and work directories.
pub const WRITABLE: &str = "writable";

/// What the host contributes, looked up by the caller.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Devices that CRI names, or all for a privileged container.
    pub devices: Devices,
    /// The compiled seccomp filter, empty for none.
    pub seccomp: Vec<u8>,
    /// Flags for it.
    pub seccomp_flags: u32,
    /// What CDI devices bring along.
    pub cdi: Edits,
    /// The AppArmor profile to enter, empty for none.
    pub apparmor_profile: String,
    /// SELinux labels, empty for none.
    pub labels: Labels,
    /// Files of cgroup v2 that its class of block I/O comes to.
    pub blockio: BTreeMap<String, String>,
    /// The file that takes processes into its class of cache and memory bandwidth.
    pub rdt_tasks: Option<PathBuf>,
}

/// The agent's request and what its slots stand for, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The request.
    pub start: messages::StartContainer,
    /// What it brings along from outside the pod.
    pub sources: Vec<Source>,
}

/// The security context; absent means its default.
pub fn context(config: &ContainerConfig) -> LinuxContainerSecurityContext {
    config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default()
}

/// Refuses requests that no start could serve, before anything is made.
pub fn check(config: &ContainerConfig, pod: &PodSandboxConfig) -> Result<ContainerMetadata, Error> {
    let metadata = config.metadata.clone().ok_or_else(|| invalid("the container has no metadata"))?;
    if metadata.name.is_empty() {
        return Err(invalid("the container's metadata has no name"));
    }
    check_text("the container's name", &metadata.name)?;
    let context = context(config);
    if context.privileged && !pod::security(pod).privileged {
        return Err(invalid("a privileged container needs a privileged pod sandbox"));
    }
    let mapping = pod::mapping(pod)?;
    user_namespace::check_container(context.namespace_options.as_ref(), mapping.as_ref())?;
    if Path::new(&config.log_path).components().any(|part| part == std::path::Component::ParentDir) {
        return Err(invalid(format!("the log path {:?} contains \"..\"", config.log_path)));
    }
    check_text("the log path", &config.log_path)?;
    Ok(metadata)
}

/// Where the log goes: the container's path in the pod's directory; None if either says nothing.
pub fn log_place(config: &ContainerConfig, pod: &PodSandboxConfig) -> Option<LogPlace> {
    if config.log_path.is_empty() || pod.log_directory.is_empty() {
        return None;
    }
    let file = PathBuf::from(config.log_path.trim_start_matches('/'));
    Some(LogPlace { directory: PathBuf::from(&pod.log_directory), file })
}

/// Everything that starting the container needs. `directory` is the container's own below hull's root.
pub fn plan(
    container: &ContainerRecord,
    pod: &SandboxRecord,
    directory: &Path,
    facts: &Facts,
) -> Result<Plan, Error> {
    let config = container.config.clone().unwrap_or_default();
    let pod_config = pod.config.clone().unwrap_or_default();
    let image = container.image.clone().unwrap_or_default();
    let context = context(&config);
    let cri_resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    // That the signal exists is found out now, not when the container is to be stopped.
    signal::stop_signal(config.stop_signal(), &image.stop_signal)?;

    let mut sources = Vec::new();
    let rootfs = rootfs(&image, &context, directory, &mut sources)?;
    let mapping = pod::mapping(&pod_config)?;
    let own = mounts::Own {
        directory,
        volumes: &container.volumes,
        images: &container.image_volumes,
        mapping: mapping.as_ref(),
        label: &facts.labels.mount,
    };
    let asked = mounts::with_devices(&config.mounts, &facts.cdi.mounts);
    let mounts = mounts::mounts(&asked, own, &mut sources)?;
    let log = log_place(&config, &pod_config).map(|place| {
        sources.push(Source::Log(place));
        sources.len() as u32 - 1
    });
    let rdt_tasks = facts.rdt_tasks.clone().map(|tasks| {
        sources.push(Source::Tasks(tasks));
        sources.len() as u32 - 1
    });
    let (pid_mode, pid_target) = pid_mode(&context, &pod_config)?;
    let (masked_paths, readonly_paths) = hidden_paths(&context);
    let mut resources = cri_resources.map(resources::limits).transpose()?.unwrap_or_default();
    // What the container itself names goes before its class.
    for (file, value) in &facts.blockio {
        resources.unified.entry(file.clone()).or_insert_with(|| value.clone());
    }
    let start = messages::StartContainer {
        id: container.id.clone(),
        process: Some(first_process(&config, &image, &context, pod, facts)?),
        rootfs: Some(rootfs),
        no_shm: mounts::is_mounted(&asked, "/dev/shm"),
        mounts,
        pid_mode: pid_mode.into(),
        pid_target,
        // Privileged in a user namespace is privileged in its own part of the machine.
        private_cgroup_namespace: !context.privileged || mapping.is_some(),
        cgroup_leaf: slice::leaf(&pod.cgroup_parent, &container.id),
        resources: Some(resources),
        devices: facts.devices.nodes.iter().chain(&facts.cdi.devices).cloned().collect(),
        device_rules: facts.devices.rules.clone(),
        masked_paths,
        readonly_paths,
        writable_sys: context.privileged,
        writable_cgroup: context.privileged,
        log,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        mount_label: facts.labels.mount.clone(),
        rdt_tasks,
    };
    Ok(Plan { start, sources })
}

fn rootfs(
    image: &ImageFacts,
    context: &LinuxContainerSecurityContext,
    directory: &Path,
    sources: &mut Vec<Source>,
) -> Result<messages::Rootfs, Error> {
    let mut layers = Vec::with_capacity(image.layers.len());
    for layer in image.layers.iter().rev() {
        let id: LayerId =
            layer.parse().map_err(|_| Error::Internal(format!("{layer:?} in a record is not a layer")))?;
        layers.push(sources.len() as u32);
        sources.push(Source::Layer(id));
    }
    sources.push(Source::Own(directory.join(WRITABLE)));
    Ok(messages::Rootfs {
        layers,
        writable: sources.len() as u32 - 1,
        readonly: context.readonly_rootfs,
        propagation: messages::Propagation::Private.into(),
    })
}

fn first_process(
    config: &ContainerConfig,
    image: &ImageFacts,
    context: &LinuxContainerSecurityContext,
    pod: &SandboxRecord,
    facts: &Facts,
) -> Result<messages::Process, Error> {
    let capabilities = capabilities(context)?;
    let mut user = user::container_user(context, &image.user)?;
    user.supplemental_groups.extend(&facts.cdi.groups);
    let cri_resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    Ok(messages::Process {
        args: process::arguments(config, image)?,
        env: process::environment(config, image, &pod.hostname, &facts.cdi.env)?,
        cwd: process::working_directory(config, image)?,
        user: Some(user),
        cap_bounding: capabilities.bounding,
        cap_effective: capabilities.effective,
        cap_permitted: capabilities.permitted,
        cap_inheritable: capabilities.inheritable,
        cap_ambient: capabilities.ambient,
        no_new_privs: context.no_new_privs,
        seccomp: facts.seccomp.clone(),
        seccomp_flags: facts.seccomp_flags,
        apparmor_profile: facts.apparmor_profile.clone(),
        selinux_label: facts.labels.process.clone(),
        rlimits: Vec::new(),
        oom_score_adj: Some(resources::oom_score_adj(cri_resources)?),
        terminal: config.tty,
        terminal_rows: 0,
        terminal_columns: 0,
    })
}

/// The capability sets of a container's processes.
pub fn capabilities(
    context: &LinuxContainerSecurityContext,
) -> Result<security::capabilities::CapabilitySets, Error> {
    let cri = context.capabilities.clone().unwrap_or_default();
    security::capabilities::resolve(
        &cri.add_capabilities,
        &cri.drop_capabilities,
        &cri.add_ambient_capabilities,
        context.privileged,
    )
    .map_err(|error| invalid(error.to_string()))
}

/// How the container sees processes. A request without namespace options follows its pod.
fn pid_mode(
    context: &LinuxContainerSecurityContext,
    pod: &PodSandboxConfig,
) -> Result<(PidMode, String), Error> {
    let pod = pod::namespaces(pod)?.pid;
    let Some(options) = &context.namespace_options else {
        return Ok((of_pod(pod), String::new()));
    };
    Ok(match NamespaceMode::try_from(options.pid) {
        // In a pod on the node's processes POD and NODE are the same.
        Ok(NamespaceMode::Pod) if pod == NamespaceMode::Container => {
            return Err(invalid(
                "the container wants the pod's PID namespace, but the pod was made without one",
            ));
        }
        Ok(NamespaceMode::Pod) => (of_pod(pod), String::new()),
        Ok(NamespaceMode::Container) => (PidMode::PidContainer, String::new()),
        Ok(NamespaceMode::Node) => (PidMode::PidNode, String::new()),
        Ok(NamespaceMode::Target) if options.target_id.is_empty() => {
            return Err(invalid("the PID namespace mode TARGET needs a target_id"));
        }
        Ok(NamespaceMode::Target) => (PidMode::PidTarget, options.target_id.clone()),
        Err(_) => return Err(invalid(format!("{} is no PID namespace mode", options.pid))),
    })
}

fn of_pod(pod: NamespaceMode) -> PidMode {
    match pod {
        NamespaceMode::Pod => PidMode::PidPod,
        NamespaceMode::Node => PidMode::PidNode,
        NamespaceMode::Container | NamespaceMode::Target => PidMode::PidContainer,
    }
}

/// What is masked and what is read-only. protobuf cannot tell an empty list from none, and the safe reading of silence
/// is the default; only a privileged container sees everything.
fn hidden_paths(context: &LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    let readonly = || security::paths::READONLY.iter().map(|path| (*path).to_owned()).collect();
    let or = |asked: &[String], default: &dyn Fn() -> Vec<String>| {
        if asked.is_empty() { default() } else { asked.to_vec() }
    };
    (or(&context.masked_paths, &security::paths::masked), or(&context.readonly_paths, &readonly))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{
        LinuxContainerConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceOption,
    };

    fn layer(digit: &str) -> String {
        format!("sha256:{}", digit.repeat(64))
    }

    fn container(context: LinuxContainerSecurityContext) -> ContainerRecord {
        let linux = LinuxContainerConfig { security_context: Some(context), ..Default::default() };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "app".into(), attempt: 0 }),
            linux: Some(linux),
            log_path: "app/0.log".into(),
            ..Default::default()
        };
        let image = ImageFacts {
            layers: vec![layer("a"), layer("b")],
            entrypoint: vec!["/init".into()],
            ..Default::default()
        };
        ContainerRecord {
            id: "c".repeat(64),
            config: Some(config),
            image: Some(image),
            log_path: "/logs/app/0.log".into(),
            ..Default::default()
        }
    }

    fn pod(pid: NamespaceMode) -> SandboxRecord {
        let options = NamespaceOption { pid: pid.into(), ..Default::default() };
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        let config =
            PodSandboxConfig { linux: Some(linux), log_directory: "/logs".into(), ..Default::default() };
        SandboxRecord { config: Some(config), hostname: "web-0".into(), ..Default::default() }
    }

    fn planned(container: &ContainerRecord, pod: &SandboxRecord) -> Result<Plan, Error> {
        plan(container, pod, Path::new("/own"), &Facts::default())
    }

    #[test]
    fn a_container_is_planned_whole() {
        let plan =
            planned(&container(LinuxContainerSecurityContext::default()), &pod(NamespaceMode::Container))
                .unwrap();
        let layer = |digit| Source::Layer(layer(digit).parse().unwrap());
        let expected = [
            layer("b"),
            layer("a"),
            Source::Own("/own/writable".into()),
            Source::Log(LogPlace { directory: "/logs".into(), file: "app/0.log".into() }),
        ];
        assert_eq!(plan.sources, expected, "the uppermost layer comes first");
        let rootfs = plan.start.rootfs.as_ref().unwrap();
        assert_eq!((rootfs.layers.as_slice(), rootfs.writable), (&[0, 1][..], 2));
        assert_eq!(plan.start.log, Some(3));
        let process = plan.start.process.as_ref().unwrap();
        assert_eq!(process.args, ["/init"]);
        assert!(process.env.contains(&"HOSTNAME=web-0".to_owned()));
        assert_eq!(process.oom_score_adj, Some(0), "the agent's protection is not inherited");
        assert_eq!((process.cap_inheritable, process.cap_ambient), (0, 0));
        assert!(plan.start.private_cgroup_namespace);
        assert!(!plan.start.masked_paths.is_empty() && !plan.start.readonly_paths.is_empty());
    }

    #[test]
    fn processes_are_shared_as_pod_and_container_say() {
        let with = |pid: NamespaceMode| {
            let options = NamespaceOption { pid: pid.into(), target_id: "t".into(), ..Default::default() };
            container(LinuxContainerSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            })
        };
        let mode = |container: &ContainerRecord, of_pod| {
            planned(container, &pod(of_pod)).map(|plan| (plan.start.pid_mode(), plan.start.pid_target))
        };
        let own = (PidMode::PidContainer, String::new());
        assert_eq!(mode(&with(NamespaceMode::Container), NamespaceMode::Pod).unwrap(), own);
        assert_eq!(mode(&with(NamespaceMode::Pod), NamespaceMode::Pod).unwrap().0, PidMode::PidPod);
        assert_eq!(mode(&with(NamespaceMode::Pod), NamespaceMode::Node).unwrap().0, PidMode::PidNode);
        let target = (PidMode::PidTarget, "t".to_owned());
        assert_eq!(mode(&with(NamespaceMode::Target), NamespaceMode::Pod).unwrap(), target);
        assert!(mode(&with(NamespaceMode::Pod), NamespaceMode::Container).is_err());
        let silent = {
            let mut record = container(LinuxContainerSecurityContext::default());
            record.config.as_mut().unwrap().linux = None;
            record
        };
        assert_eq!(mode(&silent, NamespaceMode::Container).unwrap(), own);
    }

    #[test]
    fn a_privileged_container_hides_nothing_and_needs_a_privileged_pod() {
        let context = LinuxContainerSecurityContext { privileged: true, ..Default::default() };
        let record = container(context);
        let plan = planned(&record, &pod(NamespaceMode::Pod)).unwrap().start;
        assert!(plan.masked_paths.is_empty() && plan.readonly_paths.is_empty());
        assert!(plan.writable_sys && plan.writable_cgroup && !plan.private_cgroup_namespace);
        let config = record.config.unwrap();
        assert!(check(&config, &PodSandboxConfig::default()).is_err());
        let linux = LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext { privileged: true, ..Default::default() }),
            ..Default::default()
        };
        check(&config, &PodSandboxConfig { linux: Some(linux), ..Default::default() }).unwrap();
    }

    #[test]
    fn annotations_and_labels_give_no_powers() {
        // CRI-O CVE-2023-6476, CVE-2024-3154; containerd CVE-2026-53488 (an image's labels).
        let (mut asked, mut of_pod) =
            (container(LinuxContainerSecurityContext::default()), pod(NamespaceMode::Container));
        let plain = planned(&asked, &of_pod).unwrap();
        let words: std::collections::BTreeMap<String, String> = [
            ("io.kubernetes.cri-o.Devices", "/dev/mem:/dev/mem:rwm"),
            ("io.kubernetes.cri-o.UnifiedCgroup.app", "memory.max=max"),
            ("io.kubernetes.cri-o.userns-mode", "auto"),
            ("io.kubernetes.cri-o.ShmSize", "1Gi"),
            ("run.oci.handler", "wasm"),
            ("run.oci.hooks.stdout", "/bin/sh"),
            ("org.systemd.property.ExecStart", "/bin/sh"),
            ("seccomp.security.alpha.kubernetes.io/pod", "unconfined"),
            ("container.apparmor.security.beta.kubernetes.io/app", "unconfined"),
            ("cpu-quota.crio.io", "disable"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let config = asked.config.as_mut().unwrap();
        (config.annotations, config.labels) = (words.clone(), words.clone());
        let config = of_pod.config.as_mut().unwrap();
        (config.annotations, config.labels) = (words.clone(), words);
        assert_eq!(planned(&asked, &of_pod).unwrap(), plain);
    }

    #[test]
    fn a_shm_of_ones_own_replaces_the_pods() {
        let mut record = container(LinuxContainerSecurityContext::default());
        let shm =
            Mount { container_path: "/dev/shm/".into(), host_path: "/tmp".into(), ..Default::default() };
        record.config.as_mut().unwrap().mounts.push(shm);
        assert!(planned(&record, &pod(NamespaceMode::Pod)).unwrap().start.no_shm);
    }

    #[test]
    fn the_log_stays_in_the_pods_directory() {
        let pod = PodSandboxConfig { log_directory: "/logs".into(), ..Default::default() };
        let with = |path: &str| ContainerConfig {
            metadata: Some(ContainerMetadata { name: "a".into(), attempt: 0 }),
            log_path: path.into(),
            ..Default::default()
        };
        let path = |path: &str| log_place(&with(path), &pod).map(|place| place.path());
        assert_eq!(path("a/0.log"), Some("/logs/a/0.log".into()));
        assert_eq!(path("/a/0.log"), Some("/logs/a/0.log".into()));
        assert_eq!(path(""), None);
        assert!(check(&with("../../etc/passwd"), &pod).is_err());
    }
}
