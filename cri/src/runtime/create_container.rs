//! CreateContainer: a record, a writable directory and a plan that is known to be good; nothing runs yet.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hull_images::{Image, LayerHold, LayerId, Reference};

use super::names::Claim;
use super::objects::{Container, Pod, container_key};
use super::trace::Trace;
use super::translate::container::{self, Facts, WRITABLE};
use super::translate::{devices, mounts, profile};
use super::{Error, Result, Runtime, blocking, blocking_here, host, volumes};
use crate::api::runtime::{
    ContainerConfig, CreateContainerRequest, LinuxContainerSecurityContext, NamespaceMode, PodSandboxConfig,
};
use crate::blockio;
use crate::rdt;
use crate::sandbox::Agent;
use crate::security::apparmor::{self, AppArmorError};
use crate::security::selinux::{self, Labels};
use crate::security::{cdi, seccomp};
use crate::store::record::{ContainerPhase, ContainerRecord, ImageFacts, ImageVolume, SandboxRecord};
use crate::systemd::slice;

impl Runtime {
    /// Makes a container in a pod and returns its id. A repeated request joins the one under way, or gets the
    /// container that it made.
    pub async fn create_container(self: &Arc<Self>, request: CreateContainerRequest) -> Result<String> {
        let pod = self.objects.pod(&request.pod_sandbox_id)?;
        let config =
            request.config.ok_or_else(|| Error::Invalid("the request has no container config".into()))?;
        let pod_config = pod.with_record(|record| record.config.clone()).unwrap_or_default();
        let metadata = container::check(&config, &pod_config)?;
        match self.container_names.claim(container_key(pod.id(), &metadata), config.clone()) {
            Claim::New(reservation) => {
                let runtime = Arc::clone(self);
                let making = async move {
                    let result = runtime.make_container(&pod, config, pod_config).await;
                    reservation.complete(&result);
                    result
                };
                self.to_the_end(making).await
            }
            Claim::Joined(joined) => joined.result().await,
            Claim::Conflict => Err(Error::AlreadyExists(format!(
                "another container {} (attempt {}) is being made in the pod sandbox {} at this moment",
                metadata.name,
                metadata.attempt,
                pod.id()
            ))),
            Claim::Held(id) => self.same_container(&id, &config),
        }
    }

    /// The container that has the name already, if it is the one that is asked for and nobody has used it yet.
    fn same_container(&self, id: &str, config: &ContainerConfig) -> Result<String> {
        let container = self.objects.container(id)?;
        let same = container.with_record(|record| {
            record.config.as_ref() == Some(config) && record.phase() == ContainerPhase::Created
        });
        if same {
            return Ok(id.to_owned());
        }
        Err(Error::AlreadyExists(format!(
            "the container {id} has this name and attempt; it differs from what is asked for, or was started already"
        )))
    }

    async fn make_container(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        config: ContainerConfig,
        pod_config: PodSandboxConfig,
    ) -> Result<String> {
        let mut trace = Trace::begin("CreateContainer");
        let _order = pod.order.read().await;
        let agent = pod.ready_agent()?;
        let admitted = pod.launcher.admit_container(&config);
        admitted.map_err(Error::sandbox("cannot make the container"))?;
        let image_volumes = self.image_volumes(&config)?;
        let (image, layers) = self.image_of(&config, &image_volumes)?;
        self.check_sub_paths(&config, &image_volumes).await?;
        trace.step("look up the image");
        let id = super::run_pod_sandbox::new_id()?;
        let volumes = mounts::volumes(&image.config.volumes, &config.mounts)?;
        let log = container::log_place(&config, &pod_config);
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: pod.id().to_owned(),
            image: Some(facts_of(&image, &config)),
            config: Some(config),
            boot_id: self.boot_id.clone(),
            phase: ContainerPhase::Created.into(),
            created_at: host::now(),
            log_path: log.map(|place| place.path().to_string_lossy().into_owned()).unwrap_or_default(),
            volumes,
            image_volumes,
            ..Default::default()
        };
        let directory = self.container_directory(&id);
        // A request that cannot be planned leaves nothing behind.
        let (record, label) = {
            let node = self.node_of(pod);
            let (pod, directory) = (pod.record(), directory.clone());
            let check = move || {
                let facts = facts(&record, &pod, &node)?;
                container::plan(&record, &pod, &directory, &facts)?;
                Ok::<_, Error>((record, facts.labels.mount))
            };
            blocking_here(check).await??
        };
        self.check_target(pod, &record)?;
        trace.step("plan");

