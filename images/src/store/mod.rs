//! The image index, the layer files and pulls into them.
//!
//! On disk, below ROOT: `images/index.redb` (what exists), `images/lock`, `images/reserve` (space for removing images
//! from a full disk), `layers/<hex>.erofs`, and `blobs/<algorithm>/<hex>` if blobs are kept. A layer file is
//! written under a temporary name, synced, renamed, and exists only once the index says so, in one transaction with the
//! image that brought it. Queries answer from memory.

mod arrival;
mod catalogue;
mod check;
mod config;
mod error;
mod exact_push;
mod exact_save;
mod files;
mod flights;
mod holds;
mod index;
mod kept;
mod layers;
mod load;
mod names;
mod new_image;
mod origins;
mod progress;
mod pull;
mod push;
mod save;
mod spool;
mod stack;
mod staged;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use bytes::Bytes;
use tokio::sync::watch;

use crate::image::{Image, ImageConfig};
use crate::layer::LayerId;
use crate::mounts::{LayerMounts, LayerSource, MountError};
use crate::registry::Downloads;

use catalogue::Catalogue;
use files::{Files, Temporary};
use flights::Flights;
use holds::Holds;
use index::{Change, Contents, Index};

pub use check::{ArchiveFailure, CheckReport, Problem};
pub use config::StoreConfig;
pub use error::{PullError, PullErrorKind, StoreError};
pub use holds::LayerHold;
pub use kept::BlobUsage;
pub use load::LoadError;
pub use names::LayerUsage;
pub use new_image::{ImageChange, NewImage, NewImageError};
pub use progress::PullProgress;
pub use push::{PushError, PushOptions, PushProgress, Pushed};
pub use save::{SaveError, SaveProgress, Saving};

/// The images of one node. Shared by `Arc`; every method may be called from any thread. Methods that are not `async`
/// block for at most a disk sync (changes) or not at all (queries).
pub struct ImageStore {
    config: StoreConfig,
    files: Arc<Files>,
    index: Index,
    catalogue: RwLock<Catalogue>,
    /// Serialises changes of index and layer files.
    writer: Mutex<()>,
    holds: Arc<Holds>,
    mounts: LayerMounts,
    pulls: Flights<pull::Key, pull::Outcome, Arc<progress::Board>>,
    conversions: Flights<LayerId, layers::Outcome, watch::Receiver<u64>>,
    staged: staged::StagedLayers,
    downloads: Downloads,
    me: Weak<ImageStore>,
}

/// What the store occupies, for CRI's ImageFsInfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemUsage {
    /// Bytes of disk blocks of the index, the layer files, kept blobs and what is being pulled.
    pub bytes: u64,
    /// Inodes of the same.
    pub inodes: u64,
    /// An existing directory on the filesystem that holds them.
    pub mountpoint: PathBuf,
}

/// What a sweep took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Files without a place in the index: unfinished or already removed ones.
    pub files: u64,
    /// Bytes that those files occupied.
    pub bytes: u64,
    /// Layers that neither an image nor a hold needed.
    pub layers: Vec<LayerId>,
    /// Ids of images that were taken out because a layer file is missing or has the wrong size (at open only).
    pub broken_images: Vec<String>,
}

