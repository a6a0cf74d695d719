//! The place in which a pod runs, and how hulld speaks to it.
//!
//! A [`Launcher`] makes that place: as processes of the host ([`process`]) or as a machine. Past the launch there is
//! only the [`Agent`], the same for both. What a container needs from outside the pod is named as a [`Source`]; only
//! the launcher knows what a source becomes (a descriptor, a range of a guest's disk, a guest's volume).

pub mod agent;
mod connection;
pub mod error;
pub mod microvm;
mod prepared;
pub mod process;
mod program;
pub mod reach;
pub mod source;
mod user_namespace;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use hull_agent::protocol::messages;
use hull_agent::sandbox::{IdMap, PodNamespaces};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::stats::disk::Occupied;
use crate::stats::{PodUsage, Subject};
use crate::systemd::slice;

pub use agent::{Agent, Asked, Events, Pipe, Slots, Streams};
pub use error::SandboxError;
pub use source::{HostTree, LogPlace, Source};

/// Where a pod lives on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sandbox's id, also the name of the agent's cgroup leaf.
    pub id: String,
    /// Volatile directory of the pod: sockets, exit records, the agent's log. Its removal ends a forgotten agent.
    pub directory: PathBuf,
    /// The pod's cgroup below each hierarchy's root.
    pub cgroup_parent: String,
    /// How many of its lowest levels hull made and removes again.
    pub cgroup_levels: u32,
}

impl Place {
    /// The name of a container's (or the agent's) own cgroup below the pod's.
    pub fn leaf(&self, id: &str) -> String {
        slice::leaf(&self.cgroup_parent, id)
    }
}

/// What the launcher needs from outside the pod, beside the request itself.
#[derive(Clone, Debug, Default)]
pub struct Outside {
    /// The pinned network namespace; None: the host's.
    pub network_namespace: Option<PathBuf>,
    /// Share the host's /dev/shm (host IPC).
    pub host_shm: bool,
    /// The pod's user namespace and those that belong to it.
    pub namespaces: Option<Arc<PodNamespaces>>,
}

/// A sandbox whose launch began: it can become one, or be dropped.
pub trait Nascent: Send {
    /// Finishes the launch. The request's slots are filled in here.
    fn create(
        self: Box<Self>,
        request: messages::CreateSandbox,
        outside: &Outside,
    ) -> BoxFuture<'_, Result<Launched, SandboxError>>;
}

/// A sandbox that is ready for containers.
#[derive(Debug)]
pub struct Launched {
    /// The way to its agent.
    pub agent: Arc<Agent>,
    /// What the agent tells by itself.
    pub events: Events,
    /// What the agent said of itself.
    pub created: messages::SandboxCreated,
}

/// Why a pod ended that nobody stopped; becomes the reason of its containers' exits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obituary {
    /// One CamelCase word.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
}

impl Obituary {
    /// For this reason, and not for want of memory.
    pub fn of(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), oom_killed: false }
    }

    /// Of an agent that is gone, nobody knows why.
    pub fn agent_lost() -> Self {
        Self::of("AgentLost", "the pod's agent ended unexpectedly")
    }
}

/// A connection to a port inside a pod. Each direction ends by itself.
pub struct Connection {
    /// What comes from the pod.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// What goes to the pod.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
}

/// The limits of a pod as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodLimits {
    /// For its cgroup: what its containers may use together, and the overhead of the sandbox itself.
    pub cgroup: messages::Resources,
    /// What its containers may use together, without the overhead.
    pub containers: messages::Resources,
}

/// One way to run pods.
pub trait Launcher: Debug + Send + Sync {
    /// What kind of sandbox it makes.
    fn name(&self) -> &'static str;

    /// Its pods have a kernel of their own: sysctls of the whole kernel are theirs, the host's devices are not.
    fn has_own_kernel(&self) -> bool {
        false
    }

    /// Why it can make no sandboxes at all.
    fn problem(&self) -> Option<String> {
        None
    }

