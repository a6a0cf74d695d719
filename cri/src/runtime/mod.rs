//! The heart of hulld: pods and containers, their records, and one file for each call of CRI.

mod adopt;
mod attach;
mod container_stats;
mod container_status;
mod create_container;
pub mod error;
mod exec;
mod exec_sync;
mod exits;
pub mod get_container_events;
mod host;
mod image_policy;
mod image_volume;
mod list_container_stats;
mod list_containers;
mod list_metric_descriptors;
mod list_pod_sandbox;
mod list_pod_sandbox_metrics;
mod list_pod_sandbox_stats;
pub mod names;
pub mod objects;
mod pod_sandbox_stats;
mod pod_sandbox_status;
mod port_forward;
mod release;
mod remove_container;
mod remove_pod_sandbox;
mod reopen_container_log;
mod run_pod_sandbox;
mod runtime_config;
mod selector;
mod service;
mod start_again;
mod start_container;
mod status;
mod stop_container;
mod stop_pod_sandbox;
pub(crate) mod stream_chunks;
mod stream_container_stats;
mod stream_containers;
mod stream_pod_sandbox_metrics;
mod stream_pod_sandbox_stats;
mod stream_pod_sandboxes;
mod to_the_end;
pub(crate) mod trace;
pub mod translate;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;
mod user_namespaces;
mod version;
mod volumes;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::future::Future;
use std::os::unix::fs::DirBuilderExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hull_agent::protocol::messages::CgroupLayout;
use hull_images::policy::PolicyFile;
use hull_images::{ImageStore, StoreConfig};
use hull_network::Network;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::{Error, Result};
pub(crate) use host::now;
pub use release::ReleaseReport;
pub use service::RuntimeServer;

use self::names::Names;
use self::objects::{ContainerKey, Objects, PodKey};
use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::config::{CgroupDriver, Config, NetworkMode, SandboxKind, StreamingConfig};
use crate::sandbox::microvm::MicrovmLauncher;
use crate::sandbox::process::ProcessLauncher;
use crate::sandbox::{Launcher, SandboxError};
use crate::security::seccomp::{self, Profile};
use crate::security::{apparmor, capabilities, selinux};
use crate::store::record::ContainerPhase;
use crate::store::{Store, StoreError};
use crate::streaming::tls::Tls;
use crate::streaming::{Session, Streaming, StreamingError, TokenError};
use crate::systemd::{BusError, Systemd};
use to_the_end::ToTheEnd;

/// How long the built-in network keeps its bridge for no pod: a node that starts one pod after the other finds it there.
const BRIDGE_LINGER: Duration = Duration::from_secs(10);

/// What a RunPodSandbox asks for; two equal ones are the same operation.
type PodRequest = (PodSandboxConfig, String);

