//! hull.v1 PruneImages and DiskUsage: what occupies the disk, and what of it nobody needs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::api::hull::{
    BlobUse, ContainerUse, DiskUsageReply, DiskUsageRequest, LayerUse, PruneImagesReply, PruneImagesRequest,
};
use crate::runtime::objects::Container;
use crate::runtime::{Result, Runtime, blocking};
use crate::stats::disk;
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

    /// Layers with those who need them, containers with their writable layers as they were last counted, or are.
    pub async fn disk_usage(&self, request: &DiskUsageRequest) -> Result<DiskUsageReply> {
        let containers = self.objects().containers();
        let writable = self.writable_layers(&containers, request.count).await?;
        let images = Arc::clone(self.images());
        let look = move || (images.usage(), images.layer_usage(), images.blob_usage());
        let (usage, layers, blobs) = blocking(look).await?;
        let usage = usage?;
        let blob = |blob: hull_images::BlobUsage| BlobUse {
            digest: blob.digest.to_string(),
            bytes: blob.bytes,
            image_ids: blob.images,
        };
        let blobs = blobs?.into_iter().map(blob).collect();
        let layer = |layer: hull_images::LayerUsage| LayerUse {
            layer: layer.layer.to_string(),
            bytes: layer.bytes,
            image_ids: layer.images,
            held: layer.held,
        };
        let layers: Vec<LayerUse> = layers.into_iter().map(layer).collect();
        let sizes: HashMap<&str, u64> = layers.iter().map(|one| (one.layer.as_str(), one.bytes)).collect();
        let container = |(container, writable): (&Arc<Container>, u64)| {
            let image = container.with_record(|record| record.image.clone()).unwrap_or_default();
            ContainerUse {
                id: container.id().to_owned(),
                image_id: image.id,
                writable,
                running: container.phase() == ContainerPhase::Running,
                image_bytes: image.layers.iter().filter_map(|layer| sizes.get(layer.as_str())).sum(),
            }
        };
        let containers = containers.iter().zip(writable).map(container).collect();
        Ok(DiskUsageReply { layers, containers, images_bytes: usage.bytes, blobs })
    }

    /// Bytes of the containers' writable layers, in their order.
    async fn writable_layers(&self, containers: &[Arc<Container>], count: bool) -> Result<Vec<u64>> {
        if !count {
            let known = |one: &Arc<Container>| one.disk.known().map_or(0, |(_, occupied)| occupied.bytes);
            return Ok(containers.iter().map(known).collect());
        }
        let places: Vec<_> =
            containers.iter().map(|one| (Arc::clone(one), self.container_directory(one.id()))).collect();
        let count = move || {
            let count = |(container, directory): &(Arc<Container>, std::path::PathBuf)| {
                let elsewhere = container.pod.launcher.scratch(&container.pod.place(), container.id());
                // One that was removed meanwhile occupies nothing.
                disk::count_all(directory).unwrap_or_default().and(elsewhere).bytes
            };
            places.iter().map(count).collect()
        };
        blocking(count).await
    }
}
