//! The whole crate through its public face: real and misbehaving registries, real files, real mounts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

/// Whether a store is whole, and how it is mended.
mod check;
/// HTTP/2 and proxies.
mod connections;
/// Debian's docker-registry as a child process.
mod docker_registry;
/// Files with images as they came.
mod exact_files;
/// Disks that are full, and disks that fail.
mod faults;
/// Images out of files and into files.
mod files;
/// What stands in indexes and manifests beside images.
mod formats;
/// What a hostile or broken registry can do, and that nothing stays of it.
mod hostile;
/// Mirrors, TLS and headers by hosts.toml.
mod hosts;
/// Images made by the test.
mod image;
/// Layers that are kept as they came.
mod kept_blobs;
/// Mirrors with wrong content, or none.
mod mirrors;
/// Mounts of layers in their namespace.
mod mounting;
/// Names, and images that none leads to.
mod names;
/// Pulls that succeed.
mod pulls;
/// Images that go to a registry.
mod pushes;
/// Large layers over several connections, and registries that do not serve ranges.
mod ranges;
/// Removal, holds, sweeping, and what a crash leaves.
mod removal;
/// A registry whose answers a test decides.
mod server;
/// A registry with TLS and a token service.
mod token_tls;
/// Token services, good and bad.
mod tokens;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hull_images::{Image, ImageStore, PullError, Reference, StoreConfig};
use hull_sys::namespace::{Namespaces, unshare, unshare_filesystem_attributes};
use rustix::mount::{MountPropagationFlags, mount_change};

/// A store in a directory of its own, with short timeouts.
struct TestStore {
    store: Arc<ImageStore>,
    directory: tempfile::TempDir,
}

impl TestStore {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// One whose configuration differs.
    fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        change(&mut config);
        Self { store: ImageStore::open(config).unwrap(), directory }
    }

    async fn pull(&self, reference: &str) -> Result<Image, PullError> {
        self.store.pull(&reference.parse().unwrap(), None, None).await
    }

    fn root(&self) -> std::path::PathBuf {
        self.directory.path().join("root")
    }

    /// Names of all files below ROOT/layers.
    fn layer_files(&self) -> Vec<String> {
        files(&self.root().join("layers"))
    }

    /// Waits until no layer file is left: a cancelled conversion ends at its next read.
    fn assert_nothing_left(&self) {
        for _ in 0..1500 {
            if self.layer_files().is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(self.layer_files(), Vec::<String>::new());
        assert!(self.store.list().unwrap().is_empty());
    }

    /// Closes the store and opens it again, as a restart of the daemon does.
    fn reopen(self) -> Self {
        self.reopen_with(|_| {})
    }

    /// The same with a configuration that differs.
    fn reopen_with(self, change: impl FnOnce(&mut StoreConfig)) -> Self {
        let Self { store, directory } = self;
        drop(store);
        let mut config = config(directory.path());
        change(&mut config);
        Self { store: ImageStore::open(config).unwrap(), directory }
    }
}

fn config(directory: &Path) -> StoreConfig {
    let mut config = StoreConfig::new(directory.join("root"), directory.join("state"));
    config.hosts_dir = directory.join("certs.d");
    config.progress_timeout = Duration::from_millis(700);
    config
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

/// Runs `test` on a thread with a mount namespace of its own, so that even a failed test leaves no mount.
fn in_own_mounts<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare_filesystem_attributes().unwrap();
            unshare(Namespaces::MOUNT).unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            // A runtime of this thread: the threads it starts are in the same namespace.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test());
        });
        thread.join().unwrap();
    });
}
