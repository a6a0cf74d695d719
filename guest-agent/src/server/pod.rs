//! What the agent knows of its pod as a whole.

use std::os::fd::{AsFd, OwnedFd};

use crate::cgroup::PodCgroup;
use crate::sandbox::PodFacts;

/// The pod.
pub(super) struct Pod {
    pub(super) id: String,
    /// Where exit records go.
    pub(super) state_directory: OwnedFd,
    pub(super) cgroup: PodCgroup,
    /// Name of the agent's own leaf below it, which no container may have.
    pub(super) own_leaf: String,
    pub(super) facts: PodFacts,
    /// PID 1 of the pod's shared PID namespace, while it lives.
    pub(super) reaper: Option<Reaper>,
}

/// A process of the agent's own that is PID 1 for the containers.
#[derive(Debug)]
pub(super) struct Reaper {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
}

impl Pod {
    /// True if the state directory has been deleted: nobody knows this pod any more.
    pub(super) fn is_forgotten(&self) -> bool {
        rustix::fs::fstat(self.state_directory.as_fd()).is_ok_and(|stat| stat.st_nlink == 0)
    }
}
