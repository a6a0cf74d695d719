use std::path::PathBuf;
use std::time::Duration;

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
    /// How long a registry may send nothing before the request is given up and retried. Zero: no limit.
    pub progress_timeout: Duration,
}

impl StoreConfig {
    /// The defaults of a daemon with these two directories.
    pub fn new(root: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            state: state.into(),
            hosts_dir: PathBuf::from("/etc/hull/certs.d"),
            max_parallel_layers: 3,
            progress_timeout: Duration::from_secs(60),
        }
    }
}
