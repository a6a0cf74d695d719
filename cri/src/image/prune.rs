//! hull.v1 PruneImages and DiskUsage: what occupies the disk, and what of it nobody needs.

use std::collections::HashSet;
use std::sync::Arc;

use crate::api::hull::{ContainerUse, DiskUsageReply, LayerUse, PruneImagesReply, PruneImagesRequest};
use crate::runtime::{Result, Runtime, blocking};
use crate::store::record::ContainerPhase;

impl Runtime {
    /// Removes images that no tag leads to, or all that no container was made from.
    pub async fn prune_images(&self, request: PruneImagesRequest) -> Result<PruneImagesReply> {
        let used: HashSet<String> = self
            .objects()
            .containers()
            .iter()
            .filter_map(|container| {
                container.with_record(|record| record.image.as_ref().map(|image| image.id.clone()))
            })
            .collect();
        let images = Arc::clone(self.images());
        let pruned = blocking(move || images.prune(request.all, |id| used.contains(id))).await??;
        let (image_ids, freed) = pruned;
        tracing::info!(images = image_ids.len(), freed, "pruned images");
        Ok(PruneImagesReply { image_ids, freed })
    }

    /// Layers with those who need them, containers with their writable layers as they were last counted.
    pub async fn disk_usage(&self) -> Result<DiskUsageReply> {
        let images = Arc::clone(self.images());
        let usage = blocking(move || images.usage()).await??;
        let layer = |layer: hull_images::LayerUsage| LayerUse {
            layer: layer.layer.to_string(),
            bytes: layer.bytes,
            image_ids: layer.images,
            held: layer.held,
        };
        let containers = self.objects().containers();
        let container = |container: &Arc<crate::runtime::objects::Container>| ContainerUse {
            id: container.id().to_owned(),
            image_id: container
                .with_record(|record| record.image.as_ref().map(|image| image.id.clone()))
                .unwrap_or_default(),
            writable: container.disk.known().map_or(0, |(_, occupied)| occupied.bytes),
            running: container.phase() == ContainerPhase::Running,
        };
        Ok(DiskUsageReply {
            layers: self.images().layer_usage().into_iter().map(layer).collect(),
            containers: containers.iter().map(container).collect(),
            images_bytes: usage.bytes,
        })
    }
}
