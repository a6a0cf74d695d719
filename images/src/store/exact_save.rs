//! Images as files with the manifest that they came with. Layers that were not kept as they were compressed are fetched
//! once more from where the image came from, each when its turn comes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::digest::{Digest, Hasher};
use crate::image::Image;
use crate::layer::Compression;
use crate::reference::Reference;
use crate::registry::{Credentials, Descriptor, Registry};

use super::ImageStore;
use super::error::StoreError;
use super::files::failed;
use super::origins::{Compressed, Login, Lost};
use super::push::{Known, contains};
use super::save::{Blob, SaveError, SaveProgress, Saved, Saving, Source, Wanted};

/// Least time between two steps of progress of one layer.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How an image came to its manifest: the members of the same names of [`Saved`].
#[derive(Default)]
struct CameBy {
    indexes: Vec<(Digest, Bytes)>,
    digests: Vec<String>,
}

/// A layer to be had as it was compressed: kept, or else to be fetched.
pub(super) struct Fetching {
    descriptor: Descriptor,
    origins: Arc<Vec<Registry>>,
    runtime: Handle,
    /// As it was asked for.
    image: String,
}

impl ImageStore {
    /// Prepares to save the images that `names` mean as [`ImageStore::save`] does, but each with the manifest that it
    /// came with, to the byte: what is not kept of it is fetched from where it came from while the archive is written,
    /// with the credentials that `logins` has at the name's place. The archive tells the digests by which the images
    /// came, and [`ImageStore::load`] gives them back.
    pub async fn save_exactly(
        self: &Arc<Self>,
        names: &[String],
        logins: &[Option<Credentials>],
    ) -> Result<Saving, SaveError> {
        let (wanted, hold) = self.wanted(names)?;
        let mut images = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let login = logins.get(wanted.first).cloned().flatten();
            images.push(self.exactly(&names[wanted.first], wanted, login).await?);
        }
        Ok(Saving { store: self.clone(), images, _hold: hold })
    }

    async fn exactly(
        &self,
        name: &str,
        wanted: Wanted,
        login: Option<Credentials>,
    ) -> Result<Saved, SaveError> {
        let Wanted { image, tags, .. } = wanted;
        let not_exact = |reason: String| SaveError::NotExact { image: name.to_owned(), reason };
        let known = self.meant(name, self.known_manifests(&image)?)?.ok_or_else(|| {
            not_exact("it came without a manifest, from a container or a docker archive".to_owned())
        })?;
        let named_registry = Self::named_registry(name, &image);
        let login = |_: &Reference, is_meant| Login::With(login.clone().filter(|_| is_meant));
        let origins = self.origins(&image, named_registry.as_deref(), login).await;
        let origins = Arc::new(origins.map_err(|error| not_exact(error.to_string()))?);
        let mut layers = Vec::with_capacity(image.config.diff_ids.len());
        for (descriptor, layer) in known.manifest.layers.iter().zip(&image.config.diff_ids) {
            let compression = Compression::from_media_type(&descriptor.media_type);
            let source = if compression.is_ok_and(|one| one == Compression::None) {
                // Refuses a layer without a way back before anything is written.
                self.size_of_archive(&image, layer)?;
                Source::Archive(layer.clone())
            } else if origins.is_empty() && self.kept(&descriptor.digest).is_none() {
                let reason = "layers were not kept as they were compressed, and it is not known where they could be had again";
                return Err(not_exact(reason.to_owned()));
            } else {
                let (descriptor, origins) = (descriptor.clone(), Arc::clone(&origins));
                Source::Registry(Fetching {
                    descriptor,
                    origins,
                    runtime: Handle::current(),
                    image: name.to_owned(),
                })
            };
            layers.push(Blob { digest: descriptor.digest.to_string(), size: descriptor.size, source });
        }
        let CameBy { indexes, digests } = self.came_by(&image, &known)?;
        let Known { bytes: manifest, media_type, .. } = known;
        Ok(Saved { image, tags, manifest, media_type, layers, indexes, digests })
    }

    /// The references with digests that led to this manifest, and the indexes among what they name.
    fn came_by(&self, image: &Image, known: &Known) -> Result<CameBy, StoreError> {
        let CameBy { mut indexes, mut digests } = CameBy::default();
        for name in &image.repo_digests {
            let Some(digest) = name.parse::<Reference>().ok().and_then(|name| name.digest().cloned()) else {
                continue;
            };
            if digest != known.digest && indexes.iter().all(|(index, _)| *index != digest) {
                // An index of an earlier pull leads to another manifest of the same image.
                let manifest = known.digest.to_string();
                match self.document(&digest.to_string())? {
                    Some(bytes) if contains(&bytes, manifest.as_bytes()) => indexes.push((digest, bytes)),
                    _ => continue,
                }
            }
            digests.push(name.clone());
        }
        Ok(CameBy { indexes, digests })
    }
}

