//! Converted layers that no image has yet: temporary files that live as long as a pull wants them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::digest::Digest;
use crate::layer::{self, BlobExpectation, Compression, Converted, LayerError, LayerId, Limits, Target};
use crate::mounts::{self, LayerSource, MountError};

use super::ImageStore;
use super::error::StoreError;
use super::files::{Temporary, failed};
use super::index::LayerRecord;
use super::kept::{Keeping, KeptBlob};

/// Why a layer was not converted. Nothing of it is left.
pub(super) enum StageError {
    /// By its content, or because it could not be read or written.
    Content(LayerError),
    /// By the store's own files.
    Store(StoreError),
}

impl ImageStore {
    /// Converts a layer's blob into a file and makes that durable. Blocking.
    pub(super) fn stage(
        &self,
        blob: impl Read + Send,
        expectation: &BlobExpectation,
    ) -> Result<Arc<Staged>, StageError> {
        self.stage_as(blob, expectation).map(Arc::new)
    }

    /// The same, and the blob is kept if the store keeps blobs. A plain archive is not: it can be made again.
    pub(super) fn stage_and_keep(
        &self,
        blob: impl Read + Send,
        expectation: &BlobExpectation,
    ) -> Result<Arc<Staged>, StageError> {
        let compression =
            Compression::from_media_type(&expectation.media_type).map_err(StageError::Content)?;
        if !self.config.keep_blobs || compression == Compression::None {
            return self.stage(blob, expectation);
        }
        let mut keeping = Keeping::begin(&self.files, &expectation.digest).map_err(StageError::Store)?;
        let staged = self.stage_as(keeping.tee(blob), expectation);
        // Then this is why the conversion failed.
        keeping.look_for_failure().map_err(StageError::Store)?;
        let staged = staged?;
        let blob = Some(keeping.finish().map_err(StageError::Store)?);
        Ok(Arc::new(Staged { blob, ..staged }))
    }

    fn stage_as(&self, blob: impl Read + Send, expectation: &BlobExpectation) -> Result<Staged, StageError> {
        self.staged_by(expectation.diff_id.hex(), |target| {
            layer::ingest(blob, expectation, target, &Limits::default())
        })
    }

    /// The same for an archive of our own, of which nothing is known before. Blocking.
    pub(super) fn stage_archive(&self, tar: impl Read) -> Result<Arc<Staged>, StageError> {
        self.staged_by("new", |target| layer::convert(tar, target, &Limits::default())).map(Arc::new)
    }

    fn staged_by(
        &self,
        stem: &str,
        convert: impl FnOnce(Target<'_>) -> Result<Converted, LayerError>,
    ) -> Result<Staged, StageError> {
        let (temporary, file) = self.files.create_temporary(stem).map_err(StageError::Store)?;
        let scratch = self.files.scratch().map_err(StageError::Store)?;
        let target = Target { layer: &file, scratch: Some(&scratch) };
        let converted = convert(target).map_err(StageError::Content)?;
        sync(&file).map_err(|error| {
            StageError::Store(failed("sync", &self.files.layer(&converted.diff_id))(error))
        })?;
        let record = LayerRecord {
            size: converted.size + converted.tar_split,
            tar_split: converted.tar_split,
            entries: converted.entries,
            content: converted.content,
            opaque_root: converted.opaque_root,
            implied: converted.implied_directories.len() as u64,
        };
        Ok(Staged {
            layer: converted.diff_id,
            record,
            implied: converted.implied_directories,
            file: Mutex::new(temporary),
            blob: None,
        })
    }
}

pub(super) fn sync(file: &File) -> std::io::Result<()> {
    file.sync_all()?;
    // Mounts read the file directly into their own cache; its pages here would only be a second copy.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    Ok(())
}

/// A converted, synced layer file. Deleted when the last pull that shares it drops it without having committed it.
pub(super) struct Staged {
    pub(super) layer: LayerId,
    pub(super) record: LayerRecord,
    /// Directories that the layer implies.
    pub(super) implied: Vec<Vec<u8>>,
    file: Mutex<Temporary>,
    /// The blob that it came as, verified and synced, if that is to be kept.
    blob: Option<KeptBlob>,
}

impl Staged {
    /// A mount of the file, attached nowhere; the file lasts as long as its last user.
    pub(super) fn tree(&self) -> Result<OwnedFd, MountError> {
        let path = self.file.lock().unwrap_or_else(PoisonError::into_inner).path().to_owned();
        mounts::mount(&LayerSource { layer: self.layer.clone(), path })
    }

    /// Gives the file its final name, and before that the kept blob, if it is one of those that `refers_to` wants; it
    /// may have come with another pull's manifest. The caller holds the writer lock and has seen that the index lacks the
    /// layer. True if there is a blob now.
    pub(super) fn publish(&self, refers_to: impl Fn(&Digest) -> bool) -> Result<bool, StoreError> {
        let blob = self.blob.as_ref().filter(|blob| refers_to(&blob.digest));
        blob.map_or(Ok(()), KeptBlob::publish)?;
        let published = self.file.lock().unwrap_or_else(PoisonError::into_inner).publish(&self.layer);
        if published.is_err() {
            blob.into_iter().for_each(KeptBlob::unpublish);
        }
        published.map(|()| blob.is_some())
    }

    /// Undoes [`Staged::publish`] when the transaction failed.
    pub(super) fn unpublish(&self) {
        self.blob.iter().for_each(KeptBlob::unpublish);
        self.file.lock().unwrap_or_else(PoisonError::into_inner).unpublish(&self.layer);
    }
}

/// The staged layers of all pulls that are under way, so that one pull can use what another has just converted.
#[derive(Default)]
pub(super) struct StagedLayers(Mutex<HashMap<LayerId, Weak<Staged>>>);

impl StagedLayers {
    pub(super) fn get(&self, layer: &LayerId) -> Option<Arc<Staged>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(layer).and_then(Weak::upgrade)
    }

    pub(super) fn insert(&self, staged: &Arc<Staged>) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.retain(|_, staged| staged.strong_count() > 0);
        map.insert(staged.layer.clone(), Arc::downgrade(staged));
    }
}
