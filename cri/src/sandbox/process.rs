//! Pods as processes of the host: one agent for each, started here, that outlives hulld.

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hull_agent::cgroup::{Hierarchies, PodCgroup};
use hull_agent::protocol::messages::{self, request, response};
use hull_agent::sandbox::{IdMap, PodNamespaces};
use hull_images::ImageStore;

use super::prepared::{self, Prepared};
use super::program::Program;
use super::source::{clone_tree, open_host_tree, open_log, open_own, open_tasks};
use super::{
    Agent, Connection, Events, Launched, Launcher, LogPlace, Nascent, Obituary, Outside, Place, PodLimits,
    SandboxError, Slots, Source, user_namespace,
};
use crate::api::runtime::PodSandboxConfig;
use crate::stats::disk::Occupied;
use crate::stats::{self, PodUsage, Subject};
use crate::systemd::{Systemd, slice};

/// The agent's listening socket in the pod's directory.
const SOCKET: &str = "agent.sock";
/// What the agent writes to stderr.
const LOG: &str = "agent.log";
/// How long a pod may take to come up; some sysctls and a loaded machine take their time, nothing takes this long.
const BIRTH: Duration = Duration::from_secs(30);
/// How long a connection inside the pod may take to come about.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Runs pods as processes of the host.
pub struct ProcessLauncher {
    program: PathBuf,
    prepared: Arc<Prepared>,
    images: Arc<ImageStore>,
    layout: messages::CgroupLayout,
    hierarchies: Arc<Hierarchies>,
    systemd: Option<Arc<Systemd>>,
}

impl ProcessLauncher {
    /// `program` is hull-agent; `state` is the directory in which pods have theirs; `layout` says where the cgroup
    /// hierarchies are; `labels`: pods have SELinux labels. Must be called inside the runtime.
    pub fn new(
        program: PathBuf,
        state: &Path,
        images: Arc<ImageStore>,
        layout: messages::CgroupLayout,
        labels: bool,
    ) -> Result<Self, SandboxError> {
        let hierarchies = Hierarchies::open(&layout).map_err(cgroup("open the hierarchies of"))?;
        let prepared = Prepared::new(&program, state, Some(&layout).filter(|_| !labels));
        Ok(Self { program, prepared, images, layout, hierarchies: Arc::new(hierarchies), systemd: None })
    }

    /// Slices are systemd's.
    pub fn with_systemd(self, systemd: Option<Arc<Systemd>>) -> Self {
        Self { systemd, ..self }
    }

    /// systemd, if it owns the pod's cgroup.
    fn owner(&self, cgroup_parent: &str) -> Option<Arc<Systemd>> {
        self.systemd.clone().filter(|_| slice::is_slice(cgroup_parent))
    }

    /// A running program for the pod's agent.
    fn spawn(&self, place: &Place) -> Result<Program, SandboxError> {
        let directory = &place.directory;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(SandboxError::host("make the pod's directory", directory))?;
        let log = directory.join(LOG);
        if let Some(program) = self.prepared.take(&log) {
            return Ok(program);
        }
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log)
            .map_err(SandboxError::host("open the agent's log", &log))?;
        prepared::start(&self.program, log)
            .map_err(|source| SandboxError::Spawn { program: self.program.clone(), source })
    }
}

impl fmt::Debug for ProcessLauncher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessLauncher").field("program", &self.program).finish_non_exhaustive()
    }
}

fn cgroup<E: ToString>(action: &'static str) -> impl Fn(E) -> SandboxError {
    move |error| SandboxError::Cgroup { action, reason: error.to_string() }
}

/// Unix socket addresses hold 107 bytes; through the directory's descriptor any directory is short enough.
fn short(directory: &fs::File) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(SOCKET)
}

