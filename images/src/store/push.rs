//! Pushes: an image to a registry, as it was pulled where the registry still has its blobs, else with layers that are
//! compressed anew.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use flate2::Compression as Level;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::digest::{Algorithm, Digest, Hasher};
use crate::image::Image;
use crate::layer::{Compression, LayerId};
use crate::reference::Reference;
use crate::registry::{Credentials, Descriptor, Document, Manifest, Registry, RegistryError};

use super::ImageStore;
use super::check::ArchiveFailure;
use super::error::StoreError;
use super::origins::blocking;

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Bytes of one request: large for speed, small enough to be sent again, and to be held in memory.
pub(super) const CHUNK: usize = 8 << 20;
/// Fast: who pushes waits, and layers compress by half at any level.
const LEVEL: u32 = 4;
/// Repositories of the same registry that are asked for a layer.
const MAX_SOURCES: usize = 8;
/// How often a layer's upload may begin. Registries do not agree on how to go on in the middle of a chunk.
pub(super) const MAX_ATTEMPTS: u32 = 3;

/// Why an image was not pushed. Layers that were sent stay at the registry, which clears away what nothing refers to.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// There is no such image here.
    #[error("there is no image {0:?}")]
    NoImage(String),
    /// The registry cannot be reached, or refuses.
    #[error("cannot push image {image}: {source}")]
    Registry {
        /// Where to.
        image: String,
        /// What went wrong.
        source: Box<RegistryError>,
    },
    /// The registry lacks a layer, and it cannot be made again.
    #[error("cannot push image {image}: layer {layer}: {source}")]
    Layer {
        /// Where to.
        image: String,
        /// Which layer.
        layer: LayerId,
        /// Why not.
        source: ArchiveFailure,
    },
    /// The image cannot be pushed with the digest that it came with.
    #[error("cannot push image {image} as it came: {reason}")]
    NotExact {
        /// Where to.
        image: String,
        /// Why not.
        reason: String,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is asked of a push beyond its target.
#[derive(Debug, Default)]
pub struct PushOptions {
    /// How to log in where it goes to.
    pub credentials: Option<Credentials>,
    /// The manifest that the image came with, and so its digest, to the byte. What the target lacks of its layers, and was
    /// not kept as it was compressed, is fetched once more from where the image came from, and passed on.
    pub exact: bool,
    /// How to log in there.
    pub source_credentials: Option<Credentials>,
}

/// What was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Digest of the manifest at the target.
    pub digest: Digest,
    /// The digest that the image came with, if it is another one: layers were compressed anew.
    pub came_with: Option<Digest>,
}

/// What a push does with a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PushProgress {
    /// The registry has it already, or took it from another repository.
    Exists(LayerId),
    /// So many compressed bytes of it were sent.
    Sent(LayerId, u64),
    /// All of it was sent.
    Done(LayerId),
}

/// A manifest that the image came with.
pub(super) struct Known {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) bytes: Bytes,
    pub(super) manifest: Manifest,
}

/// A push that is under way.
pub(super) struct Push<'p> {
    pub(super) store: &'p Arc<ImageStore>,
    pub(super) image: &'p Image,
    pub(super) target: &'p Reference,
    pub(super) registry: &'p Registry,
    /// Repositories of the target's registry that may have layers.
    sources: &'p [String],
    /// The registry in the name by which the image was asked for, if it was a name.
    pub(super) named_registry: Option<String>,
}

