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

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Bytes of one request: large for speed, small enough to be sent again, and to be held in memory.
const CHUNK: usize = 8 << 20;
/// Fast: who pushes waits, and layers compress by half at any level.
const LEVEL: u32 = 4;
/// Repositories of the same registry that are asked for a layer.
const MAX_SOURCES: usize = 8;

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
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
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

impl ImageStore {
    /// Pushes the image that `name` means (as in [`ImageStore::find`]) to `target`, a tag, and returns the digest of
    /// its manifest there. It is the one that it was pulled with, if the registry has all blobs of that.
    pub async fn push(
        self: &Arc<Self>,
        name: &str,
        target: &Reference,
        credentials: Option<Credentials>,
        mut progress: impl FnMut(PushProgress),
    ) -> Result<Digest, PushError> {
        let image = self.find(name)?.ok_or_else(|| PushError::NoImage(name.to_owned()))?;
        let _hold = self.hold(&image.config.diff_ids);
        let failed = |source| PushError::Registry { image: target.to_string(), source: Box::new(source) };
        let sources = sources(&image, target);
        let registry = {
            let (target, sources, config) = (target.clone(), sources.clone(), self.config.clone());
            let credentials = credentials.filter(|credentials| !credentials.is_empty());
            let open = move || {
                let hosts = &config.hosts_dir;
                Registry::for_push(&target, &sources, credentials.as_ref(), hosts, config.progress_timeout)
            };
            let cancelled = |_| {
                failed(RegistryError::Protocol {
                    host: String::new(),
                    reason: "the push was cancelled".to_owned(),
                })
            };
            tokio::task::spawn_blocking(open).await.map_err(cancelled)?.map_err(failed)?
        };
        let known = self.known_manifests(&image)?;
        let mut layers = Vec::with_capacity(image.config.diff_ids.len());
        for (number, layer) in image.config.diff_ids.iter().enumerate() {
            let found = offered(&registry, &known, number, &sources).await.map_err(failed)?;
            let descriptor = match found {
                Some(descriptor) => {
                    progress(PushProgress::Exists(layer.clone()));
                    descriptor
                }
                None => self.send_layer(&registry, target, layer, &mut progress).await?,
            };
            layers.push(descriptor);
        }
        let config = Digest::sha256(&image.config.raw);
        if !registry.has_blob(&config).await.map_err(failed)? {
            let mut upload = registry.begin_blob().await.map_err(failed)?;
            upload.chunk(image.config.raw.clone()).await.map_err(failed)?;
            upload.finish(&config).await.map_err(failed)?;
        }
        let same = known.iter().find(|(_, _, manifest)| manifest.layers == layers);
        let (media_type, bytes) = match same {
            Some((media_type, bytes, _)) => (media_type.clone(), bytes.clone()),
            None => (MANIFEST.to_owned(), Bytes::from(manifest(&image, &config, &layers))),
        };
        let digest = Digest::sha256(&bytes);
        let tag = target.tag().unwrap_or("latest");
        registry.put_manifest(tag, &media_type, bytes).await.map_err(failed)?;
        Ok(digest)
    }

    /// The manifests that the image was pulled with: media type, bytes, content.
    fn known_manifests(&self, image: &Image) -> Result<Vec<(String, Bytes, Manifest)>, StoreError> {
        let documents = match self.read().images.get(&image.id) {
            Some(entry) => entry.record.documents.clone(),
            None => Vec::new(),
        };
        let mut manifests = Vec::new();
        for digest in documents {
            let Some(bytes) = self.index.blob(&digest.to_string())? else { continue };
            if let Ok(Document::Manifest(manifest)) = Document::parse(&digest, MANIFEST, &bytes)
                && manifest.layers.len() == image.config.diff_ids.len()
            {
                let own = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
                let media_type = own["mediaType"].as_str().unwrap_or(MANIFEST).to_owned();
                manifests.push((media_type, Bytes::from(bytes), manifest));
            }
        }
        Ok(manifests)
    }

    /// Compresses a layer and sends it, both at the same time.
    async fn send_layer(
        self: &Arc<Self>,
        registry: &Registry,
        target: &Reference,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<Descriptor, PushError> {
        let failed = |source| PushError::Registry { image: target.to_string(), source: Box::new(source) };
        let (sender, mut chunks) = mpsc::channel(2);
        let (store, wanted) = (Arc::clone(self), layer.clone());
        let compressing = tokio::task::spawn_blocking(move || {
            let out = Chunks { sender, buffer: Vec::with_capacity(CHUNK) };
            let mut gzip = GzEncoder::new(out, Level::new(LEVEL));
            store.write_archive(&wanted, &mut gzip)?;
            let finish = || gzip.finish()?.flush();
            finish().map_err(ArchiveFailure::Output)
        });
        let mut upload = registry.begin_blob().await.map_err(failed)?;
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut size = 0;
        while let Some(chunk) = chunks.recv().await {
            let chunk: Bytes = chunk;
            hasher.update(&chunk);
            size += chunk.len() as u64;
            upload.chunk(chunk).await.map_err(failed)?;
            progress(PushProgress::Sent(layer.clone(), size));
        }
        let broken = |source| PushError::Layer { image: target.to_string(), layer: layer.clone(), source };
        let cancelled = |_| broken(ArchiveFailure::Output(io::ErrorKind::Interrupted.into()));
        compressing.await.map_err(cancelled)?.map_err(broken)?;
        let digest = hasher.finish();
        upload.finish(&digest).await.map_err(failed)?;
        progress(PushProgress::Done(layer.clone()));
        Ok(Descriptor { media_type: format!("{LAYER}+gzip"), digest, size })
    }
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

/// The layer as the registry has it already, in the repository itself or in one that the image came from.
async fn offered(
    registry: &Registry,
    known: &[(String, Bytes, Manifest)],
    number: usize,
    sources: &[String],
) -> Result<Option<Descriptor>, RegistryError> {
    for (_, _, manifest) in known {
        let Some(descriptor) = manifest.layers.get(number) else { continue };
        if Compression::from_media_type(&descriptor.media_type).is_err() {
            continue;
        }
        if registry.has_blob(&descriptor.digest).await? {
            return Ok(Some(descriptor.clone()));
        }
        for source in sources {
            // A registry that does not let us have it there is no reason not to send it.
            if matches!(registry.mount_blob(&descriptor.digest, source).await, Ok(true)) {
                return Ok(Some(descriptor.clone()));
            }
        }
    }
    Ok(None)
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