        // The record comes last: killed before it, hulld sweeps the directory as one that nobody knows; with a record,
        // a repeated request would be given a container whose volumes are half filled.
        let made = self.make_directories(pod, &directory, &record.volumes, &image, label).await;
        trace.step("make the directories");
        if let Err(error) = made.and_then(|()| Ok(self.store.containers.put(&record)?)) {
            self.discard(&id).await;
            return Err(error);
        }
        let container = Container::new(record, Arc::clone(pod), layers);
        self.objects.add_container(Arc::clone(&container));
        expect(&container, &agent);
        trace.step("write the record, tell of it");
        self.traces.keep(trace, &id);
        Ok(id)
    }

    /// What a pod's containers find on this node.
    pub(super) fn node_of(&self, pod: &Pod) -> Node {
        let hosts_kernel = !pod.launcher.has_own_kernel();
        Node {
            hosts_kernel,
            apparmor: self.apparmor && hosts_kernel,
            selinux: self.selinux.clone().filter(|_| hosts_kernel),
            cgroup_v2: self.layout.unified_controllers,
            blockio_classes: self.config.blockio.classes.clone(),
            resctrl: self.config.rdt.resctrl.clone(),
            agent_has_rdt: pod.agent_has_rdt(),
        }
    }

    /// The container's image, its layers held, with those of the images that it mounts.
    fn image_of(&self, config: &ContainerConfig, mounted: &[ImageVolume]) -> Result<(Image, LayerHold)> {
        let name = config.image.as_ref().map_or("", |image| image.image.as_str());
        if name.is_empty() {
            return Err(Error::Invalid("the container config names no image".into()));
        }
        let missing = || Error::NotFound { what: "image", id: name.to_owned() };
        let image = self.images.find(name)?.ok_or_else(missing)?;
        let written = config.image.as_ref().map_or("", |image| image.user_specified_image.as_str());
        self.accept_for_container(&image, &[name, written])?;
        let of_mounted = mounted.iter().flat_map(|volume| &volume.layers).filter_map(|id| id.parse().ok());
        let all: Vec<LayerId> = image.layers.iter().cloned().chain(of_mounted).collect();
        let layers = self.images.hold(&all);
        // Removed before its layers were held, it may have lost them.
        for id in std::iter::once(&image.id).chain(mounted.iter().map(|volume| &volume.image_id)) {
            if self.images.find(id)?.is_none() {
                return Err(Error::NotFound { what: "image", id: id.clone() });
            }
        }
        Ok((image, layers))
    }

    /// A debug container joins the processes of a container of its own pod that runs.
    fn check_target(&self, pod: &Pod, record: &ContainerRecord) -> Result<()> {
        let context = record.config.as_ref().map(container::context).unwrap_or_default();
        let Some(options) = context.namespace_options else { return Ok(()) };
        if options.pid() != NamespaceMode::Target {
            return Ok(());
        }
        match pod.container(&options.target_id).map(|target| target.phase()) {
            Some(ContainerPhase::Running) => Ok(()),
            Some(_) => Err(Error::FailedPrecondition(format!(
                "the target container {} does not run",
                options.target_id
            ))),
            None => Err(Error::Invalid(format!(
                "the target container {} is not in the pod sandbox {}",
                options.target_id,
                pod.id()
            ))),
        }
    }

    async fn make_directories(
        &self,
        pod: &Arc<Pod>,
        directory: &Path,
        volumes: &BTreeMap<String, String>,
        image: &Image,
        label: String,
    ) -> Result<()> {
        let failed = |error: std::io::Error| {
            Error::Internal(format!("cannot make the container's directory {}: {error}", directory.display()))
        };
        let make = |path: &Path, mode| fs::DirBuilder::new().mode(mode).create(path).map_err(failed);
        make(directory, 0o700)?;
        let writable = directory.join(WRITABLE);
        make(&writable, 0o700)?;
        if !image.upper_directories.is_empty() {
            let directories = image.upper_directories.clone();
            let fill = move || {
                let writable = fs::File::open(writable)?;
                hull_images::make_upper_directories(writable.as_fd(), &directories)
            };
            blocking(fill).await?.map_err(failed)?;
        }
        if volumes.is_empty() {
            return Ok(());
        }
        let (pod, directory, volumes) = (Arc::clone(pod), directory.to_owned(), volumes.clone());
        let (images, image) = (Arc::clone(&self.images), image.clone());
        let fill = move || {
            volumes::fill(&directory, &volumes, &images, &image)?;
            volumes
                .values()
                .try_for_each(|name| label_volume(&directory.join(name), &label, &|| pod.is_over()))
        };
        blocking(fill).await?
    }

    /// Takes back a container that was not made whole.
    async fn discard(&self, id: &str) {
        if let Err(error) = self.remove_tree(self.container_directory(id)).await {
            tracing::warn!(container = id, %error, "a container that was not made leaves a directory");
        }
        if let Err(error) = self.store.containers.remove(id) {
            tracing::warn!(container = id, %error, "a container that was not made leaves a record");
        }
    }
}