impl ImageStore {
    /// Pushes the image that `name` means (as in [`ImageStore::find`]) to `target`, a tag. Its manifest there is the one
    /// that it came with if the registry has all blobs of that, or gets them (`exact`).
    pub async fn push(
        self: &Arc<Self>,
        name: &str,
        target: &Reference,
        options: PushOptions,
        mut progress: impl FnMut(PushProgress),
    ) -> Result<Pushed, PushError> {
        let image = self.find(name)?.ok_or_else(|| PushError::NoImage(name.to_owned()))?;
        let _hold = self.hold(&image.config.diff_ids);
        let sources = sources(&image, target);
        let registry = {
            let (target, sources, config) = (target.clone(), sources.clone(), self.config.clone());
            let credentials = options.credentials.clone().filter(|credentials| !credentials.is_empty());
            blocking(move || {
                let hosts = &config.hosts_dir;
                Registry::for_push(&target, &sources, credentials.as_ref(), hosts, config.progress_timeout)
            })
        };
        let registry = registry.await.map_err(|source| failed(target, source))?;
        let known = self.known_manifests(&image)?;
        let push = Push {
            store: self,
            image: &image,
            target,
            registry: &registry,
            sources: &sources,
            named_registry: Self::named_registry(name, &image),
        };
        match options.exact {
            true => push.exactly(self.meant(name, known)?, &options, &mut progress).await,
            false => push.as_it_comes(&known, &mut progress).await,
        }
    }

    /// The manifests that the image came with, the latest last.
    pub(super) fn known_manifests(&self, image: &Image) -> Result<Vec<Known>, StoreError> {
        let documents = match self.read().images.get(&image.id) {
            Some(entry) => entry.record.documents.clone(),
            None => Vec::new(),
        };
        self.manifests(documents, image.config.diff_ids.len())
    }

    /// Those of the stored documents that are manifests of so many layers.
    pub(super) fn manifests(&self, documents: Vec<Digest>, layers: usize) -> Result<Vec<Known>, StoreError> {
        let mut manifests = Vec::new();
        for digest in documents {
            let Some(bytes) = self.index.blob(&digest.to_string())? else { continue };
            if let Ok(Document::Manifest(manifest)) = Document::parse(&digest, MANIFEST, &bytes)
                && manifest.layers.len() == layers
            {
                let own = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
                let media_type = own["mediaType"].as_str().unwrap_or(MANIFEST).to_owned();
                manifests.push(Known { digest, media_type, bytes: Bytes::from(bytes), manifest });
            }
        }
        Ok(manifests)
    }

    /// Whether the manifest that came last with an image is the one of this digest, or in the index of it.
    pub(super) fn came_last_by(&self, id: &str, digest: &Digest) -> Result<bool, StoreError> {
        let latest = self.read().images.get(id).and_then(|entry| entry.record.documents.last().cloned());
        let Some(latest) = latest else { return Ok(false) };
        let index = || Ok(self.document(&digest.to_string())?.unwrap_or_default());
        Ok(latest == *digest || contains(&index()?, latest.to_string().as_bytes()))
    }

    /// Which of an image's manifests `name` means: the one that its digest is, or that the index of this digest names;
    /// by a tag or an id the latest. None if there is none such.
    pub(super) fn meant(&self, name: &str, known: Vec<Known>) -> Result<Option<Known>, StoreError> {
        let reference = name.parse::<Reference>().ok();
        let Some(digest) = reference.as_ref().and_then(Reference::digest) else {
            return Ok(known.into_iter().next_back());
        };
        let index = self.document(&digest.to_string())?.unwrap_or_default();
        let is_meant =
            |known: &Known| known.digest == *digest || contains(&index, known.digest.to_string().as_bytes());
        Ok(known.into_iter().rev().find(is_meant))
    }
}

/// Whether a document has this in it.
pub(super) fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