    /// Whether there can be such a pod, found out before anything is made.
    fn admit<'a>(&'a self, _config: &'a PodSandboxConfig) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async { Ok(()) })
    }

    /// Whether there can be such a container.
    fn admit_container(&self, _config: &ContainerConfig) -> Result<(), SandboxError> {
        Ok(())
    }

    /// Begins a launch with what needs nothing of the pod's network, so that both can be made at the same time.
    fn begin(&self, place: &Place, config: &PodSandboxConfig) -> Result<Box<dyn Nascent>, SandboxError>;

    /// Makes the namespaces of a pod with a user namespace that maps these ids.
    fn user_namespace(
        &self,
        _uids: IdMap,
        _gids: IdMap,
    ) -> BoxFuture<'_, Result<PodNamespaces, SandboxError>> {
        let name = self.name();
        Box::pin(async move {
            Err(SandboxError::Source(format!("pods of the kind {name} have no user namespaces")))
        })
    }

    /// A container of the pod has been created: what can be done for its start while nobody waits for it may be begun.
    /// `cgroup_leaf` is as in the request that will start it.
    fn expect(&self, _agent: &Agent, _place: &Place, _container: &str, _cgroup_leaf: String) {}

    /// Connects to the agent of a living pod.
    fn reconnect<'a>(&'a self, place: &'a Place)
    -> BoxFuture<'a, Result<(Arc<Agent>, Events), SandboxError>>;

    /// Opens what a container needs, in this order of slots; what the launcher has to say about the request itself it
    /// writes into `start`. Called on a thread that may block, inside the runtime; what takes long asks `is_over` now and
    /// then whether the pod is ending, and gives up.
    fn open(
        &self,
        place: &Place,
        start: &mut messages::StartContainer,
        sources: &[Source],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Slots, SandboxError>;

    /// Lets a container's log be written into another file from now on.
    fn reopen_log<'a>(
        &'a self,
        place: &'a Place,
        agent: &'a Agent,
        container: &'a str,
        log: LogPlace,
    ) -> BoxFuture<'a, Result<(), SandboxError>>;

    /// A container has ended, and nobody has been told of it yet. Takes some seconds at most.
    fn ended<'a>(&'a self, _place: &'a Place, _container: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    /// Writes the writable layer of a container that was started to the pipe, as a layer of an image, however long it
    /// takes; with `pause` the container stands still meanwhile. For launchers whose containers' files are not below
    /// hull's root.
    fn archive<'a>(
        &'a self,
        _place: &'a Place,
        _container: &'a str,
        _pause: bool,
        _to: OwnedFd,
    ) -> BoxFuture<'a, Result<messages::Archived, SandboxError>> {
        Box::pin(async { Err(SandboxError::Source("the container's files are on this machine".into())) })
    }

    /// Gives up what a container had from outside; its agent has forgotten it, or is gone.
    fn forget<'a>(&'a self, place: &'a Place, container: &'a str) -> BoxFuture<'a, Result<(), SandboxError>>;

    /// Connects to a port on the pod's loopback.
    fn dial<'a>(
        &'a self,
        place: &'a Place,
        network_namespace: Option<PathBuf>,
        port: u16,
    ) -> BoxFuture<'a, io::Result<Connection>>;

    /// What the pod uses at this moment. What does not run any more has no numbers.
    fn measure(&self, place: &Place, subject: Subject) -> BoxFuture<'static, Result<PodUsage, SandboxError>>;

    /// What a container occupies on the host outside its own directory. Blocks for a little while.
    fn scratch(&self, place: &Place, container: &str) -> Occupied;

    /// Tells whoever else owns cgroups of a container that has just been started as the host's process `pid`, with the
    /// limits that it has; later with those that were changed.
    fn announce<'a>(
        &'a self,
        _place: &'a Place,
        _container: &'a str,
        _pid: Option<i32>,
        _limits: &'a messages::Resources,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async { Ok(()) })
    }

    /// Why the pod is gone, as far as anybody knows. Asked before [`Self::clear`]. Blocks for a little while.
    fn obituary(&self, place: &Place) -> Obituary;

    /// Gives the pod as a whole other limits; what they do not name stays. The pod's cgroup gets them only where hull
    /// made it (`place.cgroup_levels`): kubelet writes those of its own.
    fn resize<'a>(
        &'a self,
        place: &'a Place,
        agent: Arc<Agent>,
        limits: &'a PodLimits,
    ) -> BoxFuture<'a, Result<(), SandboxError>>;

    /// Ends whatever is left of a pod without its agent's help: every process in the leaves, then the leaves and the
    /// levels that hull made. Blocks, for some seconds at most.
    fn clear(&self, place: &Place, leaves: &[String]) -> Result<(), SandboxError>;

    /// Where a pod lives that it made and keeps a record of itself, for when hulld's own record of the pod is lost;
    /// `directory` is the pod's volatile one.
    fn remembers(&self, _id: &str, _directory: &Path) -> Option<Place> {
        None
    }

    /// Removes what it has of pods that are not among these, processes too. Blocks.
    fn sweep(&self, _pods: &BTreeSet<String>) {}
}