fn facts_of(image: &Image, config: &ContainerConfig) -> ImageFacts {
    // As people write it (`busybox`); tags are in their long form.
    let asked = config.image.as_ref().and_then(|spec| spec.user_specified_image.parse::<Reference>().ok());
    let asked = asked.map(|reference| reference.to_string()).unwrap_or_default();
    let tag = image.repo_tags.iter().find(|tag| **tag == asked).or(image.repo_tags.first());
    ImageFacts {
        id: image.id.clone(),
        layers: image.layers.iter().map(ToString::to_string).collect(),
        user: image.config.user.clone(),
        env: image.config.env.clone(),
        entrypoint: image.config.entrypoint.clone(),
        cmd: image.config.cmd.clone(),
        working_dir: image.config.working_dir.clone(),
        volumes: image.config.volumes.clone(),
        stop_signal: image.config.stop_signal.clone().unwrap_or_default(),
        repo_digest: image.repo_digests.first().cloned().unwrap_or_default(),
        repo_tag: tag.cloned().unwrap_or_default(),
    }
}

/// A directory of the container's own gets the label of what is mounted for it.
fn label_volume(path: &Path, label: &str, is_over: &dyn Fn() -> bool) -> Result<()> {
    if label.is_empty() {
        return Ok(());
    }
    let labelled = fs::File::open(path).and_then(|file| selinux::relabel(file.as_fd(), label, is_over));
    labelled.map_err(|error| Error::Internal(format!("cannot label {} for SELinux: {error}", path.display())))
}

/// What a container can be given on this node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// It runs on the host's kernel, with the host's devices.
    pub(super) hosts_kernel: bool,
    /// That kernel has AppArmor.
    pub(super) apparmor: bool,
    /// The SELinux policy of that kernel.
    pub(super) selinux: Option<Arc<selinux::Policy>>,
    /// The host has cgroup v2 with all controllers.
    pub(super) cgroup_v2: bool,
    /// The file with classes of block I/O.
    pub(super) blockio_classes: Option<PathBuf>,
    /// Where classes of cache and memory bandwidth are, if containers may have some.
    pub(super) resctrl: Option<PathBuf>,
    /// The pod's agent knows of them.
    pub(super) agent_has_rdt: bool,
}

/// What the host contributes to a container: device numbers, a compiled seccomp profile (from the cache, nearly
/// always). Blocks for a little while.
pub(super) fn facts(record: &ContainerRecord, pod: &SandboxRecord, node: &Node) -> Result<Facts> {
    let config = record.config.clone().unwrap_or_default();
    let pod_config = pod.config.clone().unwrap_or_default();
    let context = container::context(&config);
    let profile = profile::seccomp(&context)?;
    let path = profile::seccomp_path(&profile);
    let kind = match (&profile, &path) {
        (profile::Profile::RuntimeDefault, _) => seccomp::Profile::RuntimeDefault,
        (_, Some(path)) => seccomp::Profile::Localhost(path),
        (_, None) => seccomp::Profile::Unconfined,
    };
    let capabilities = container::capabilities(&context)?.bounding;
    let program = seccomp::compile(kind, capabilities).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(Facts {
        devices: devices::look_up(&config.devices, context.privileged, node.hosts_kernel)?,
        seccomp: program.as_ref().map(|program| program.bpf.clone()).unwrap_or_default(),
        seccomp_flags: program.as_ref().map_or(0, |program| program.flags),
        cdi: cdi_edits(&config, node)?,
        apparmor_profile: apparmor_profile(&context, node.apparmor)?,
        labels: labels(&context, pod, node)?,
        blockio: blockio(&config, &pod_config, node)?,
        rdt_tasks: rdt_tasks(&config, &pod_config, node)?,
    })
}

/// What CDI devices bring along: things of the host, which only a container on its kernel can use.
fn cdi_edits(config: &ContainerConfig, node: &Node) -> Result<cdi::Edits> {
    let names = cdi::names(config);
    if !node.hosts_kernel && !names.is_empty() {
        return Err(Error::Invalid(format!(
            "a pod with its own kernel cannot have the CDI device {}",
            names[0]
        )));
    }
    cdi::edits(&names, &cdi::DIRECTORIES.map(Path::new)).map_err(|error| Error::Invalid(error.to_string()))
}