/// Why hulld cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory cannot be made or used.
    #[error("cannot use the directory {path}: {source}")]
    Directory {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The boot id cannot be read.
    #[error("cannot read the id of this boot: {0}")]
    BootId(std::io::Error),
    /// No hull-agent was found.
    #[error("the program hull-agent is in none of {0:?}; name it with agent.path in the configuration")]
    NoAgent(Vec<PathBuf>),
    /// The image store cannot be used.
    #[error("cannot open the image store: {0}")]
    Images(#[from] hull_images::StoreError),
    /// The network cannot be used.
    #[error("cannot open the network: {0}")]
    Network(#[from] hull_network::NetworkError),
    /// The records cannot be read.
    #[error("cannot read the records: {0}")]
    Store(#[from] StoreError),
    /// There are no usable cgroups.
    #[error("cannot use the cgroups: {0}")]
    Cgroup(#[from] hull_agent::cgroup::CgroupError),
    /// systemd, which is to own the cgroups, does not answer.
    #[error("cannot use the systemd cgroup driver (cgroup.driver): {0}")]
    Systemd(#[from] BusError),
    /// Streams cannot be served.
    #[error(transparent)]
    Streaming(#[from] StreamingError),
    /// Processes cannot be launched.
    #[error("cannot launch pods: {0}")]
    Launcher(#[from] SandboxError),
}

/// A running hulld, without its sockets.
pub struct Runtime {
    config: Config,
    store: Store,
    images: Arc<ImageStore>,
    /// None: all images are accepted.
    image_policy: Option<PolicyFile>,
    network: Arc<Network>,
    /// Of process pods, and of whatever else is of no known kind.
    launcher: Arc<dyn Launcher>,
    /// By runtime handler.
    launchers: BTreeMap<String, Arc<dyn Launcher>>,
    objects: Objects,
    pod_names: Names<PodKey, PodRequest>,
    container_names: Names<ContainerKey, ContainerConfig>,
    boot_id: String,
    layout: CgroupLayout,
    /// Owns cgroups below slices; None: hull owns them all.
    systemd: Option<Arc<Systemd>>,
    apparmor: bool,
    /// None: the kernel confines nobody by SELinux.
    selinux: Option<Arc<selinux::Policy>>,
    /// Why pods can have no user namespaces here.
    user_namespaces: std::result::Result<(), String>,
    started_at: i64,
    /// The turn of whoever counts what a writable layer occupies.
    counting: Semaphore,
    closing: CancellationToken,
    streaming: Arc<Streaming>,
    operations: TaskTracker,
    /// Where the time of the last starts went.
    traces: trace::Traces,
}

impl Runtime {
    /// Opens everything below the configured directories, takes up what still runs, notes what has ended, and clears
    /// away what nobody knows. Must be called inside a tokio runtime.
    pub async fn open(config: Config) -> std::result::Result<Arc<Self>, OpenError> {
        for directory in [&config.root, &config.state] {
            make_directory(directory)?;
        }
        for directory in [config.root.join("containers"), config.state.join("pods")] {
            make_directory(&directory)?;
        }
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(OpenError::BootId)?;
        let store = Store::open(&config.root.join("state"))?;
        let images = ImageStore::open(image_config(&config))?;
        let image_policy = config.image.policy.clone().map(PolicyFile::new);
        if let Some(Err(error)) = image_policy.as_ref().map(PolicyFile::current) {
            tracing::error!(%error, "no image is accepted");
        }
        let network = Network::open(network_config(&config)).await?;
        let layout = hull_agent::cgroup::discover()?;
        let program = find_agent(&config)?;
        let systemd = systemd(config.cgroup.driver, &layout).await?;
        let selinux = selinux::Policy::of_node().map(Arc::new);
        let (store_of_images, labels) = (Arc::clone(&images), selinux.is_some());
        let launcher = ProcessLauncher::new(program, &config.state, store_of_images, layout.clone(), labels)?;
        let launcher: Arc<dyn Launcher> = Arc::new(launcher.with_systemd(systemd.clone()));
        let launchers = launchers(&config, &launcher, &images, &layout, systemd.as_ref())?;
        let user_namespaces = user_namespaces::probe(&*launcher, &config.root).await;
        let closing = CancellationToken::new();
        let streaming = streaming(&config.streaming, &closing).await?;
        let runtime = Arc::new(Self {
            config,
            store,
            images,
            image_policy,
            network,
            launcher,
            launchers,
            objects: Objects::default(),
            pod_names: Names::default(),
            container_names: Names::default(),
            boot_id: boot_id.trim().to_owned(),
            layout,
            systemd,
            apparmor: host::has_apparmor(),
            selinux,
            user_namespaces,
            started_at: host::now(),
            counting: Semaphore::new(1),
            closing,
            streaming,
            operations: TaskTracker::new(),
            traces: trace::Traces::default(),
        });
        runtime.adopt_all().await?;
        runtime.thaw_all().await;
        runtime.tell_changes();
        if runtime.apparmor {
            tokio::task::spawn_blocking(|| {
                if let Err(error) = apparmor::load_default() {
                    tracing::warn!(%error, "containers that ask for AppArmor's default cannot be started");
                }
            });
        }
        // The first container should not wait for the compiler; whether this works matters only to it.
        tokio::task::spawn_blocking(|| seccomp::compile(Profile::RuntimeDefault, capabilities::DEFAULT));
        Ok(runtime)
    }

    /// Waits for operations under way and lets go of the agents; pods go on.
    pub async fn shutdown(&self) {
        self.operations.close();
        self.operations.wait().await;
        self.closing.cancel();
        for pod in self.objects.pods() {
            pod.set_agent(None);
        }
        if let Err(error) = self.network.release().await {
            tracing::warn!(%error, "what ended pods left of the network stays until hulld starts again");
        }
    }

    /// Runs an operation to its end even if its caller goes away meanwhile.
    async fn to_the_end<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let result = ToTheEnd::new(&self.operations, operation).await;
        result.unwrap_or_else(|panic| Err(broken_off(panic)))
    }

    /// The container with this id, if it runs.
    fn running_container(&self, id: &str) -> Result<Arc<objects::Container>> {
        let container = self.objects.container(id)?;
        match container.phase() {
            ContainerPhase::Running => Ok(container),
            _ => Err(Error::FailedPrecondition(format!("the container {} does not run", container.id()))),
        }
    }

    /// The URL of a stream.
    fn stream(&self, session: Session) -> Result<String> {
        self.streaming.url(session).map_err(|error| match error {
            TokenError::TooMany => Error::ResourceExhausted(error.to_string()),
            TokenError::Random(_) => Error::Internal(error.to_string()),
        })
    }

    /// The certificate (DER) of the server for streams; empty without TLS.
    pub(crate) async fn streaming_certificate(&self) -> Vec<u8> {
        self.streaming.certificate().await
    }

    /// The images.
    pub(crate) fn images(&self) -> &Arc<ImageStore> {
        &self.images
    }

    /// Pods and containers.
    pub(crate) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The network.
    pub(crate) fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Where the time of the last starts went.
    pub(crate) fn traces(&self) -> &trace::Traces {
        &self.traces
    }

    /// The configuration.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Where the cgroup hierarchies are.
    pub(crate) fn layout(&self) -> &CgroupLayout {
        &self.layout
    }

    /// Nanoseconds since 1970.
    pub(crate) fn started_at(&self) -> i64 {
        self.started_at
    }

    /// The directory of a pod below the state directory.
    fn pod_directory(&self, id: &str) -> PathBuf {
        self.config.state.join("pods").join(id)
    }

    /// The directory of a container below the root directory.
    pub(crate) fn container_directory(&self, id: &str) -> PathBuf {
        self.config.root.join("containers").join(id)
    }

    /// The launcher of a runtime handler.
    fn launcher(&self, handler: &str) -> Result<Arc<dyn Launcher>> {
        let found = self.config.handler(handler).and_then(|(name, _)| self.launchers.get(name));
        match found {
            Some(launcher) => Ok(Arc::clone(launcher)),
            None => {
                let known: Vec<_> = self.config.runtimes.handlers.keys().collect();
                Err(Error::Invalid(format!("there is no runtime handler {handler:?}; there are {known:?}")))
            }
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Work for a thread that may wait: files, mounts, cgroups.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("an operation broke off: {error}")))
}

/// What the client is told of an operation that panicked.
fn broken_off(panic: Box<dyn Any + Send>) -> Error {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Error::Internal(format!("an operation broke off: {}", text.unwrap_or("it panicked")))
}

/// The same for work that takes less time than two changes of threads. Other requests go on meanwhile: another thread takes
/// over what this one would have done. Nothing that may wait for long: there are no more threads than for [`blocking`], and
/// when the last one waits here nobody runs any requests.
pub(crate) async fn blocking_here<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match tokio::runtime::Handle::current().runtime_flavor() {
        tokio::runtime::RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(|| std::panic::catch_unwind(AssertUnwindSafe(work)))
                .map_err(broken_off)
        }
        _ => blocking(work).await,
    }
}

/// A directory that only root may look into (containerd CVE-2024-25621).
fn make_directory(path: &Path) -> std::result::Result<(), OpenError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| OpenError::Directory { path: path.to_owned(), source })
}

fn image_config(config: &Config) -> StoreConfig {
    StoreConfig {
        hosts_dir: config.registry.hosts_dir.clone(),
        max_parallel_layers: config.registry.max_parallel_layers,
        max_parallel_downloads: config.registry.max_parallel_downloads,
        progress_timeout: config.registry.progress_timeout,
        // The configuration has been checked.
        pinned: config.image.pinned.iter().filter_map(|pattern| pattern.parse().ok()).collect(),
        keep_blobs: config.image.keep_blobs,
        ..StoreConfig::new(&config.root, &config.state)
    }
}

fn network_config(config: &Config) -> hull_network::NetworkConfig {
    let network = &config.network;
    hull_network::NetworkConfig {
        mode: match network.mode {
            NetworkMode::Auto => hull_network::Mode::Auto,
            NetworkMode::Builtin => hull_network::Mode::Builtin,
            NetworkMode::Cni => hull_network::Mode::Cni,
        },
        state: config.state.clone(),
        data: config.root.join("network"),
        netns_dir: network.netns_dir.clone(),
        bridge: network.bridge.clone(),
        subnets: network.subnets.clone(),
        mtu: network.mtu,
        linger: BRIDGE_LINGER,
        cni_conf_dir: network.cni_conf_dir.clone(),
        cni_bin_dirs: network.cni_bin_dirs.clone(),
    }
}

/// The server for streams, with TLS if it has a certificate.
async fn streaming(
    config: &StreamingConfig,
    closing: &CancellationToken,
) -> std::result::Result<Arc<Streaming>, StreamingError> {
    let tls = match (&config.certificate, &config.key) {
        (Some(certificate), Some(key)) => Some(Tls::open(certificate, key)?),
        _ => None,
    };
    Streaming::open(config.address, tls, closing.clone()).await
}

/// The way to systemd, if it is to own cgroups.
async fn systemd(
    driver: CgroupDriver,
    layout: &CgroupLayout,
) -> std::result::Result<Option<Arc<Systemd>>, BusError> {
    let v2 = layout.unified_controllers;
    let connect = || tokio::task::spawn_blocking(move || Systemd::connect(v2));
    let connected = match driver {
        CgroupDriver::Cgroupfs => return Ok(None),
        CgroupDriver::Auto if !Systemd::is_init() => return Ok(None),
        CgroupDriver::Auto | CgroupDriver::Systemd => connect().await,
    };
    match connected.unwrap_or_else(|error| Err(std::io::Error::other(error).into())) {
        Ok(systemd) => Ok(Some(Arc::new(systemd))),
        Err(error) if driver == CgroupDriver::Auto => {
            tracing::warn!(%error, "cgroups are hull's own, although systemd is this machine's init");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The program for pods: as configured, or beside hulld, or named by HULL_AGENT, or where packages put it.
fn find_agent(config: &Config) -> std::result::Result<PathBuf, OpenError> {
    let mut places = Vec::new();
    match &config.agent.path {
        Some(path) => places.push(path.clone()),
        None => {
            let beside =
                std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join("hull-agent")));
            places.extend(beside);
            places.extend(std::env::var_os("HULL_AGENT").map(PathBuf::from));
            places.push("/usr/libexec/hull/hull-agent".into());
        }
    }
    places.iter().find(|path| path.is_file()).cloned().ok_or(OpenError::NoAgent(places))
}

/// A launcher for each runtime handler; those of process pods are all the same.
fn launchers(
    config: &Config,
    process: &Arc<dyn Launcher>,
    images: &Arc<ImageStore>,
    layout: &CgroupLayout,
    systemd: Option<&Arc<Systemd>>,
) -> std::result::Result<BTreeMap<String, Arc<dyn Launcher>>, OpenError> {
    let ids = Arc::default();
    let mut launchers = BTreeMap::new();
    for (name, handler) in &config.runtimes.handlers {
        let launcher: Arc<dyn Launcher> = match handler.kind {
            SandboxKind::Process => Arc::clone(process),
            SandboxKind::Microvm => Arc::new(MicrovmLauncher::new(
                handler.machine.clone().unwrap_or_default(),
                &config.root,
                Arc::clone(&ids),
                Arc::clone(images),
                layout,
                systemd.cloned(),
            )?),
        };
        launchers.insert(name.clone(), launcher);
    }
    Ok(launchers)
}