impl Fetching {
    /// The blob, verified: the file that was kept, or one without a name. Blocking; not to be called by a task. `tell`
    /// hears how far one that is fetched has come: all of its bytes are here when they are known to be the right ones.
    pub(super) fn fetch(
        &self,
        store: &ImageStore,
        tell: &mut dyn FnMut(SaveProgress),
    ) -> Result<File, SaveError> {
        if let Some(kept) = store.verified(&self.descriptor) {
            return Ok(kept);
        }
        let mut file = store.files.scratch()?;
        let mut reasons = Vec::new();
        for origin in self.origins.iter() {
            let mut blob = Compressed::of_registry(origin.blob(&self.descriptor));
            loop {
                match self.runtime.block_on(self.receive(&mut blob, &mut file, store, tell)) {
                    Ok(()) => {
                        tell(self.progress(self.descriptor.size));
                        return Ok(file);
                    }
                    Err(Failure::Store(error)) => return Err(error.into()),
                    Err(Failure::Origin(Lost::Failed(error))) => reasons.push(error.to_string()),
                    Err(Failure::Origin(Lost::Wrong)) => {
                        reasons.push("what came is something else".to_owned());
                        if let Some(other) = blob.elsewhere() {
                            blob = other;
                            continue;
                        }
                    }
                }
                break;
            }
        }
        if self.origins.is_empty() {
            reasons.push("it is not known where".to_owned());
        }
        let reason = format!(
            "layer {}, which was not kept as it was compressed, cannot be had again: {}",
            self.descriptor.digest,
            reasons.join("; ")
        );
        Err(SaveError::NotExact { image: self.image.clone(), reason })
    }

    fn progress(&self, bytes: u64) -> SaveProgress {
        SaveProgress { layer: self.descriptor.digest.clone(), bytes, of: self.descriptor.size }
    }

    async fn receive(
        &self,
        blob: &mut Compressed,
        file: &mut File,
        store: &ImageStore,
        tell: &mut dyn FnMut(SaveProgress),
    ) -> Result<(), Failure> {
        let kept = |source| Failure::Store(failed("write", store.files.layers())(source));
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(kept)?;
        let mut hasher = Hasher::new(self.descriptor.digest.algorithm());
        let (mut size, mut told) = (0, None::<Instant>);
        loop {
            let Some(piece) = blob.chunk().await.map_err(Failure::Origin)? else { break };
            size += piece.len() as u64;
            hasher.update(&piece);
            file.write_all(&piece).map_err(kept)?;
            let is_due = told.is_none_or(|told| told.elapsed() >= PROGRESS_INTERVAL);
            // What is whole is not yet what it should be.
            if size < self.descriptor.size && is_due {
                tell(self.progress(size));
                told = Some(Instant::now());
            }
        }
        match size == self.descriptor.size && hasher.finish() == self.descriptor.digest {
            true => Ok(()),
            false => Err(Failure::Origin(Lost::Wrong)),
        }
    }
}

/// Why a blob is not here.
enum Failure {
    Store(StoreError),
    Origin(Lost),
}