/// What the container's class of block I/O comes to. The disks of a container in a machine are the machine's.
fn blockio(
    config: &ContainerConfig,
    pod: &PodSandboxConfig,
    node: &Node,
) -> Result<BTreeMap<String, String>> {
    let limits = blockio::limits(config, pod, node.blockio_classes.as_deref(), node.cgroup_v2)
        .map_err(|error| Error::Invalid(error.to_string()))?;
    if !node.hosts_kernel && !limits.is_empty() {
        return Err(Error::Invalid("a pod with its own kernel cannot have a class of block I/O".into()));
    }
    Ok(limits)
}

/// Where the container's class of cache and memory bandwidth takes processes. A machine's processors are threads of the
/// host's.
fn rdt_tasks(config: &ContainerConfig, pod: &PodSandboxConfig, node: &Node) -> Result<Option<PathBuf>> {
    let tasks = rdt::tasks(config, pod, node.resctrl.as_deref());
    let tasks = tasks.map_err(|error| Error::Invalid(error.to_string()))?;
    if !node.hosts_kernel && tasks.is_some() {
        return Err(Error::Invalid("a pod with its own kernel cannot have an RDT class".into()));
    }
    // It would start the container all the same, in no class.
    if tasks.is_some() && !node.agent_has_rdt {
        return Err(Error::FailedPrecondition(
            "the container asks for an RDT class, and its pod's agent is from before hulld's upgrade and knows none: \
             the pod has to be made anew"
                .into(),
        ));
    }
    Ok(tasks)
}

/// The container's SELinux labels, where its kernel has them.
fn labels(context: &LinuxContainerSecurityContext, pod: &SandboxRecord, node: &Node) -> Result<Labels> {
    let wanted = context.selinux_options.clone().unwrap_or_default();
    let Some(policy) = &node.selinux else {
        selinux::refuse(&wanted).map_err(Error::selinux)?;
        return Ok(Labels::default());
    };
    let of_pod = Labels { process: pod.process_label.clone(), mount: pod.mount_label.clone() };
    policy.of_container(&wanted, &of_pod, context.privileged).map_err(Error::selinux)
}

/// The AppArmor profile to enter, if the kernel has AppArmor.
fn apparmor_profile(context: &LinuxContainerSecurityContext, enabled: bool) -> Result<String> {
    apparmor::resolve(&profile::apparmor(context)?, enabled).map_err(|error| match error {
        AppArmorError::Missing(_) | AppArmorError::NotLoaded(_) => Error::Invalid(error.to_string()),
        AppArmorError::Load(_) | AppArmorError::List(_) => Error::FailedPrecondition(error.to_string()),
    })
}

/// Tells the agent of a new container, which it can prepare while the answer is on its way; unless somebody has found the
/// container and starts or removes it already: who does that has its order.
fn expect(container: &Container, agent: &Agent) {
    let Ok(_order) = container.order.try_lock() else { return };
    if container.phase() != ContainerPhase::Created || container.pod.container(container.id()).is_none() {
        return;
    }
    let place = container.pod.place();
    let leaf = slice::leaf(&place.cgroup_parent, container.id());
    container.pod.launcher.expect(agent, &place, container.id(), leaf);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(resctrl: &Path) -> Node {
        Node {
            hosts_kernel: true,
            apparmor: false,
            selinux: None,
            cgroup_v2: true,
            blockio_classes: None,
            resctrl: Some(resctrl.to_owned()),
            agent_has_rdt: true,
        }
    }

    #[test]
    fn an_agent_from_before_rdt_classes_is_not_trusted_with_one() {
        let resctrl = tempfile::tempdir().unwrap();
        for tasks in ["tasks", "gold/tasks"] {
            let path = resctrl.path().join(tasks);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let annotation = ("rdt.resources.beta.kubernetes.io/pod".to_owned(), "gold".to_owned());
        let (container, plain) = (ContainerConfig::default(), PodSandboxConfig::default());
        let pod = PodSandboxConfig { annotations: [annotation].into(), ..Default::default() };
        let current = node(resctrl.path());
        let tasks = rdt_tasks(&container, &pod, &current).unwrap();
        assert_eq!(tasks, Some(resctrl.path().join("gold/tasks")));
        // It would ignore the class, and the container would be in none
        let older = Node { agent_has_rdt: false, ..node(resctrl.path()) };
        let refused = rdt_tasks(&container, &pod, &older).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.to_string().contains("the pod has to be made anew"), "{refused}");
        // What asks for no class is not concerned
        assert_eq!(rdt_tasks(&container, &plain, &older).unwrap(), None);
        let machine = Node { hosts_kernel: false, ..node(resctrl.path()) };
        assert!(matches!(rdt_tasks(&container, &pod, &machine), Err(Error::Invalid(_))));
    }
}
