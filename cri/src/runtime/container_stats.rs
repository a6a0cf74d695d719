//! ContainerStats.

use std::slice;
use std::sync::Arc;

use super::objects::Container;
use super::{Result, Runtime};
use crate::api::runtime::{ContainerAttributes, ContainerStats, ContainerStatsRequest};

impl Runtime {
    /// What one container uses. One that does not run has its writable layer only.
    pub async fn container_stats(
        self: &Arc<Self>,
        request: &ContainerStatsRequest,
    ) -> Result<ContainerStats> {
        let container = self.objects.container(&request.container_id)?;
        let only = slice::from_ref(&container);
        let usage = self.measure(&container.pod, only, false, false).await?;
        self.look_at_layers(only).await?;
        Ok(self.stats_of(&container, usage.containers.get(container.id())))
    }
}

pub(super) fn attributes(container: &Container) -> ContainerAttributes {
    container.with_record(|record| {
        let config = record.config.as_ref();
        ContainerAttributes {
            id: record.id.clone(),
            metadata: config.and_then(|config| config.metadata.clone()),
            labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
            annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        }
    })
}