impl Push<'_> {
    /// Layers as the registry has them, the others as they were kept or compressed anew.
    async fn as_it_comes(
        &self,
        known: &[Known],
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<Pushed, PushError> {
        let mut layers = Vec::with_capacity(self.image.config.diff_ids.len());
        for (number, layer) in self.image.config.diff_ids.iter().enumerate() {
            let found = self.offered(known, number).await.map_err(|source| self.failed(source))?;
            let descriptor = match found {
                Some(descriptor) => {
                    progress(PushProgress::Exists(layer.clone()));
                    descriptor
                }
                None => match self.kept(known, number, layer, progress).await? {
                    Some(descriptor) => descriptor,
                    None => self.compressed(layer, progress).await?,
                },
            };
            layers.push(descriptor);
        }
        let config = self.config().await?;
        if let Some(same) = known.iter().find(|known| known.manifest.layers == layers) {
            return self.finish(&same.media_type, same.bytes.clone(), None).await;
        }
        let came_with = known.last().map(|known| known.digest.clone());
        self.finish(MANIFEST, Bytes::from(manifest(self.image, &config, &layers)), came_with).await
    }

    /// Sees to it that the registry has the configuration, and tells its digest.
    pub(super) async fn config(&self) -> Result<Digest, PushError> {
        let raw = &self.image.config.raw;
        // Its own, by whichever algorithm: manifests that the image came with name it.
        let config = self.image.id.parse().unwrap_or_else(|_| Digest::sha256(raw));
        let send = async {
            if !self.registry.has_blob(&config).await? {
                let mut upload = self.registry.begin_blob().await?;
                upload.chunk(raw.clone()).await?;
                upload.finish(&config).await?;
            }
            Ok(())
        };
        send.await.map_err(|source| self.failed(source))?;
        Ok(config)
    }

    /// The last step: the manifest makes it an image.
    async fn finish(
        &self,
        media_type: &str,
        bytes: Bytes,
        came_with: Option<Digest>,
    ) -> Result<Pushed, PushError> {
        let digest = Digest::sha256(&bytes);
        let tag = self.target.tag().unwrap_or("latest");
        self.registry.put_manifest(tag, media_type, bytes).await.map_err(|source| self.failed(source))?;
        Ok(Pushed { digest, came_with })
    }

    /// The last step of a push with a manifest that is known.
    pub(super) async fn finish_with(&self, known: &Known) -> Result<Pushed, PushError> {
        self.finish(&known.media_type, known.bytes.clone(), None).await
    }

    /// The layer as the registry has it already, in the repository itself or in one that the image came from.
    async fn offered(&self, known: &[Known], number: usize) -> Result<Option<Descriptor>, RegistryError> {
        for Known { manifest, .. } in known {
            let Some(descriptor) = manifest.layers.get(number) else { continue };
            if Compression::from_media_type(&descriptor.media_type).is_ok() && self.has(descriptor).await? {
                return Ok(Some(descriptor.clone()));
            }
        }
        Ok(None)
    }

    /// The layer as it was kept, sent.
    async fn kept(
        &self,
        known: &[Known],
        number: usize,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<Option<Descriptor>, PushError> {
        for Known { manifest, .. } in known {
            let Some(descriptor) = manifest.layers.get(number) else { continue };
            if self.send_kept(descriptor, layer, progress).await? {
                progress(PushProgress::Done(layer.clone()));
                return Ok(Some(descriptor.clone()));
            }
        }
        Ok(None)
    }

    /// Whether the registry has the blob, or takes it over from another repository.
    pub(super) async fn has(&self, descriptor: &Descriptor) -> Result<bool, RegistryError> {
        if self.registry.has_blob(&descriptor.digest).await? {
            return Ok(true);
        }
        for source in self.sources {
            // A registry that does not let us have it there is no reason not to send it.
            if matches!(self.registry.mount_blob(&descriptor.digest, source).await, Ok(true)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Compresses a layer and sends it, both at the same time.
    async fn compressed(
        &self,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<Descriptor, PushError> {
        let mut attempt = 1;
        let (digest, size) = loop {
            match self.send_archive(layer, true, progress).await {
                Err(PushError::Registry { source, .. }) if attempt < MAX_ATTEMPTS && is_cut(&source) => {
                    tracing::debug!(%layer, error = %source, "the upload of a layer begins anew");
                    attempt += 1;
                }
                other => break other?,
            }
        };
        progress(PushProgress::Done(layer.clone()));
        Ok(Descriptor { media_type: format!("{LAYER}+gzip"), digest, size })
    }

    /// Sends a layer's archive, compressed or as it is; tells digest and size of what was sent.
    pub(super) async fn send_archive(
        &self,
        layer: &LayerId,
        compress: bool,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<(Digest, u64), PushError> {
        let (sender, mut chunks) = mpsc::channel(2);
        let (store, wanted) = (Arc::clone(self.store), layer.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let mut out = Chunks { sender, buffer: Vec::with_capacity(CHUNK) };
            if !compress {
                store.write_archive(&wanted, &mut out)?;
                return out.flush().map_err(ArchiveFailure::Output);
            }
            let mut gzip = GzEncoder::new(out, Level::new(LEVEL));
            store.write_archive(&wanted, &mut gzip)?;
            let finish = || gzip.finish()?.flush();
            finish().map_err(ArchiveFailure::Output)
        });
        let sending = async {
            let mut upload = self.registry.begin_blob().await?;
            let mut hasher = Hasher::new(Algorithm::Sha256);
            let mut size = 0;
            while let Some(chunk) = chunks.recv().await {
                let chunk: Bytes = chunk;
                hasher.update(&chunk);
                size += chunk.len() as u64;
                upload.chunk(chunk).await?;
                progress(PushProgress::Sent(layer.clone(), size));
            }
            Ok((upload, hasher.finish(), size))
        };
        let sent = sending.await;
        // Without a reader whoever writes comes to an end.
        drop(chunks);
        let broken =
            |source| PushError::Layer { image: self.target.to_string(), layer: layer.clone(), source };
        let cancelled = |_| broken(ArchiveFailure::Output(io::ErrorKind::Interrupted.into()));
        let written = writing.await.map_err(cancelled)?;
        let (upload, digest, size) = sent.map_err(|source| self.failed(source))?;
        written.map_err(broken)?;
        upload.finish(&digest).await.map_err(|source| self.failed(source))?;
        Ok((digest, size))
    }

    pub(super) fn failed(&self, source: RegistryError) -> PushError {
        failed(self.target, source)
    }
}

fn failed(target: &Reference, source: RegistryError) -> PushError {
    PushError::Registry { image: target.to_string(), source: Box::new(source) }
}

/// Whether another upload of the same may go better: the connection broke, or the registry has another idea of what came
/// before it did (416 by the specification, 400 and 404 where an upload is given up).
pub(super) fn is_cut(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::Unreachable { .. } | RegistryError::Status { status: 400 | 404 | 416 | 500..=599, .. }
    )
}

/// Repositories of the target's registry that the image came from.
fn sources(image: &Image, target: &Reference) -> Vec<String> {
    let mut sources = Vec::new();
    for name in image.repo_digests.iter().chain(&image.repo_tags) {
        if let Ok(name) = name.parse::<Reference>()
            && name.domain() == target.domain()
            && name.path() != target.path()
            && !sources.iter().any(|known| known == name.path())
        {
            sources.push(name.path().to_owned());
        }
    }
    sources.truncate(MAX_SOURCES);
    sources
}

fn manifest(image: &Image, config: &Digest, layers: &[Descriptor]) -> Vec<u8> {
    let layers: Vec<Value> = layers
        .iter()
        .map(|layer| {
            // An OCI manifest names OCI's types, also for what a docker manifest named.
            let suffix = match Compression::from_media_type(&layer.media_type) {
                Ok(Compression::Gzip) => "+gzip",
                Ok(Compression::Zstd) => "+zstd",
                _ => "",
            };
            json!({"mediaType": format!("{LAYER}{suffix}"), "digest": layer.digest.to_string(), "size": layer.size})
        })
        .collect();
    let config = json!({"mediaType": CONFIG, "digest": config.to_string(), "size": image.config.raw.len()});
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers})
        .to_string()
        .into_bytes()
}

/// Gathers bytes into requests.
struct Chunks {
    sender: mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..take]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK)));
        self.sender.blocking_send(chunk).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}
