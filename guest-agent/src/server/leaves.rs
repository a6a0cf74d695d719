//! Cgroups of containers that have been created and not been started yet: made while nobody waits for them.

use super::Server;
use super::failure::CallError;
use super::report;
use crate::cgroup::Leaf;
use crate::protocol::is_valid_id;
use crate::protocol::messages::PrepareContainer;

/// How many wait at most; whoever creates more has their cgroups made when they start.
const MOST: usize = 16;
/// With no more containers than these, descriptors are kept for speed alone: a dozen for each on cgroup v1.
pub(super) const KEPT_OPEN: usize = 16;

/// The cgroup of a container that is expected to start.
#[derive(Debug)]
pub(super) struct Expected {
    container: String,
    leaf: Leaf,
}

impl Server {
    /// Makes the cgroup in which a container will start. That it cannot be made is told when it starts.
    pub(super) fn prepare_container(&mut self, call: &PrepareContainer) -> Result<(), CallError> {
        if !is_valid_id(&call.container_id) {
            return Err(CallError::invalid("cannot prepare the container: its id is none"));
        }
        let taken = call.cgroup_leaf == self.pod.own_leaf
            || self.containers.iter().any(|container| container.leaf_name == call.cgroup_leaf)
            || self.expected.iter().any(|expected| expected.container == call.container_id);
        if taken || self.stopping.is_some() || self.expected.len() >= MOST {
            return Ok(());
        }
        let leaf = self.pod.cgroup.leaf(&call.cgroup_leaf)?;
        leaf.create_aside()?;
        if self.containers.len() < KEPT_OPEN {
            leaf.keep_open();
        }
        self.expected.push(Expected { container: call.container_id.clone(), leaf });
        Ok(())
    }

    /// The cgroup of that name that has been made for a container; from now on it is the caller's. One of another name
    /// stays until it is forgotten.
    pub(super) fn take_expected(&mut self, container: &str, leaf_name: &str) -> Option<Leaf> {
        let is_it =
            |expected: &Expected| expected.container == container && expected.leaf.name() == Some(leaf_name);
        let index = self.expected.iter().position(is_it)?;
        Some(self.expected.swap_remove(index).leaf)
    }

    /// The container will not start.
    pub(super) fn forget_expected(&mut self, container: &str) -> Result<(), CallError> {
        let Some(index) = self.expected.iter().position(|expected| expected.container == container) else {
            return Ok(());
        };
        self.expected[index].leaf.remove()?;
        self.expected.swap_remove(index);
        Ok(())
    }

    /// No container will start.
    pub(super) fn forget_all_expected(&mut self) {
        for Expected { container, leaf } in self.expected.drain(..) {
            if let Err(error) = leaf.remove() {
                report::line(format_args!("cannot remove the cgroup of container {container}: {error}"));
            }
        }
    }
}
