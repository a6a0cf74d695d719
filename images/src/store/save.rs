//! Images as one file: an OCI image layout (image-spec image-layout.md) in a tar archive that is a docker archive too, as
//! `docker save` has written them since version 25. Layers are in it as they were before compression, or with the whole
//! image as it came (`exact_save.rs`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::Arc;

use bytes::Bytes;
use hull_archive::{ArchiveError, Entry, Kind, Timestamp, Writer};
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::image::Image;
use crate::layer::{LayerId, archive_size};
use crate::reference::Reference;

use super::check::{ArchiveFailure, Hashing};
use super::error::StoreError;
use super::exact_save::Fetching;
use super::files::failed;
use super::load::DIGESTS;
use super::{ImageStore, LayerHold};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Why images were not saved. What was written until then is no whole archive.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// One of the names means nothing here.
    #[error("there is no image {0:?}")]
    NoImage(String),
    /// A layer was pulled by a version of hull that did not keep what leads back to its archive.
    #[error(
        "layer {layer} of image {image} cannot be written: it was pulled before hull kept what that needs; remove the image and pull it again"
    )]
    NoWayBack {
        /// The image's id.
        image: String,
        /// The layer.
        layer: LayerId,
    },
    /// The image cannot be saved with the digest that it came with.
    #[error("cannot save image {image} as it came: {reason}")]
    NotExact {
        /// As it was asked for.
        image: String,
        /// Why not.
        reason: String,
    },
    /// A layer file is damaged.
    #[error(
        "layer {0} is damaged: `hull system check --repair` takes it out, so that it can be pulled again"
    )]
    Damaged(LayerId),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody takes the archive.
    #[error("cannot write the archive: {0}")]
    Output(#[source] io::Error),
}

/// What goes into an archive. Its layers stay while it lives.
pub struct Saving {
    pub(super) store: Arc<ImageStore>,
    pub(super) images: Vec<Saved>,
    pub(super) _hold: LayerHold,
}

/// How far a layer has come that is fetched again, as it was not kept (only [`ImageStore::save_exactly`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveProgress {
    /// Digest of the compressed bytes.
    pub layer: Digest,
    /// Bytes that are here. They may begin anew, when they come from another place. As many as there are to come: they
    /// have been compared with the digest, and no more is told of this layer.
    pub bytes: u64,
    /// All of them.
    pub of: u64,
}

impl SaveProgress {
    /// The last step of its layer.
    pub const fn is_last(&self) -> bool {
        self.bytes == self.of
    }
}

/// One image of an archive.
pub(super) struct Saved {
    pub(super) image: Image,
    pub(super) tags: Vec<String>,
    pub(super) manifest: Bytes,
    pub(super) media_type: String,
    /// Lowest first, one for each diffID.
    pub(super) layers: Vec<Blob>,
    /// Indexes that lead to the manifest.
    pub(super) indexes: Vec<(Digest, Bytes)>,
    /// References with the digests of these documents, if the image came by them.
    pub(super) digests: Vec<String>,
}

/// One layer of an image, as it is in the archive.
pub(super) struct Blob {
    pub(super) digest: String,
    pub(super) size: u64,
    pub(super) source: Source,
}

/// Where the bytes of a layer come from.
pub(super) enum Source {
    /// Its archive, which the layer file leads back to.
    Archive(LayerId),
    /// The blob that was kept, or a registry.
    Registry(Fetching),
}

/// An image that is asked for, by one or several names.
pub(super) struct Wanted {
    pub(super) image: Image,
    /// Those tags of it that were named.
    pub(super) tags: Vec<String>,
    /// Number of the name that was the first to mean it.
    pub(super) first: usize,
}

impl ImageStore {
    /// Prepares to save the images that `names` mean (as in [`ImageStore::find`]). An image that is named by a tag keeps
    /// that tag; one named by its id goes without a name. Blocking.
    pub fn save(self: &Arc<Self>, names: &[String]) -> Result<Saving, SaveError> {
        let (wanted, hold) = self.wanted(names)?;
        let saved = wanted.into_iter().map(|wanted| self.as_archives(wanted));
        Ok(Saving { store: self.clone(), images: saved.collect::<Result<_, _>>()?, _hold: hold })
    }

