//! The pod's cgroup on the host, in which its VMM lives: one leaf, named by the pod's id. Where systemd owns slices, the
//! leaf is a scope of its.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_agent::cgroup::{Hierarchies, Leaf, PodCgroup};
use hull_agent::protocol::messages::Resources;

use crate::sandbox::{Place, SandboxError};
use crate::systemd::{Systemd, slice};

/// Pause between two looks at whether a VMM has ended.
const POLL: Duration = Duration::from_millis(10);

/// What the jailed process is put into.
pub(super) struct Entry {
    /// The leaf's directory in the unified hierarchy.
    pub(super) unified: Option<OwnedFd>,
    /// Its `tasks` file in each v1 hierarchy.
    pub(super) tasks: Vec<OwnedFd>,
    /// As in [`Place::cgroup_levels`].
    pub(super) created_levels: u32,
}

/// The way to cgroups.
#[derive(Debug)]
pub(super) struct Cgroups {
    hierarchies: Arc<Hierarchies>,
    systemd: Option<Arc<Systemd>>,
}

fn failed<E: ToString>(action: &'static str) -> impl Fn(E) -> SandboxError {
    move |error| SandboxError::Cgroup { action, reason: error.to_string() }
}

impl Cgroups {
    /// `systemd`: slices are its.
    pub(super) fn new(hierarchies: Hierarchies, systemd: Option<Arc<Systemd>>) -> Arc<Self> {
        Arc::new(Self { hierarchies: Arc::new(hierarchies), systemd })
    }

    fn owner(&self, place: &Place) -> Option<&Systemd> {
        self.systemd.as_deref().filter(|_| slice::is_slice(&place.cgroup_parent))
    }

    /// Makes the leaf. `first` is the VMM's first process, whose child is to live there. `limits` of the pod as a whole
    /// are set only where hull made its cgroup. Blocks.
    pub(super) fn make(
        &self,
        place: &Place,
        first: u32,
        limits: Option<&Resources>,
    ) -> Result<Entry, SandboxError> {
        let slices = match self.owner(place) {
            Some(systemd) => self.enter_slice(systemd, place, first, limits)?,
            None => 0,
        };
        let pod = PodCgroup::open(Arc::clone(&self.hierarchies), &place.cgroup_parent);
        let pod = pod.map_err(failed("make"))?;
        if let Some(limits) = limits.filter(|_| pod.is_own()) {
            pod.apply(limits).map_err(failed("set the limits of"))?;
        }
        let entry = self.entry(place)?;
        Ok(Entry { created_levels: pod.created_levels().max(slices), ..entry })
    }

    fn enter_slice(
        &self,
        systemd: &Systemd,
        place: &Place,
        first: u32,
        limits: Option<&Resources>,
    ) -> Result<u32, SandboxError> {
        let parent = &place.cgroup_parent;
        let present = PodCgroup::open_existing(Arc::clone(&self.hierarchies), parent, 0);
        let present = present.map_err(failed("look for"))?.exists();
        if !present {
            systemd.start_slice(parent, &limits.cloned().unwrap_or_default()).map_err(failed("make"))?;
        }
        systemd.take_agent(parent, &place.id, first).map_err(failed("enter"))?;
        Ok(u32::from(!present))
    }

    /// The way into the leaf, made if it is missing. Blocks.
    pub(super) fn entry(&self, place: &Place) -> Result<Entry, SandboxError> {
        let (_, leaf) = self.existing(place)?;
        leaf.create().map_err(failed("make a leaf of"))?;
        let unified = leaf.clone_fd().map(|fd| fd.try_clone_to_owned()).transpose();
        Ok(Entry {
            unified: unified.map_err(failed("open a leaf of"))?,
            tasks: leaf.task_files().map_err(failed("open a leaf of"))?,
            created_levels: 0,
        })
    }

    /// The pod's cgroup and the VMM's leaf, where they are.
    pub(super) fn existing(&self, place: &Place) -> Result<(PodCgroup, Leaf), SandboxError> {
        let hierarchies = Arc::clone(&self.hierarchies);
        let pod = PodCgroup::open_existing(hierarchies, &place.cgroup_parent, place.cgroup_levels)
            .map_err(failed("open"))?;
        let leaf = pod.leaf(&place.leaf(&place.id)).map_err(failed("name a leaf of"))?;
        Ok((pod, leaf))
    }

    /// How many of the pod's processes the kernel killed for memory; 0 if nobody knows.
    pub(super) fn oom_kills(&self, place: &Place) -> u64 {
        self.existing(place).ok().and_then(|(_, leaf)| leaf.oom_kills().ok()).unwrap_or(0)
    }

    /// Kills the VMM and the server of its volumes. Blocks for a moment.
    pub(super) fn kill(&self, place: &Place) -> Result<(), SandboxError> {
        self.existing(place)?.1.kill().map_err(failed("kill the processes of"))
    }

    /// Waits until nothing runs in the leaf any more, for so long. Blocks.
    pub(super) fn wait_for_end(&self, place: &Place, limit: Duration) {
        let begun = Instant::now();
        let runs = || {
            let leaf = self.existing(place).ok().map(|(_, leaf)| leaf);
            leaf.and_then(|leaf| leaf.processes().ok()).is_some_and(|found| !found.is_empty())
        };
        while runs() && begun.elapsed() < limit {
            std::thread::sleep(POLL);
        }
    }

    /// Kills what is left and removes the leaf and the levels that hull made. Blocks for some seconds at most.
    pub(super) fn clear(&self, place: &Place) -> Result<(), SandboxError> {
        let (pod, leaf) = self.existing(place)?;
        leaf.kill().map_err(failed("kill the processes of"))?;
        leaf.remove().map_err(failed("remove a leaf of"))?;
        match self.owner(place) {
            Some(systemd) if place.cgroup_levels > 0 => {
                systemd.stop_slice(&place.cgroup_parent).map_err(failed("remove"))
            }
            Some(_) => Ok(()),
            None => pod.remove_created().map(drop).map_err(failed("remove")),
        }
    }

    /// Sets limits of the pod as a whole, if its cgroup is hull's. Blocks.
    pub(super) fn limit(&self, place: &Place, limits: &Resources) -> Result<(), SandboxError> {
        let (pod, _) = self.existing(place)?;
        match self.owner(place) {
            Some(systemd) if place.cgroup_levels > 0 => {
                systemd.limit_slice(&place.cgroup_parent, limits).map_err(failed("set the limits of"))
            }
            None if pod.is_own() => pod.apply(limits).map_err(failed("set the limits of")),
            _ => Ok(()),
        }
    }
}
