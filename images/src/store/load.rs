//! Images out of a file: an OCI image layout (image-spec image-layout.md) or a docker archive, in a tar archive that may
//! be compressed. What is in it is as hostile as what comes from a registry, and checked by the same code.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use serde::Deserialize;

use crate::digest::{Algorithm, Digest, Hasher};
use crate::image::{ConfigError, Image, ImageConfig, MAX_CONFIG, MAX_LAYERS};
use crate::layer::{BlobExpectation, Compression, LayerError, LayerId, MAGIC_LEN};
use crate::reference::Reference;
use crate::registry::{
    Descriptor, Document, MAX_INDEX_DEPTH, MAX_MANIFEST, Manifest, Platform, RegistryError, candidates,
};

use super::ImageStore;
use super::arrival::Arrival;
use super::error::StoreError;
use super::spool::{Range, Spool};
use super::staged::{StageError, Staged};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Most images of one file.
const MAX_IMAGES: usize = 1000;
/// Largest index.json or manifest.json.
const MAX_INDEX: u64 = 16 << 20;
/// Where names of images are: containerd's in full, the specification's often a tag only.
pub(super) const NAME: &str = "io.containerd.image.name";
pub(super) const SHORT_NAME: &str = "org.opencontainers.image.ref.name";
/// hull's own: references with digests, separated by commas, by which the image once came. What they name is in the
/// archive.
pub(super) const DIGESTS: &str = "io.hull.image.digests";
/// Most of those.
const MAX_DIGESTS: usize = 64;