    /// The images that are meant, each once, and a hold of their layers.
    pub(super) fn wanted(&self, names: &[String]) -> Result<(Vec<Wanted>, LayerHold), SaveError> {
        let mut all: Vec<Wanted> = Vec::new();
        for (first, name) in names.iter().enumerate() {
            let image = self.find(name)?.ok_or_else(|| SaveError::NoImage(name.clone()))?;
            let tag = name.parse::<Reference>().ok().map(|reference| reference.name());
            let tag = tag.filter(|tag| image.repo_tags.contains(tag));
            match all.iter_mut().find(|known| known.image.id == image.id) {
                Some(known) => known.tags.extend(tag),
                None => all.push(Wanted { image, tags: tag.into_iter().collect(), first }),
            }
        }
        let layers: Vec<LayerId> =
            all.iter().flat_map(|wanted| &wanted.image.config.diff_ids).cloned().collect();
        let hold = self.hold(&layers);
        Ok((all, hold))
    }

    /// An image with its layers as they were before compression.
    fn as_archives(&self, wanted: Wanted) -> Result<Saved, SaveError> {
        let Wanted { image, tags, .. } = wanted;
        let mut layers = Vec::with_capacity(image.config.diff_ids.len());
        for layer in &image.config.diff_ids {
            let (digest, size) = (layer.to_string(), self.size_of_archive(&image, layer)?);
            layers.push(Blob { digest, size, source: Source::Archive(layer.clone()) });
        }
        let described: Vec<Value> = layers
            .iter()
            .map(|layer| json!({"mediaType": LAYER, "digest": layer.digest, "size": layer.size}))
            .collect();
        let config = json!({"mediaType": CONFIG, "digest": image.id, "size": image.config.raw.len()});
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described});
        Ok(Saved {
            image,
            tags,
            manifest: Bytes::from(manifest.to_string()),
            media_type: MANIFEST.to_owned(),
            layers,
            indexes: Vec::new(),
            digests: Vec::new(),
        })
    }

    pub(super) fn size_of_archive(&self, image: &Image, layer: &LayerId) -> Result<u64, SaveError> {
        let lost = || SaveError::NoWayBack { image: image.id.clone(), layer: layer.clone() };
        self.archive_size(layer)?.ok_or_else(lost)
    }

    /// Bytes of a layer's tar stream; None if it cannot be turned back into one.
    pub(super) fn archive_size(&self, layer: &LayerId) -> Result<Option<u64>, StoreError> {
        let record = self.read().layers.get(layer).copied();
        let Some(record) = record.filter(|record| record.tar_split > 0) else { return Ok(None) };
        let path = self.files.layer(layer);
        let file = File::open(&path).map_err(failed("open", &path))?;
        let size = archive_size(&file, record.size - record.tar_split, record.tar_split);
        size.map(Some).map_err(failed("read", &path))
    }
}

impl Saving {
    /// Writes the archive to `out`, which should be buffered. Blocking.
    pub fn write(self, out: impl Write) -> Result<(), SaveError> {
        self.write_and_tell(out, |_| {})
    }

