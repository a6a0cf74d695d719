//! Leaving the machine as it was found, once no pods are left.

use std::sync::Arc;

use hull_agent::cgroup::{Hierarchies, PodCgroup};

use super::{Error, Result, Runtime, blocking};
use crate::systemd::slice;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReleaseReport {
    /// Pods that are still there; with any, nothing is released.
    pub pods: usize,
}

impl Runtime {
    /// Removes what hulld keeps for the next pod: the mounts of image layers, the bridge with its rules, the cgroup
    /// above the pods. Does nothing while there are pods. A hulld that goes on makes them again when they are needed.
    pub async fn release(&self) -> Result<ReleaseReport> {
        let pods = self.objects.pods().len();
        if pods > 0 {
            return Ok(ReleaseReport { pods });
        }
        self.network.release().await?;
        let images = Arc::clone(&self.images);
        blocking(move || images.release_mounts())
            .await?
            .map_err(|error| Error::Internal(format!("cannot unmount the image layers: {error}")))?;
        let (layout, parent) = (self.layout.clone(), self.config.cgroup.parent.clone());
        match self.systemd.clone().filter(|_| slice::is_slice(&parent)) {
            Some(systemd) => blocking(move || systemd.stop_slice(&parent))
                .await?
                .map_err(|error| Error::Internal(format!("cannot stop the slice of all pods: {error}")))?,
            None => blocking(move || remove_cgroup(&layout, &parent)).await??,
        }
        Ok(ReleaseReport { pods: 0 })
    }
}

fn remove_cgroup(layout: &hull_agent::protocol::messages::CgroupLayout, parent: &str) -> Result<()> {
    let failed = |error| Error::Internal(format!("cannot remove the cgroup {parent}: {error}"));
    let hierarchies = Arc::new(Hierarchies::open(layout).map_err(failed)?);
    let levels = parent.split('/').filter(|part| !part.is_empty()).count() as u32;
    let cgroup = PodCgroup::open_existing(hierarchies, parent, levels).map_err(failed)?;
    cgroup.remove_created().map_err(failed)?;
    Ok(())
}
