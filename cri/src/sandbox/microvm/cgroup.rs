//! The pod's cgroup on the host, in which its VMM lives: one leaf, named by the pod's id.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_agent::cgroup::{Hierarchies, Leaf, PodCgroup};
use hull_agent::protocol::messages::Resources;

use crate::sandbox::{Place, SandboxError};

/// What the jailed process is put into.
pub(super) struct Entry {
    /// The leaf's directory in the unified hierarchy.
    pub(super) unified: Option<OwnedFd>,
    /// Its `tasks` file in each v1 hierarchy.
    pub(super) tasks: Vec<OwnedFd>,
    /// As in [`Place::cgroup_levels`].
    pub(super) created_levels: u32,
}

fn failed<E: ToString>(action: &'static str) -> impl Fn(E) -> SandboxError {
    move |error| SandboxError::Cgroup { action, reason: error.to_string() }
}

/// Makes the leaf. `limits` of the pod as a whole are set only where hull made its cgroup. Blocks.
pub(super) fn make(
    hierarchies: &Arc<Hierarchies>,
    place: &Place,
    limits: Option<&Resources>,
) -> Result<Entry, SandboxError> {
    let pod = PodCgroup::open(Arc::clone(hierarchies), &place.cgroup_parent).map_err(failed("make"))?;
    if let Some(limits) = limits.filter(|_| pod.is_own()) {
        pod.apply(limits).map_err(failed("set the limits of"))?;
    }
    let leaf = pod.leaf(&place.id).map_err(failed("name a leaf of"))?;
    leaf.create().map_err(failed("make a leaf of"))?;
    let unified = leaf.clone_fd().map(|fd| fd.try_clone_to_owned()).transpose();
    Ok(Entry {
        unified: unified.map_err(failed("open a leaf of"))?,
        tasks: leaf.task_files().map_err(failed("open a leaf of"))?,
        created_levels: pod.created_levels(),
    })
}

/// The pod's cgroup and the VMM's leaf, where they are.
pub(super) fn existing(
    hierarchies: &Arc<Hierarchies>,
    place: &Place,
) -> Result<(PodCgroup, Leaf), SandboxError> {
    let hierarchies = Arc::clone(hierarchies);
    let pod = PodCgroup::open_existing(hierarchies, &place.cgroup_parent, place.cgroup_levels)
        .map_err(failed("open"))?;
    let leaf = pod.leaf(&place.id).map_err(failed("name a leaf of"))?;
    Ok((pod, leaf))
}

/// Kills the VMM and the server of its volumes. Blocks for a moment.
pub(super) fn kill(hierarchies: &Arc<Hierarchies>, place: &Place) -> Result<(), SandboxError> {
    existing(hierarchies, place)?.1.kill().map_err(failed("kill the processes of"))
}

/// Kills what is left and removes the leaf and the levels that hull made. Blocks for some seconds at most.
pub(super) fn clear(hierarchies: &Arc<Hierarchies>, place: &Place) -> Result<(), SandboxError> {
    let (pod, leaf) = existing(hierarchies, place)?;
    leaf.kill().map_err(failed("kill the processes of"))?;
    leaf.remove().map_err(failed("remove a leaf of"))?;
    pod.remove_created().map_err(failed("remove"))?;
    Ok(())
}

/// Sets limits of the pod as a whole, if its cgroup is hull's. Blocks.
pub(super) fn limit(
    hierarchies: &Arc<Hierarchies>,
    place: &Place,
    limits: &Resources,
) -> Result<(), SandboxError> {
    let (pod, _) = existing(hierarchies, place)?;
    if pod.is_own() { pod.apply(limits).map_err(failed("set the limits of")) } else { Ok(()) }
}