impl Launcher for ProcessLauncher {
    fn name(&self) -> &'static str {
        "process"
    }

    fn begin(&self, place: &Place, _config: &PodSandboxConfig) -> Result<Box<dyn Nascent>, SandboxError> {
        let Program { socket, pid } = self.spawn(place)?;
        let owner = self.owner(&place.cgroup_parent);
        let (hierarchies, layout) = (Arc::clone(&self.hierarchies), self.layout.clone());
        Ok(Box::new(Newborn { socket, pid, place: place.clone(), layout, hierarchies, owner }))
    }

    fn user_namespace(&self, uids: IdMap, gids: IdMap) -> BoxFuture<'_, Result<PodNamespaces, SandboxError>> {
        Box::pin(user_namespace::make(&self.program, uids, gids))
    }

    fn expect(&self, agent: &Agent, place: &Place, container: &str, cgroup_leaf: String) {
        // systemd makes those that it owns.
        if self.owner(&place.cgroup_parent).is_some() {
            return;
        }
        let call = messages::PrepareContainer { container_id: container.to_owned(), cgroup_leaf };
        // Nobody waits for the answer: what could not be made now is made, or told of, when the container starts.
        if let Err(error) = agent.ask(request::Call::PrepareContainer(call), Slots::default()) {
            tracing::debug!(container, %error, "the pod's agent does not hear of a new container");
        }
    }

    fn reconnect<'a>(
        &'a self,
        place: &'a Place,
    ) -> BoxFuture<'a, Result<(Arc<Agent>, Events), SandboxError>> {
        Box::pin(async move {
            let gone = |error: io::Error| SandboxError::Lost(error.to_string());
            let directory = fs::File::open(&place.directory).map_err(gone)?;
            // Connecting waits while the agent's backlog is full; it is a few connections long and nobody else's.
            let stream = tokio::net::UnixStream::connect(short(&directory)).await.map_err(gone)?;
            let (agent, events) = Agent::connect(stream.into_std().map_err(gone)?)?;
            Ok((Arc::new(agent), events))
        })
    }

    fn open(
        &self,
        _place: &Place,
        _start: &mut messages::StartContainer,
        sources: &[Source],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Slots, SandboxError> {
        let layers: Vec<_> = sources
            .iter()
            .filter_map(|source| match source {
                Source::Layer(id) => Some(id.clone()),
                _ => None,
            })
            .collect();
        let trees =
            self.images.layer_trees(&layers).map_err(|error| SandboxError::Layers(error.to_string()))?;
        let mut trees = trees.into_iter();
        let mut slots = Slots::default();
        for source in sources {
            let fd = match source {
                Source::Layer(id) => trees.next().ok_or_else(|| {
                    SandboxError::Layers(format!("the image store gave no tree for layer {id}"))
                })?,
                Source::Tree(tree) => open_host_tree(tree, is_over)?,
                Source::Own(path) => open_own(path)?,
                Source::Log(place) => open_log(place)?,
                Source::Tasks(path) => open_tasks(path)?,
            };
            slots.descriptor(fd);
        }
        Ok(slots)
    }

    fn reopen_log<'a>(
        &'a self,
        _place: &'a Place,
        agent: &'a Agent,
        container: &'a str,
        log: LogPlace,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async move {
            let opening = tokio::task::spawn_blocking(move || open_log(&log));
            let file = opening.await.map_err(|error| SandboxError::Source(error.to_string()))??;
            let mut slots = Slots::default();
            let log = slots.descriptor(file);
            let call = messages::SetLog { container_id: container.to_owned(), log };
            agent.order("reopen a log", request::Call::SetLog(call), slots).await
        })
    }

    fn forget<'a>(&'a self, _: &'a Place, _: &'a str) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async { Ok(()) })
    }

    fn dial<'a>(
        &'a self,
        _place: &'a Place,
        network_namespace: Option<PathBuf>,
        port: u16,
    ) -> BoxFuture<'a, io::Result<Connection>> {
        Box::pin(async move {
            let connecting = tokio::task::spawn_blocking(move || match network_namespace {
                None => connect_to(port),
                Some(path) => {
                    hull_sys::namespace::on_thread_in(&[fs::File::open(path)?.as_fd()], || connect_to(port))?
                }
            });
            let socket = connecting.await.map_err(io::Error::other)??;
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let (reader, writer) = tokio::net::TcpStream::from_std(socket)?.into_split();
            Ok(Connection { reader: Box::new(reader), writer: Box::new(writer) })
        })
    }

    fn scratch(&self, _place: &Place, _container: &str) -> Occupied {
        Occupied { complete: true, ..Occupied::default() }
    }

    fn obituary(&self, _place: &Place) -> Obituary {
        Obituary::agent_lost()
    }

    fn measure(&self, place: &Place, subject: Subject) -> BoxFuture<'static, Result<PodUsage, SandboxError>> {
        let (hierarchies, place) = (Arc::clone(&self.hierarchies), place.clone());
        let work = move || stats::host::measure(&hierarchies, &place, &subject).map_err(cgroup("measure"));
        Box::pin(async move {
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(cgroup("measure")(error)))
        })
    }

    fn resize<'a>(
        &'a self,
        place: &'a Place,
        _agent: Arc<Agent>,
        limits: &'a PodLimits,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        let (hierarchies, place, limits) =
            (Arc::clone(&self.hierarchies), place.clone(), limits.cgroup.clone());
        let owner = self.owner(&place.cgroup_parent);
        let work = move || {
            let pod = PodCgroup::open_existing(hierarchies, &place.cgroup_parent, place.cgroup_levels)
                .map_err(cgroup("open"))?;
            match owner {
                Some(systemd) if place.cgroup_levels > 0 => {
                    systemd.limit_slice(&place.cgroup_parent, &limits).map_err(cgroup("set the limits of"))
                }
                None if pod.is_own() => pod.apply(&limits).map_err(cgroup("set the limits of")),
                _ => Ok(()),
            }
        };
        Box::pin(async move {
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(cgroup("resize")(error)))
        })
    }

    fn announce<'a>(
        &'a self,
        place: &'a Place,
        container: &'a str,
        pid: Option<i32>,
        limits: &'a messages::Resources,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        let Some(systemd) = self.owner(&place.cgroup_parent) else { return Box::pin(async { Ok(()) }) };
        let (parent, container) = (place.cgroup_parent.clone(), container.to_owned());
        let limits = limits.clone();
        let work = move || match pid {
            Some(pid) => systemd.take_container(&parent, &container, pid.unsigned_abs(), &limits),
            None => systemd.limit_container(&parent, &container, &limits),
        };
        Box::pin(async move {
            let told = tokio::task::spawn_blocking(work).await.map_err(cgroup("announce"))?;
            told.map_err(cgroup("announce"))
        })
    }

    fn clear(&self, place: &Place, leaves: &[String]) -> Result<(), SandboxError> {
        let pod = PodCgroup::open_existing(
            Arc::clone(&self.hierarchies),
            &place.cgroup_parent,
            place.cgroup_levels,
        )
        .map_err(cgroup("open"))?;
        let leaves: Vec<_> = std::iter::once(&place.id)
            .chain(leaves)
            .map(|name| pod.leaf(&place.leaf(name)).map_err(cgroup("name a leaf of")))
            .collect::<Result<_, _>>()?;
        // All are killed before the first is waited for.
        for leaf in &leaves {
            leaf.kill().map_err(cgroup("kill the processes of"))?;
        }
        for leaf in &leaves {
            leaf.remove().map_err(cgroup("remove a leaf of"))?;
        }
        match self.owner(&place.cgroup_parent) {
            Some(systemd) if place.cgroup_levels > 0 => {
                systemd.stop_slice(&place.cgroup_parent).map_err(cgroup("remove"))
            }
            Some(_) => Ok(()),
            None => {
                let is_gone = pod.remove_created().map_err(cgroup("remove"))?;
                // A pod whose record was torn may have containers that nobody knows. One that hull named is no other's.
                let is_its_alone = place.cgroup_parent.rsplit('/').next() == Some(&place.id);
                if !is_gone && is_its_alone {
                    pod.end_all_below().map_err(cgroup("end what is left in"))?;
                    pod.remove_created().map_err(cgroup("remove"))?;
                }
                Ok(())
            }
        }
    }
}

