//! A container stands still while its files are read.

use std::sync::Arc;

use hull_agent::cgroup::{CgroupError, Hierarchies, Leaf, PodCgroup};

use crate::runtime::objects::Container;
use crate::runtime::{Error, Result, Runtime, blocking};
use crate::store::record::ContainerPhase;

/// A frozen container; dropping it lets the container go on.
pub(super) struct Paused(Leaf);

impl Drop for Paused {
    fn drop(&mut self) {
        if let Err(error) = self.0.thaw() {
            tracing::error!(%error, "cannot let a container go on that was paused; the next start of hulld will");
        }
    }
}

impl Runtime {
    /// Pauses the container if it runs. Blocking.
    pub(super) fn pause(&self, container: &Container) -> Result<Option<Paused>> {
        if container.phase() != ContainerPhase::Running {
            return Ok(None);
        }
        let failed = |error: CgroupError| Error::Internal(format!("cannot pause the container: {error}"));
        let leaf = self.leaf_of(container).map_err(failed)?;
        leaf.freeze().map_err(failed)?;
        Ok(Some(Paused(leaf)))
    }

    fn leaf_of(&self, container: &Container) -> std::result::Result<Leaf, CgroupError> {
        let place = container.pod.place();
        let hierarchies = Arc::new(Hierarchies::open(self.layout())?);
        let pod = PodCgroup::open_existing(hierarchies, &place.cgroup_parent, place.cgroup_levels)?;
        pod.leaf(&place.leaf(container.id()))
    }

    /// Lets every container go on that a hulld which was killed had paused.
    pub(crate) async fn thaw_all(self: &Arc<Self>) {
        let runtime = Arc::clone(self);
        let thaw = move || {
            for container in runtime.objects().containers() {
                if container.phase() == ContainerPhase::Running
                    && container.pod.launcher.name() == "process"
                    && let Err(error) = runtime.leaf_of(&container).and_then(|leaf| leaf.thaw())
                {
                    tracing::warn!(container = container.id(), %error, "cannot make sure that it is not paused");
                }
            }
        };
        if let Err(error) = blocking(thaw).await {
            tracing::warn!(%error, "cannot look for paused containers");
        }
    }
}