    /// The same; `tell` hears of layers that are fetched. A task calls it, and it must not block, but for the last step of
    /// a layer, which this thread tells.
    pub fn write_and_tell(
        self,
        out: impl Write,
        mut tell: impl FnMut(SaveProgress),
    ) -> Result<(), SaveError> {
        let mut archive = Archive { writer: Writer::new(out), written: BTreeSet::new() };
        for directory in ["blobs", "blobs/sha256"] {
            archive.writer.entry(&entry(directory, Kind::Directory)).map_err(output)?;
        }
        let (mut index, mut docker) = (Vec::new(), Vec::new());
        for saved in &self.images {
            for layer in &saved.layers {
                if archive.is_new(&layer.digest) {
                    self.layer(&mut archive.writer, layer, &mut tell)?;
                }
            }
            let digest = Digest::sha256(&saved.manifest);
            archive.blob(&saved.image.id, &saved.image.config.raw)?;
            archive.blob(&digest.to_string(), &saved.manifest)?;
            for (digest, bytes) in &saved.indexes {
                archive.blob(&digest.to_string(), bytes)?;
            }
            index.extend(saved.index_entries(&digest));
            docker.push(saved.docker_entry());
        }
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
                           "manifests": index});
        archive.document("index.json", index.to_string().as_bytes())?;
        archive.document("manifest.json", Value::from(docker).to_string().as_bytes())?;
        archive.document("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.writer.finish().map(drop).map_err(output)
    }

    fn layer<W: Write>(
        &self,
        archive: &mut Writer<W>,
        blob: &Blob,
        tell: &mut dyn FnMut(SaveProgress),
    ) -> Result<(), SaveError> {
        let entry = entry(&blob_path(&blob.digest), Kind::File(blob.size));
        match &blob.source {
            Source::Archive(layer) => self.archive(archive, &entry, layer),
            Source::Registry(fetching) => {
                let mut file = fetching.fetch(&self.store, tell)?;
                let read = |source| SaveError::Store(failed("read", self.store.files.layers())(source));
                file.seek(SeekFrom::Start(0)).map_err(read)?;
                archive.file(&entry, &mut file).map_err(output)
            }
        }
    }

    fn archive<W: Write>(
        &self,
        archive: &mut Writer<W>,
        entry: &Entry,
        layer: &LayerId,
    ) -> Result<(), SaveError> {
        let mut written = Ok(());
        let mut hash = Hashing::default();
        let streamed = archive.stream(entry, |sink| {
            let mut both = Both { sink, hash: &mut hash };
            written = self.store.write_archive(layer, &mut both);
            Ok(())
        });
        match written.map_err(|failure| match failure {
            ArchiveFailure::Store(error) => SaveError::Store(error),
            ArchiveFailure::Output(error) => SaveError::Output(error),
            ArchiveFailure::NoWayBack(layer) => SaveError::Damaged(layer),
        }) {
            Err(error) => return Err(error),
            Ok(()) => streamed.map_err(output)?,
        }
        if hash.digest() == layer.as_str() { Ok(()) } else { Err(SaveError::Damaged(layer.clone())) }
    }
}

impl Saved {
    /// What index.json says of it: an entry for each tag, or one without a name.
    fn index_entries(&self, digest: &Digest) -> Vec<Value> {
        let entry = |tag: Option<&String>| {
            let mut annotations = json!({});
            if let Some(tag) = tag {
                annotations[super::load::NAME] = json!(tag);
                annotations[super::load::SHORT_NAME] = json!(tag.rsplit(':').next().unwrap_or_default());
            }
            if !self.digests.is_empty() {
                annotations[DIGESTS] = json!(self.digests.join(","));
            }
            json!({"mediaType": self.media_type, "digest": digest.to_string(), "size": self.manifest.len(),
                   "annotations": annotations})
        };
        match self.tags.is_empty() {
            true => vec![entry(None)],
            false => self.tags.iter().map(|tag| entry(Some(tag))).collect(),
        }
    }

    /// What manifest.json says of it.
    fn docker_entry(&self) -> Value {
        let familiar = |tag: &String| tag.parse::<Reference>().map_or(tag.clone(), |tag| tag.familiar());
        json!({
            "Config": blob_path(&self.image.id),
            "RepoTags": self.tags.iter().map(familiar).collect::<Vec<_>>(),
            "Layers": self.layers.iter().map(|layer| blob_path(&layer.digest)).collect::<Vec<_>>(),
        })
    }
}

/// An archive under construction, with the digests of the blobs that are in it.
struct Archive<W> {
    writer: Writer<W>,
    written: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    fn is_new(&mut self, digest: &str) -> bool {
        self.written.insert(digest.to_owned())
    }

    fn blob(&mut self, digest: &str, bytes: &[u8]) -> Result<(), SaveError> {
        if self.is_new(digest) { self.document(&blob_path(digest), bytes) } else { Ok(()) }
    }

    fn document(&mut self, path: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let mut content = bytes;
        self.writer.file(&entry(path, Kind::File(bytes.len() as u64)), &mut content).map_err(output)
    }
}

struct Both<'b> {
    sink: &'b mut dyn Write,
    hash: &'b mut Hashing,
}

impl Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write_all(bytes)?;
        self.hash.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Nothing in an archive depends on when or by whom it was made.
fn entry(path: &str, kind: Kind) -> Entry {
    let mode = if kind == Kind::Directory { 0o755 } else { 0o644 };
    let mtime = Timestamp::default();
    Entry { path: path.as_bytes().to_vec(), kind, mode, uid: 0, gid: 0, mtime, xattrs: Vec::new() }
}

/// `sha256:…` as the layout has it.
fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn output(error: ArchiveError) -> SaveError {
    match error {
        ArchiveError::Output(error) => SaveError::Output(error),
        other => SaveError::Output(io::Error::other(other)),
    }
}