impl ImageStore {
    /// Opens or creates the store. Fails with [`StoreError::InUse`] while another daemon has it open. Files that the
    /// index does not know are deleted; images whose layer files are damaged in length or gone are taken out. Layers
    /// that no image uses stay until [`ImageStore::sweep`], so that holds can be taken for existing containers first. Kept
    /// blobs that no image refers to go, all of them if the store is not to keep any.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        let files = Arc::new(Files::open(&config.root)?);
        if config.keep_blobs {
            files.make_blob_directories()?;
        }
        files.take_reserve();
        let (index, contents) = Index::open(&files.index())?;
        let mut catalogue = load(contents)?;
        catalogue.pinned.clone_from(&config.pinned);
        let mounts = LayerMounts::new(&config.state);
        let downloads = Downloads::new(config.max_parallel_downloads);
        let store = Arc::new_cyclic(|me| Self {
            config,
            files,
            index,
            catalogue: RwLock::new(catalogue),
            writer: Mutex::new(()),
            holds: Arc::default(),
            mounts,
            pulls: Flights::default(),
            conversions: Flights::default(),
            staged: staged::StagedLayers::default(),
            downloads,
            me: me.clone(),
        });
        let mut report = SweepReport { broken_images: store.drop_broken()?, ..SweepReport::default() };
        store.sweep_files(&mut report)?;
        if report != SweepReport::default() {
            tracing::info!(?report, "swept the image store");
        }
        Ok(store)
    }

    /// All images, ordered by id.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let catalogue = self.read();
        Ok(catalogue.images.keys().filter_map(|id| catalogue.image(id)).collect())
    }

    /// The image that `name` means: a full id (`sha256:…`), its bare hexadecimal part or a unique prefix of it, a tag
    /// reference or a digest reference in any form a user may write.
    pub fn find(&self, name: &str) -> Result<Option<Image>, StoreError> {
        let catalogue = self.read();
        Ok(catalogue.resolve(name)?.and_then(|id| catalogue.image(&id)))
    }

    /// The exact bytes of a stored document of an image: its configuration, manifest or index.
    pub fn document(&self, digest: &str) -> Result<Option<Bytes>, StoreError> {
        Ok(self.index.blob(digest)?.map(Bytes::from))
    }

    /// Removes the image that `name` means (as in [`ImageStore::find`]) with all its names, and the layers that nothing
    /// else needs. Returns the removed names, then the id; nothing when there is no such image.
    pub fn remove(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let withdrawn;
        let removed = {
            let _writer = self.write();
            let Some(id) = self.read().resolve(name)? else { return Ok(Vec::new()) };
            let change = self.read().removal(&id);
            self.commit_removal(&change)?;
            self.apply(&change, BTreeMap::new());
            withdrawn = (self.withdraw_unused()?, self.withdraw_blobs()?);
            let mut removed = change.delete_names;
            removed.push(id);
            removed
        };
        drop(withdrawn);
        self.files.take_reserve();
        Ok(removed)
    }

    /// What the store occupies on its filesystem.
    pub fn usage(&self) -> Result<FilesystemUsage, StoreError> {
        let (bytes, inodes) = self.files.occupied()?;
        Ok(FilesystemUsage { bytes, inodes, mountpoint: self.files.images().to_owned() })
    }

    /// Keeps the files of `layers` until the returned value is dropped, even when their images are removed.
    pub fn hold(&self, layers: &[LayerId]) -> LayerHold {
        LayerHold::new(layers, self.holds.clone(), self.me.clone())
    }

    /// Deletes leftovers: files that the index does not know, and layers that neither an image nor a hold needs. Take
    /// the holds of existing containers first.
    pub fn sweep(&self) -> Result<SweepReport, StoreError> {
        let mut report = SweepReport::default();
        let withdrawn;
        {
            let _writer = self.write();
            let before = self.read().unused_layers(|layer| self.holds.contains(layer));
            withdrawn = self.withdraw_unused()?;
            report.layers = before;
        }
        drop(withdrawn);
        self.sweep_files(&mut report)?;
        Ok(report)
    }

    /// Detached mounts (`open_tree` clones, read-only) of the layers, in the order given. A layer's first use mounts it;
    /// after that a clone costs some 15 µs. Blocking: call it in `spawn_blocking`. Hold the layers meanwhile.
    pub fn layer_trees(&self, layers: &[LayerId]) -> Result<Vec<OwnedFd>, MountError> {
        let sources = {
            let catalogue = self.read();
            let source = |layer: &LayerId| match catalogue.layers.contains_key(layer) {
                true => Ok(LayerSource { layer: layer.clone(), path: self.files.layer(layer) }),
                false => Err(MountError::Unknown(layer.clone())),
            };
            layers.iter().map(source).collect::<Result<Vec<_>, _>>()?
        };
        self.mounts.trees(sources)
    }

    /// The layers' EROFS files, open for reading, in the order given: for machines, which have kernels of their own to
    /// mount them. Hold the layers meanwhile.
    pub fn layer_files(&self, layers: &[LayerId]) -> Result<Vec<fs::File>, MountError> {
        let catalogue = self.read();
        let open = |layer: &LayerId| {
            if !catalogue.layers.contains_key(layer) {
                return Err(MountError::Unknown(layer.clone()));
            }
            fs::File::open(self.files.layer(layer)).map_err(|error| MountError::Mount {
                layer: layer.clone(),
                step: "open",
                source: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
                log: String::new(),
            })
        };
        layers.iter().map(open).collect()
    }

    /// Unmounts all layers and removes their namespace, so that the machine is as it was. For a daemon that ends and
    /// leaves no pod behind; pods that still run keep their own clones. Later calls of `layer_trees` set it up again.
    pub fn release_mounts(&self) -> Result<(), MountError> {
        self.mounts.release()
    }

    fn read(&self) -> RwLockReadGuard<'_, Catalogue> {
        self.catalogue.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a committed change in memory. The writer lock is held by the caller.
    fn apply(&self, change: &Change, configs: BTreeMap<String, ImageConfig>) {
        self.catalogue.write().unwrap_or_else(PoisonError::into_inner).apply(change, configs);
    }

    /// Commits a change that frees space. On a full disk, which is when the kubelet removes images, even that needs
    /// some: the reserve is given up for it and taken again when there is room.
    fn commit_removal(&self, change: &Change) -> Result<(), StoreError> {
        match self.index.commit(change) {
            Err(error) if error.is_out_of_space() && self.files.give_up_reserve() => {
                self.index.commit(change)
            }
            other => other,
        }
    }

    /// Takes unused layers out of the index, the mounts and the directory. The files go when the result is dropped,
    /// which the caller does after it has let the writer lock go.
    fn withdraw_unused(&self) -> Result<Vec<Temporary>, StoreError> {
        let unused = self.read().unused_layers(|layer| self.holds.contains(layer));
        if unused.is_empty() {
            return Ok(Vec::new());
        }
        let change = Change { delete_layers: unused, ..Change::default() };
        self.commit_removal(&change)?;
        self.apply(&change, BTreeMap::new());
        self.mounts.unmount(&change.delete_layers);
        let mut withdrawn = Vec::new();
        for layer in &change.delete_layers {
            withdrawn.extend(self.files.withdraw(layer)?);
        }
        Ok(withdrawn)
    }

    /// Called when the last hold of these layers went.
    fn reclaim_in_background(self: &Arc<Self>, layers: &[LayerId]) {
        let reclaimable = {
            let catalogue = self.read();
            layers.iter().any(|layer| catalogue.layers.contains_key(layer) && !catalogue.is_used(layer))
        };
        if !reclaimable {
            return;
        }
        let store = self.clone();
        let reclaim = move || {
            let withdrawn = {
                let _writer = store.write();
                store.withdraw_unused()
            };
            if let Err(error) = withdrawn {
                tracing::warn!(%error, "cannot delete unused layers, the next sweep will");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("layer-reclaim".into()).spawn(reclaim) {
            tracing::warn!(%error, "cannot start deleting unused layers, the next sweep will");
        }
    }

    /// Takes out images with layer files that are gone or have the wrong size: a power cut can tear what was never
    /// synced, and people delete files.
    fn drop_broken(&self) -> Result<Vec<String>, StoreError> {
        let _writer = self.write();
        let mut change = Change::default();
        {
            let catalogue = self.read();
            for (layer, record) in &catalogue.layers {
                let size = fs::metadata(self.files.layer(layer)).map(|metadata| metadata.len()).ok();
                if size != Some(record.size) {
                    tracing::warn!(%layer, expected = record.size, ?size, "layer file is damaged or missing");
                    change.delete_layers.push(layer.clone());
                }
            }
            for (id, entry) in &catalogue.images {
                let known =
                    |layer| catalogue.layers.contains_key(layer) && !change.delete_layers.contains(layer);
                if !entry.record.layers.iter().all(known) {
                    change.delete_images.push(id.clone());
                }
            }
            for id in &change.delete_images {
                let removal = catalogue.removal(id);
                change.delete_names.extend(removal.delete_names);
                change.delete_blobs.push(id.clone());
            }
        }
        if !change.delete_layers.is_empty() || !change.delete_images.is_empty() {
            self.index.commit(&change)?;
            self.apply(&change, BTreeMap::new());
        }
        Ok(change.delete_images)
    }

    /// Deletes files of the layers' directory that the index does not know, and kept blobs that no image refers to.
    fn sweep_files(&self, report: &mut SweepReport) -> Result<(), StoreError> {
        // Between a layer's rename and its commit the writer lock is held, so such a file is never seen here.
        let _writer = self.write();
        let known: std::collections::HashSet<String> =
            self.read().layers.keys().map(|layer| layer.hex().to_owned()).collect();
        let mut leftovers = self.files.leftovers(|hex| known.contains(hex))?;
        leftovers.extend(self.blob_leftovers()?);
        for leftover in leftovers {
            match fs::remove_file(&leftover.path) {
                Ok(()) => {
                    report.files += 1;
                    report.bytes += leftover.bytes;
                }
                // Not one of ours, a directory for example; no reason not to start.
                Err(error) => {
                    tracing::warn!(path = %leftover.path.display(), %error, "cannot delete a leftover")
                }
            }
        }
        Ok(())
    }
}

/// Builds the catalogue from what the index says.
fn load(contents: Contents) -> Result<Catalogue, StoreError> {
    let mut catalogue = Catalogue::default();
    let mut configs = BTreeMap::new();
    let mut change = Change { put_names: contents.names, put_layers: contents.layers, ..Change::default() };
    for (id, record, raw) in contents.images {
        match ImageConfig::parse(Bytes::from(raw)) {
            Ok(config) => {
                configs.insert(id.clone(), config);
                change.put_images.push((id, record));
            }
            // Rules may become stricter between versions; such an image is as good as not pulled.
            Err(error) => tracing::warn!(image = %id, %error, "ignoring a stored image"),
        }
    }
    change.put_names.retain(|(_, id)| configs.contains_key(id));
    catalogue.apply(&change, configs);
    Ok(catalogue)
}
