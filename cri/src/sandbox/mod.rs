//! The place in which a pod runs, and how hulld speaks to it.
//!
//! A [`Launcher`] makes that place: as processes of the host ([`process`]) or, later, as a machine. Past the launch
//! there is only the [`Agent`], the same for both. What a container needs from outside the pod is named as a
//! [`Source`]; only the launcher knows what a source becomes (a descriptor, a guest's volume).

pub mod agent;
mod connection;
pub mod error;
pub mod process;
pub mod source;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use hull_agent::protocol::messages;

use crate::stats::{PodUsage, Subject};

pub use agent::{Agent, Asked, Events, Slots};
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

/// What the launcher needs from outside the pod, beside the request itself.
#[derive(Clone, Debug, Default)]
pub struct Outside {
    /// The pinned network namespace; None: the host's.
    pub network_namespace: Option<PathBuf>,
    /// Share the host's /dev/shm (host IPC).
    pub host_shm: bool,
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

/// One way to run pods.
pub trait Launcher: Debug + Send + Sync {
    /// Its name as a runtime handler.
    fn name(&self) -> &'static str;

    /// Begins a launch with what needs nothing of the pod's network, so that both can be made at the same time.
    fn begin(&self, place: &Place) -> Result<Box<dyn Nascent>, SandboxError>;

    /// Connects to the agent of a living pod.
    fn reconnect<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<(Agent, Events), SandboxError>>;

    /// Opens what a container needs, in this order of slots. Blocks for a little while.
    fn open(&self, sources: &[Source]) -> Result<Slots, SandboxError>;

    /// What the pod uses at this moment. What does not run any more has no numbers.
    fn measure(&self, place: &Place, subject: Subject) -> BoxFuture<'static, Result<PodUsage, SandboxError>>;

    /// Ends whatever is left of a pod without its agent's help: every process in the leaves, then the leaves and the
    /// levels that hull made. Blocks, for some seconds at most.
    fn clear(&self, place: &Place, leaves: &[String]) -> Result<(), SandboxError>;
}