/// To the loopback of the calling thread's network namespace, as kubectl promises: IPv4 first.
fn connect_to(port: u16) -> io::Result<TcpStream> {
    let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&four, CONNECT_TIME).or_else(|error| {
        let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        TcpStream::connect_timeout(&six, CONNECT_TIME).map_err(|_| error)
    })
}

/// An agent's program, started, that does not know yet which pod it is for. Dropped, it ends by itself.
struct Newborn {
    socket: UnixStream,
    pid: u32,
    place: Place,
    layout: messages::CgroupLayout,
    hierarchies: Arc<Hierarchies>,
    /// systemd, if it owns the pod's cgroup.
    owner: Option<Arc<Systemd>>,
}

impl Nascent for Newborn {
    fn create(
        self: Box<Self>,
        request: messages::CreateSandbox,
        outside: &Outside,
    ) -> BoxFuture<'_, Result<Launched, SandboxError>> {
        Box::pin(self.introduce(request, outside))
    }
}

impl Newborn {
    async fn introduce(
        self: Box<Self>,
        mut request: messages::CreateSandbox,
        outside: &Outside,
    ) -> Result<Launched, SandboxError> {
        let Self { socket, pid, place, layout, hierarchies, owner } = *self;
        // Of a scope systemd knows which process is in it.
        request.cgroup_leaf_in_v1 = owner.is_some();
        let slices = match owner {
            Some(systemd) => {
                enter_slice(systemd, hierarchies, &place, pid, request.pod_resources.take()).await?
            }
            None => 0,
        };
        let mut slots = Slots::default();
        let path = &place.directory;
        let directory = fs::File::open(path).map_err(SandboxError::host("open", path))?;
        let listener = UnixListener::bind(short(&directory))
            .map_err(SandboxError::host("listen on the agent's socket in", path))?;
        request.listener = slots.descriptor(listener);
        request.state_directory = slots.descriptor(directory);
        if let Some(path) = &outside.network_namespace {
            let namespace =
                fs::File::open(path).map_err(SandboxError::host("open the pod's network namespace", path))?;
            request.network_namespace = Some(slots.descriptor(namespace));
        }
        if outside.host_shm {
            let path = Path::new("/dev/shm");
            let tree = clone_tree(path).map_err(SandboxError::host("open", path))?;
            request.shm_source = Some(slots.descriptor(tree));
        }
        if let Some(namespaces) = &outside.namespaces {
            user_namespace::give(namespaces, &mut request, &mut slots)?;
        }
        request.cgroups = Some(layout);
        request.cgroup_parent = place.cgroup_parent.clone();
        request.cgroup_leaf = place.leaf(&place.id);
        let (agent, events) = Agent::connect(socket)?;
        let call = request::Call::CreateSandbox(request);
        let answer = agent.call_within(BIRTH, "make the pod", call, slots).await;
        match answer.map_err(|error| with_log(error, path))? {
            response::Outcome::SandboxCreated(mut created) => {
                created.cgroup_created_levels = created.cgroup_created_levels.max(slices);
                Ok(Launched { agent: Arc::new(agent), events, created })
            }
            _ => Err(SandboxError::Unexpected("the making of the pod")),
        }
    }
}

