//! `hull system df`

use std::collections::BTreeMap;

use clap::Args;

use crate::api::hull::{BlobUse, DiskUsageReply, DiskUsageRequest};
use crate::api::runtime::ListImagesRequest;
use crate::cli::client::{Client, answer};
use crate::cli::error::CliError;
use crate::cli::output::{Format, Table, print_json, short_id, size};

/// Show what occupies the disk: images with the layers they share, containers with what they wrote
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull system df
  hull system df -v      each image, layer by layer shared or its own")]
pub(super) struct Df {
    /// Each image and each container
    #[arg(short, long)]
    verbose: bool,
}

impl Df {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let patience = client.patience();
        let usage = client.hull.disk_usage(DiskUsageRequest { count: true });
        let usage = answer("look at the disk", patience, usage).await?;
        let list = client.image.list_images(ListImagesRequest::default());
        let images = answer("list images", patience, list).await?.images;
        let name = |id: &str| {
            let image = images.iter().find(|image| image.id == id);
            image.and_then(|image| image.repo_tags.first()).cloned().unwrap_or_else(|| short_id(id).into())
        };
        if format == Format::Json {
            return print_json(&json(&usage));
        }
        if self.verbose {
            images_in_full(&usage, name).print()?;
            crate::cli::output::print("\n")?;
            containers_in_full(&usage).print()
        } else {
            summary(&usage, images.len()).print()
        }
    }
}

fn summary(usage: &DiskUsageReply, images: usize) -> Table {
    let used: Vec<&str> = usage.containers.iter().map(|container| container.image_id.as_str()).collect();
    let active: std::collections::BTreeSet<&str> = used.iter().copied().collect();
    let needed = |ids: &[String]| ids.iter().any(|id| active.contains(id.as_str()));
    let reclaimable: u64 = usage
        .layers
        .iter()
        .filter(|layer| !layer.held && !needed(&layer.image_ids))
        .map(|layer| layer.bytes)
        .sum();
    let written: u64 = usage.containers.iter().map(|container| container.writable).sum();
    let idle: u64 = usage
        .containers
        .iter()
        .filter(|container| !container.running)
        .map(|container| container.writable)
        .sum();
    let is_needed = |blob: &&BlobUse| needed(&blob.image_ids);
    let blobs: u64 = usage.blobs.iter().map(|blob| blob.bytes).sum();
    let needed_blobs: u64 = usage.blobs.iter().filter(is_needed).map(|blob| blob.bytes).sum();
    let running = usage.containers.iter().filter(|container| container.running).count();
    let mut table = Table::new(&["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"]);
    table.row([
        "Images".into(),
        images.to_string(),
        active.len().to_string(),
        size(usage.images_bytes.saturating_sub(blobs)),
        size(reclaimable),
    ]);
    table.row([
        "Kept blobs".into(),
        usage.blobs.len().to_string(),
        usage.blobs.iter().filter(is_needed).count().to_string(),
        size(blobs),
        size(blobs - needed_blobs),
    ]);
    table.row([
        "Containers".into(),
        usage.containers.len().to_string(),
        running.to_string(),
        size(written),
        size(idle),
    ]);
    table
}

fn images_in_full(usage: &DiskUsageReply, name: impl Fn(&str) -> String) -> Table {
    let mut sizes: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for layer in &usage.layers {
        for id in &layer.image_ids {
            let (shared, own) = sizes.entry(id).or_default();
            if layer.image_ids.len() > 1 { *shared += layer.bytes } else { *own += layer.bytes }
        }
    }
    let mut table = Table::new(&["IMAGE", "IMAGE ID", "SHARED", "ITS OWN", "CONTAINERS"]);
    for (id, (shared, own)) in sizes {
        let containers = usage.containers.iter().filter(|container| container.image_id == id).count();
        table.row([name(id), short_id(id).into(), size(shared), size(own), containers.to_string()]);
    }
    table
}

fn containers_in_full(usage: &DiskUsageReply) -> Table {
    let mut table = Table::new(&["CONTAINER ID", "IMAGE ID", "WRITTEN", "RUNNING"]);
    for container in &usage.containers {
        let running = if container.running { "yes" } else { "no" };
        table.row([
            short_id(&container.id).into(),
            short_id(&container.image_id).into(),
            size(container.writable),
            running.into(),
        ]);
    }
    table
}

fn json(usage: &DiskUsageReply) -> serde_json::Value {
    let layers: Vec<_> = usage
        .layers
        .iter()
        .map(|layer| {
            serde_json::json!({"layer": layer.layer, "bytes": layer.bytes, "images": layer.image_ids, "held": layer.held})
        })
        .collect();
    let containers: Vec<_> = usage
        .containers
        .iter()
        .map(|container| {
            serde_json::json!({"id": container.id, "image": container.image_id, "writable": container.writable,
                               "running": container.running})
        })
        .collect();
    let blobs: Vec<_> = usage
        .blobs
        .iter()
        .map(|blob| serde_json::json!({"digest": blob.digest, "bytes": blob.bytes, "images": blob.image_ids}))
        .collect();
    serde_json::json!({
        "imagesBytes": usage.images_bytes, "layers": layers, "blobs": blobs, "containers": containers,
    })
}
