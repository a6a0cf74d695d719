use std::path::PathBuf;
use std::time::Duration;

use crate::policy::Pattern;

/// Where a store lives and how it pulls.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Persistent data (`/var/lib/hull`): the index in `images/`, the layer files in `layers/`.
    pub root: PathBuf,
    /// Volatile state (`/run/hull`): the pinned namespace of layer mounts in `ns/`.
    pub state: PathBuf,
    /// One directory per registry with a `hosts.toml` (`/etc/hull/certs.d`); it need not exist. Read again for each pull.
    pub hosts_dir: PathBuf,
    /// Layers of one pull that are downloaded and converted at the same time; at least 1.
    pub max_parallel_layers: usize,
    /// Connections over which blobs are received at the same time, over all pulls; at least 1. A layer waits for its
    /// turn; those that are left serve for reading large layers in several ranges at once.
    pub max_parallel_downloads: usize,
    /// How long a registry may send nothing, or less than 1 KiB a second, before the request is given up and retried. Zero: no limit.
    pub progress_timeout: Duration,
    /// Images with such names are pinned: the kubelet's collection and [`prune`](super::ImageStore::prune) leave them.
    pub pinned: Vec<Pattern>,
    /// Whether layers are kept as they were compressed, beside their files, for as long as an image refers to them: then
    /// a push or a file with the digest that an image came with needs no registry. Without it those that are there go.
    pub keep_blobs: bool,
}

impl StoreConfig {
    /// The defaults of a daemon with these two directories.
    pub fn new(root: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            state: state.into(),
            hosts_dir: PathBuf::from("/etc/hull/certs.d"),
            max_parallel_layers: 3,
            max_parallel_downloads: 8,
            progress_timeout: Duration::from_secs(60),
            pinned: Vec::new(),
            keep_blobs: false,
        }
    }
}
