//! Mounts of layer files, in a private namespace, cloned for pods.
//!
//! Every layer is mounted once per node, in a mount namespace that holds nothing else: its root is a small tmpfs with one
//! directory per layer. The namespace has no process; a bind mount of it at STATE/ns/layers keeps it, so the mounts and
//! their page cache outlive the daemon. One thread of the daemon lives inside and answers requests: attach, clone,
//! unmount. The file systems themselves are opened outside, where the files are visible, and attached as descriptors.

mod erofs;
mod error;
mod namespace;
mod server;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layer::LayerId;

pub(crate) use erofs::mount;
pub use error::MountError;

use namespace::Pin;
use server::Server;

/// A layer and its file.
#[derive(Clone, Debug)]
pub(crate) struct LayerSource {
    pub(crate) layer: LayerId,
    pub(crate) path: PathBuf,
}

/// The layer mounts of one store. The namespace is made at the first use.
pub(crate) struct LayerMounts {
    pin: Pin,
    server: Mutex<Option<Server>>,
    /// One layer is mounted at a time, so that none is mounted twice.
    mounting: Mutex<()>,
}

impl LayerMounts {
    pub(crate) fn new(state: &Path) -> Self {
        Self { pin: Pin::new(state), server: Mutex::new(None), mounting: Mutex::new(()) }
    }

    /// Detached clones of the layers' mounts, in order. Blocking.
    pub(crate) fn trees(&self, sources: Vec<LayerSource>) -> Result<Vec<OwnedFd>, MountError> {
        let server = self.server()?;
        let layers: Vec<LayerId> = sources.iter().map(|source| source.layer.clone()).collect();
        let mut trees = server.clone_trees(layers.clone())?;
        if trees.iter().any(Option::is_none) {
            self.mount_missing(&server, &sources, &trees)?;
            trees = server.clone_trees(layers)?;
        }
        let together = trees.into_iter().zip(&sources);
        together.map(|(tree, source)| tree.ok_or_else(|| MountError::Unknown(source.layer.clone()))).collect()
    }

    /// Unmounts layers that are about to go. Failures only delay the release of their disk space.
    pub(crate) fn unmount(&self, layers: &[LayerId]) {
        let server = match self.running_server() {
            Ok(Some(server)) => server,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot unmount removed layers");
                return;
            }
        };
        if let Err(error) = server.unmount(layers.to_vec()) {
            tracing::warn!(%error, "cannot unmount removed layers");
        }
    }

    /// Removes the namespace and with it all layer mounts.
    pub(crate) fn release(&self) -> Result<(), MountError> {
        let _mounting = lock(&self.mounting);
        let mut server = lock(&self.server);
        if let Some(server) = server.take() {
            server.stop();
        }
        self.pin.remove()
    }

    fn mount_missing(
        &self,
        server: &Server,
        sources: &[LayerSource],
        trees: &[Option<OwnedFd>],
    ) -> Result<(), MountError> {
        let _mounting = lock(&self.mounting);
        let missing = sources.iter().zip(trees).filter(|(_, tree)| tree.is_none()).map(|(source, _)| source);
        let mut seen = HashSet::new();
        let missing: Vec<&LayerSource> = missing.filter(|source| seen.insert(&source.layer)).collect();
        // Another request may have mounted them while this one waited.
        let layers = missing.iter().map(|source| source.layer.clone()).collect();
        let now = server.clone_trees(layers)?;
        for (source, _) in missing.into_iter().zip(&now).filter(|(_, tree)| tree.is_none()) {
            let mount = erofs::mount(source)?;
            server.attach(source.layer.clone(), mount)?;
        }
        Ok(())
    }

    /// The server, started on the existing namespace or on a new one.
    fn server(&self) -> Result<Server, MountError> {
        let mut slot = lock(&self.server);
        if let Some(server) = slot.as_ref().filter(|server| server.is_alive()) {
            return Ok(server.clone());
        }
        let server = match self.pin.open()? {
            Some(namespace) => Server::enter(namespace, &self.pin)?,
            None => Server::create(&self.pin)?,
        };
        Ok(slot.insert(server).clone())
    }

    /// The server if there is a namespace at all.
    fn running_server(&self) -> Result<Option<Server>, MountError> {
        if lock(&self.server).is_none() && self.pin.open()?.is_none() {
            return Ok(None);
        }
        self.server().map(Some)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