/// Makes the pod's slice, if nobody has, and takes the agent's program into a scope below it. How many slices were made.
async fn enter_slice(
    systemd: Arc<Systemd>,
    hierarchies: Arc<Hierarchies>,
    place: &Place,
    pid: u32,
    limits: Option<messages::Resources>,
) -> Result<u32, SandboxError> {
    let place = place.clone();
    let work = move || {
        let parent = &place.cgroup_parent;
        let present = PodCgroup::open_existing(hierarchies, parent, 0).map_err(cgroup("look for"))?.exists();
        if !present {
            systemd.start_slice(parent, &limits.unwrap_or_default()).map_err(cgroup("make"))?;
        }
        systemd.take_agent(parent, &place.id, pid).map_err(cgroup("enter"))?;
        Ok(u32::from(!present))
    };
    tokio::task::spawn_blocking(work).await.map_err(cgroup("enter"))?
}

/// What the agent wrote before it died is the best explanation there is.
fn with_log(error: SandboxError, directory: &Path) -> SandboxError {
    let SandboxError::Lost(reason) = error else { return error };
    let log = fs::read(directory.join(LOG)).unwrap_or_default();
    let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(2048)..]).trim().to_owned();
    SandboxError::Lost(if tail.is_empty() { reason } else { format!("{reason}; it wrote: {tail}") })
}