/// Why a file was not loaded. Images of it that came before the wrong one are there.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read, or not be kept until it was.
    #[error("cannot read the archive: {0}")]
    Read(#[source] io::Error),
    /// It is no tar archive.
    #[error("the archive cannot be read: {0}")]
    Archive(#[source] Box<LayerError>),
    /// It is a tar archive, but not one of images.
    #[error("the archive holds no images: {0}")]
    NoImages(String),
    /// An index or manifest of it is refused.
    #[error("the archive is refused: {0}")]
    Document(#[source] Box<RegistryError>),
    /// An image's configuration is refused.
    #[error("image {image}: configuration: {source}")]
    Config {
        /// Its id, as the archive has it.
        image: String,
        /// Why.
        source: ConfigError,
    },
    /// Something that a manifest names is not in the archive, or is something else.
    #[error("image {image}: {reason}")]
    Image {
        /// Its id, as the archive has it.
        image: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer's content is refused.
    #[error("image {image}: layer {layer}: {source}")]
    Layer {
        /// The image's id.
        image: String,
        /// Which layer.
        layer: String,
        /// What is wrong with it.
        source: Box<LayerError>,
    },
    /// The store cannot keep it.
    #[error("cannot store image {image}: {source}")]
    Store {
        /// The image's id.
        image: String,
        /// Why.
        source: StoreError,
    },
}

/// One image of an archive before it was looked at closely.
struct Found {
    id: Digest,
    config: Vec<u8>,
    documents: Vec<(Digest, Bytes)>,
    /// One for each layer, lowest first.
    layers: Vec<Source>,
    names: Vec<String>,
}

struct Source {
    range: Range,
    /// What the manifest says of it; a docker archive says nothing.
    descriptor: Option<Descriptor>,
}

impl ImageStore {
    /// A file without a name on the store's filesystem, for what comes as a stream.
    pub fn scratch_file(&self) -> Result<File, StoreError> {
        self.files.scratch()
    }

    /// Loads all images of the archive in `file`, those for this machine where there is a choice. Tags of the archive
    /// become theirs; each that is there is told to `progress`. Blocking.
    pub fn load(&self, file: File, mut progress: impl FnMut(&Image)) -> Result<(), LoadError> {
        let scratch = || {
            self.files.scratch().map_err(|source| LoadError::Store { image: "archive".to_owned(), source })
        };
        let spool = Spool::new(file, scratch)?;
        for found in find(&spool)? {
            progress(&self.load_one(&spool, found)?);
        }
        Ok(())
    }

    fn load_one(&self, spool: &Spool, found: Found) -> Result<Image, LoadError> {
        let image = found.id.to_string();
        let wrong = |reason: String| LoadError::Image { image: image.clone(), reason };
        if !found.id.matches(&found.config) {
            return Err(wrong("its configuration has another digest".to_owned()));
        }
        let config = ImageConfig::parse(Bytes::from(found.config))
            .map_err(|source| LoadError::Config { image: image.clone(), source })?;
        let (layers, diff_ids) = (found.layers.len(), config.diff_ids.len());
        if layers != diff_ids {
            return Err(wrong(format!("its manifest has {layers} layers, its configuration {diff_ids}")));
        }
        let hold = self.hold(&config.diff_ids);
        let mut missing: Vec<(&Source, &LayerId)> = Vec::new();
        for (source, diff_id) in found.layers.iter().zip(&config.diff_ids) {
            let here = self.read().layers.contains_key(diff_id);
            if !here && missing.iter().all(|(_, other)| *other != diff_id) {
                missing.push((source, diff_id));
            }
        }
        let staged = self.stage_all(spool, &image, &missing)?;
        let arrival =
            Arrival { id: found.id, config, documents: found.documents, names: found.names, staged };
        let committed = self.commit(&arrival);
        drop(hold);
        committed.map_err(|source| LoadError::Store { image, source })
    }
}

impl ImageStore {
    /// Converts layers, some at a time: one waits for the disk while another is hashed. The first failure ends it.
    fn stage_all(
        &self,
        spool: &Spool,
        image: &str,
        layers: &[(&Source, &LayerId)],
    ) -> Result<Vec<Arc<Staged>>, LoadError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut staged = Vec::new();
            while let Some((source, diff_id)) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                match self.stage_one(spool, image, source, diff_id) {
                    Ok(layer) => staged.push(layer),
                    Err(error) => {
                        next.store(layers.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
            Ok(staged)
        };
        let workers = self.config.max_parallel_layers.clamp(1, layers.len().max(1));
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..workers)
                .map_while(|_| std::thread::Builder::new().name("load".into()).spawn_scoped(scope, work).ok())
                .collect();
            let mut results = vec![work()];
            results.extend(
                others
                    .into_iter()
                    .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
            );
            let staged: Result<Vec<Vec<_>>, _> = results.into_iter().collect();
            staged.map(|staged| staged.into_iter().flatten().collect())
        })
    }

    fn stage_one(
        &self,
        spool: &Spool,
        image: &str,
        source: &Source,
        diff_id: &LayerId,
    ) -> Result<Arc<Staged>, LoadError> {
        let expectation = expectation(spool, source, diff_id).map_err(LoadError::Read)?;
        let reader = spool.reader(source.range);
        let layer = match &source.descriptor {
            Some(_) => self.stage_and_keep(reader, &expectation),
            // No manifest refers to the blob.
            None => self.stage(reader, &expectation),
        };
        layer.map_err(|error| match error {
            StageError::Content(source) => {
                let (image, layer) = (image.to_owned(), diff_id.to_string());
                LoadError::Layer { image, layer, source: Box::new(source) }
            }
            StageError::Store(source) => LoadError::Store { image: image.to_owned(), source },
        })
    }
}

/// What the layer's blob must be. Where nothing says so, it is what it is, and must give the right archive.
fn expectation(spool: &Spool, source: &Source, diff_id: &LayerId) -> io::Result<BlobExpectation> {
    if let Some(descriptor) = &source.descriptor {
        return Ok(BlobExpectation {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            diff_id: diff_id.clone(),
            media_type: descriptor.media_type.clone(),
        });
    }
    let mut magic = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(spool.reader(source.range), MAGIC_LEN as u64), &mut magic)?;
    let compression = Compression::from_magic(&magic);
    if compression == Compression::None
        && let Ok(digest) = diff_id.as_str().parse()
    {
        // It is the archive itself: nothing to be hashed beforehand.
        let media_type = LAYER.to_owned();
        return Ok(BlobExpectation {
            digest,
            size: source.range.length,
            diff_id: diff_id.clone(),
            media_type,
        });
    }
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut reader = spool.reader(source.range);
    let mut buffer = vec![0; 256 << 10];
    loop {
        match io::Read::read(&mut reader, &mut buffer)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    let suffix = match compression {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    Ok(BlobExpectation {
        digest: hasher.finish(),
        size: source.range.length,
        diff_id: diff_id.clone(),
        media_type: format!("{LAYER}{suffix}"),
    })
}

fn find(spool: &Spool) -> Result<Vec<Found>, LoadError> {
    let docker = spool.document("manifest.json", MAX_INDEX)?;
    let mut found = match spool.document("index.json", MAX_INDEX)? {
        Some(index) => layout(spool, &index)?,
        None => Vec::new(),
    };
    if let Some(docker) = docker {
        // Both say the same of the same images, where both are there; the docker form has the full names.
        for image in docker_archive(spool, &docker)? {
            match found.iter_mut().find(|known| known.id == image.id) {
                Some(known) => known.names.extend(image.names),
                None => found.push(image),
            }
        }
    }
    for image in &mut found {
        image.names.sort();
        image.names.dedup();
    }
    match found.is_empty() {
        true => Err(LoadError::NoImages("it has neither an index.json nor a manifest.json".to_owned())),
        false => Ok(found),
    }
}

#[derive(Deserialize)]
struct RawIndex {
    manifests: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEntry {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// The images of an OCI layout.
fn layout(spool: &Spool, index: &[u8]) -> Result<Vec<Found>, LoadError> {
    let raw: RawIndex = serde_json::from_slice(index)
        .map_err(|error| LoadError::NoImages(format!("index.json cannot be read: {error}")))?;
    if raw.manifests.len() > MAX_IMAGES {
        return Err(LoadError::NoImages(format!("it has more than {MAX_IMAGES} images")));
    }
    let mut images: Vec<Found> = Vec::new();
    for entry in raw.manifests {
        let digest: Digest = entry
            .digest
            .parse()
            .map_err(|_| LoadError::NoImages(format!("{:?} in index.json is no digest", entry.digest)))?;
        let mut documents = Vec::new();
        let Some(manifest) = descend(spool, &digest, &entry.media_type, 0, &mut documents)? else { continue };
        let name = entry.annotations.get(NAME).or_else(|| entry.annotations.get(SHORT_NAME));
        // A bare tag ("v1") is a name only together with a repository, which the file does not tell.
        let name = name.filter(|name| name.contains(['/', ':'])).and_then(|name| tag(name));
        let mut names = digest_names(spool, &entry.annotations, &mut documents)?;
        names.extend(name);
        match images.iter_mut().find(|known| known.id == manifest.config.digest) {
            Some(known) => {
                known.names.extend(names);
                documents.retain(|(digest, _)| known.documents.iter().all(|(other, _)| other != digest));
                known.documents.extend(documents);
            }
            None => images.push(image(spool, manifest, documents, names)?),
        }
    }
    Ok(images)
}

/// The references with digests that an entry of index.json tells, and that are true: they name its manifest, or an index
/// that leads to it, which then goes to the image's documents.
fn digest_names(
    spool: &Spool,
    annotations: &BTreeMap<String, String>,
    documents: &mut Vec<(Digest, Bytes)>,
) -> Result<Vec<String>, LoadError> {
    let told = annotations.get(DIGESTS).map(|all| all.split(',')).into_iter().flatten();
    let told = told.chain(annotations.get(NAME).map(String::as_str));
    let mut names = Vec::new();
    for reference in told.take(MAX_DIGESTS).filter_map(|name| name.parse::<Reference>().ok()) {
        let Some(digest) = reference.digest().cloned() else { continue };
        if documents.iter().all(|(known, _)| *known != digest) {
            let mut path = Vec::new();
            descend(spool, &digest, INDEX, 0, &mut path)?;
            let ends_here =
                path.last().is_some_and(|(end, _)| documents.iter().any(|(known, _)| known == end));
            if !ends_here {
                continue;
            }
            path.retain(|(digest, _)| documents.iter().all(|(known, _)| known != digest));
            // The manifest stays the last of them.
            documents.splice(0..0, path);
        }
        names.push(reference.at_digest(&digest).name());
    }
    Ok(names)
}

/// From an entry to the manifest for this machine. None where there is none: entries for other machines and what is no
/// image at all are not what is loaded.
fn descend(
    spool: &Spool,
    digest: &Digest,
    media_type: &str,
    depth: usize,
    documents: &mut Vec<(Digest, Bytes)>,
) -> Result<Option<Manifest>, LoadError> {
    let Some(bytes) = spool.document(&blob_path(digest), MAX_MANIFEST)? else { return Ok(None) };
    if !digest.matches(&bytes) {
        return Err(LoadError::NoImages(format!("the document {digest} has another digest")));
    }
    let document =
        Document::parse(digest, media_type, &bytes).map_err(|error| LoadError::Document(Box::new(error)))?;
    documents.push((digest.clone(), Bytes::from(bytes)));
    match document {
        Document::Manifest(manifest) => return Ok(Some(manifest)),
        Document::Index(entries) if depth < MAX_INDEX_DEPTH => {
            for candidate in candidates(&entries, &Platform::host()).unwrap_or_default() {
                let found = descend(spool, &candidate.digest, &candidate.media_type, depth + 1, documents)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        Document::Index(_) => {}
    }
    documents.pop();
    Ok(None)
}

fn image(
    spool: &Spool,
    manifest: Manifest,
    documents: Vec<(Digest, Bytes)>,
    names: Vec<String>,
) -> Result<Found, LoadError> {
    let id = manifest.config.digest.clone();
    let missing = |what: &Digest| LoadError::Image {
        image: id.to_string(),
        reason: format!("{what} is not in the archive"),
    };
    let config = spool.document(&blob_path(&id), MAX_CONFIG)?.ok_or_else(|| missing(&id))?;
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for descriptor in manifest.layers {
        let range = spool.find(&blob_path(&descriptor.digest)).ok_or_else(|| missing(&descriptor.digest))?;
        layers.push(Source { range, descriptor: Some(descriptor) });
    }
    Ok(Found { id, config, documents, layers, names })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawDocker {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The images of a docker archive.
fn docker_archive(spool: &Spool, manifest: &[u8]) -> Result<Vec<Found>, LoadError> {
    let raw: Vec<RawDocker> = serde_json::from_slice(manifest)
        .map_err(|error| LoadError::NoImages(format!("manifest.json cannot be read: {error}")))?;
    if raw.len() > MAX_IMAGES {
        return Err(LoadError::NoImages(format!("it has more than {MAX_IMAGES} images")));
    }
    let mut images = Vec::new();
    for entry in raw {
        let missing =
            |name: &str| LoadError::NoImages(format!("{name:?}, which manifest.json names, is missing"));
        let config = spool.document(&entry.config, MAX_CONFIG)?.ok_or_else(|| missing(&entry.config))?;
        if entry.layers.len() > MAX_LAYERS {
            return Err(LoadError::NoImages(format!("an image has more than {MAX_LAYERS} layers")));
        }
        let mut layers = Vec::new();
        for name in &entry.layers {
            let range = spool.find(name).ok_or_else(|| missing(name))?;
            layers.push(Source { range, descriptor: None });
        }
        let names = entry.repo_tags.into_iter().flatten().filter_map(|name| tag(&name)).collect();
        let id = Digest::sha256(&config);
        images.push(Found { id, config, documents: Vec::new(), layers, names });
    }
    Ok(images)
}

/// A tag in normal form. Digests are for [`digest_names`].
fn tag(name: &str) -> Option<String> {
    name.parse::<Reference>().ok().filter(|name| name.digest().is_none()).map(|name| name.name())
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}", digest.to_string().replacen(':', "/", 1))
}
