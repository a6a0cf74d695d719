//! Is everything that the index promises there, to the last byte?

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::layer::{ImageReader, LayerId, RebuildError, rebuild};

use super::ImageStore;
use super::error::StoreError;
use super::files::failed;
use super::index::{Change, LayerRecord};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Layers that were looked at.
    pub layers: u64,
    /// Kept blobs that were looked at.
    pub blobs: u64,
    /// Bytes of the archives that were put together and of the blobs, all hashed.
    pub bytes: u64,
    /// Layers of which only the form could be checked: they were made before hull kept the way back to their archive.
    pub unverifiable: Vec<LayerId>,
    /// What is wrong. With repair, it is no more.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is about: a layer's id, an image's id, a kept blob's digest, or a file.
    pub subject: String,
    /// What is wrong with it.
    pub reason: String,
    /// Ids of the images that suffer from it.
    pub images: Vec<String>,
}

impl ImageStore {
    /// Puts the archive of every layer together again and compares its hash with the diffID, and checks the stored
    /// documents of every image and the blobs that were kept. With `repair`, what is damaged is taken out with the images
    /// that need it, so that they can be pulled again; running containers keep what they have mounted. A damaged blob goes
    /// alone. `progress` hears of each layer before it, or its blob, is read and may end the check by answering false.
    /// Blocking, for as long as it takes to read all layers.
    pub fn check(
        &self,
        repair: bool,
        mut progress: impl FnMut(&LayerId) -> bool,
    ) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        let layers: Vec<(LayerId, LayerRecord)> =
            self.read().layers.iter().map(|(id, record)| (id.clone(), *record)).collect();
        let mut damaged: BTreeMap<LayerId, String> = BTreeMap::new();
        for (layer, record) in layers {
            if !progress(&layer) {
                return Ok(report);
            }
            // No pull, removal or repair may take the file away meanwhile.
            let _hold = self.hold(std::slice::from_ref(&layer));
            report.layers += 1;
            match self.examine(&layer, &record) {
                Ok(Some(bytes)) => report.bytes += bytes,
                Ok(None) => report.unverifiable.push(layer),
                // Removed since it was listed.
                Err(_) if !self.read().layers.contains_key(&layer) => {}
                Err(reason) => {
                    damaged.insert(layer, reason);
                }
            }
        }
        for (layer, reason) in &damaged {
            report.problems.push(Problem {
                subject: layer.to_string(),
                reason: reason.clone(),
                images: self.images_of(layer),
            });
        }
        let Some(bad_blobs) = self.check_blobs(&mut report, &mut progress)? else { return Ok(report) };
        let broken = self.check_documents(&mut report)?;
        self.check_files(&mut report)?;
        if repair && !report.problems.is_empty() {
            bad_blobs.iter().for_each(|digest| self.drop_kept(digest));
            self.take_out(damaged.into_keys().collect(), broken)?;
            let mut swept = super::SweepReport::default();
            self.sweep_files(&mut swept)?;
        }
        Ok(report)
    }

    /// How many bytes of archive the layer gave; None if it cannot be turned back.
    fn examine(&self, layer: &LayerId, record: &LayerRecord) -> Result<Option<u64>, String> {
        let path = self.files.layer(layer);
        let file = File::open(&path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
        let size = file.metadata().map_err(|error| error.to_string())?.len();
        if size != record.size {
            return Err(format!("its file has {size} bytes instead of {}", record.size));
        }
        if record.tar_split == 0 {
            let image = ImageReader::new(file).and_then(|image| image.root().map(drop));
            return image.map(|()| None).map_err(|error| error.to_string());
        }
        let mut hashing = Hashing::default();
        rebuild(&file, record.size - record.tar_split, record.tar_split, &mut hashing)
            .map_err(|error| error.to_string())?;
        // What was read would only push out what containers use.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        let bytes = hashing.bytes;
        let found = hashing.digest();
        match found == layer.as_str() {
            true => Ok(Some(bytes)),
            false => Err(format!("its content is damaged: it gives an archive with the digest {found}")),
        }
    }

    fn images_of(&self, layer: &LayerId) -> Vec<String> {
        let catalogue = self.read();
        let users = catalogue.images.iter().filter(|(_, entry)| entry.record.layers.contains(layer));
        users.map(|(id, _)| id.clone()).collect()
    }

    /// Index, manifest and configuration of each image. Returns the ids of images that lack one of them.
    fn check_documents(&self, report: &mut CheckReport) -> Result<Vec<String>, StoreError> {
        let images: Vec<(String, Vec<String>)> = {
            let catalogue = self.read();
            let documents = |record: &super::index::ImageRecord| {
                record.documents.iter().map(ToString::to_string).collect::<Vec<_>>()
            };
            catalogue.images.iter().map(|(id, entry)| (id.clone(), documents(&entry.record))).collect()
        };
        let mut broken = Vec::new();
        for (id, documents) in images {
            for digest in documents.into_iter().chain([id.clone()]) {
                let reason = match (self.index.blob(&digest)?, digest.parse::<Digest>()) {
                    (None, _) => "a document of the image is missing",
                    (Some(bytes), Ok(wanted)) if !wanted.matches(&bytes) => {
                        "a document of the image is damaged"
                    }
                    _ => continue,
                };
                if !self.read().images.contains_key(&id) {
                    break;
                }
                let (subject, reason) = (digest, reason.to_owned());
                report.problems.push(Problem { subject, reason, images: vec![id.clone()] });
                broken.push(id.clone());
            }
        }
        broken.dedup();
        Ok(broken)
    }

    fn check_files(&self, report: &mut CheckReport) -> Result<(), StoreError> {
        let _writer = self.write();
        let known: std::collections::HashSet<String> =
            self.read().layers.keys().map(|layer| layer.hex().to_owned()).collect();
        let mut leftovers = self.files.leftovers(|hex| known.contains(hex))?;
        leftovers.extend(self.blob_leftovers()?);
        for leftover in leftovers {
            report.problems.push(Problem {
                subject: leftover.path.display().to_string(),
                reason: "a file that no image needs".to_owned(),
                images: Vec::new(),
            });
        }
        Ok(())
    }

    /// Takes damaged layers and images out of the index, and the files of those layers away.
    fn take_out(&self, layers: Vec<LayerId>, mut images: Vec<String>) -> Result<(), StoreError> {
        let withdrawn;
        {
            let _writer = self.write();
            images.extend(layers.iter().flat_map(|layer| self.images_of(layer)));
            images.sort();
            images.dedup();
            let mut change = Change { delete_layers: layers, ..Change::default() };
            {
                let catalogue = self.read();
                for id in &images {
                    let removal = catalogue.removal(id);
                    change.delete_images.extend(removal.delete_images);
                    change.delete_names.extend(removal.delete_names);
                    change.delete_blobs.extend(removal.delete_blobs);
                }
            }
            self.commit_removal(&change)?;
            self.apply(&change, BTreeMap::new());
            self.mounts.unmount(&change.delete_layers);
            let mut gone = Vec::new();
            for layer in &change.delete_layers {
                gone.extend(self.files.withdraw(layer)?);
            }
            gone.extend(self.withdraw_unused()?);
            gone.extend(self.withdraw_blobs()?);
            withdrawn = gone;
        }
        drop(withdrawn);
        Ok(())
    }

    /// Writes the tar stream of a layer to `out`, exactly as it was pulled. The caller compares the digest if it must
    /// not trust the disk, and holds the layer. Blocking.
    pub fn write_archive(&self, layer: &LayerId, out: &mut impl Write) -> Result<(), ArchiveFailure> {
        let record = self.read().layers.get(layer).copied();
        let Some(record) = record.filter(|record| record.tar_split > 0) else {
            return Err(ArchiveFailure::NoWayBack(layer.clone()));
        };
        let path = self.files.layer(layer);
        let file = File::open(&path).map_err(failed("open", &path))?;
        match rebuild(&file, record.size - record.tar_split, record.tar_split, out) {
            Ok(()) => Ok(()),
            Err(RebuildError::Output(error)) => Err(ArchiveFailure::Output(error)),
            Err(RebuildError::Layer(source)) => {
                Err(StoreError::File { action: "read", path, source: Arc::new(source) }.into())
            }
        }
    }
}

/// Why a layer's archive was not written.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveFailure {
    /// The layer is not here, or was pulled by a version of hull that did not keep what leads back to its archive.
    #[error("there is no way back from layer {0} to its archive")]
    NoWayBack(LayerId),
    /// The layer file cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody takes the archive.
    #[error("cannot write the archive: {0}")]
    Output(#[source] io::Error),
}

/// Takes an archive for the sake of its digest.
#[derive(Default)]
pub(super) struct Hashing {
    hash: Sha256,
    bytes: u64,
}

impl Hashing {
    /// Of everything so far.
    pub(super) fn digest(self) -> String {
        format!("sha256:{}", hex::encode(self.hash.finalize()))
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
