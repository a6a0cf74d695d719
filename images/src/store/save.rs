//! Images as one file: an OCI image layout (image-spec image-layout.md) in a tar archive that is a docker archive too, as
//! `docker save` has written them since version 25. Layers are in it as they were before compression.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use hull_archive::{ArchiveError, Entry, Kind, Timestamp, Writer};
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::image::Image;
use crate::layer::{LayerId, archive_size};
use crate::reference::Reference;

use super::check::{ArchiveFailure, Hashing};
use super::error::StoreError;
use super::files::failed;
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
    store: Arc<ImageStore>,
    images: Vec<(Image, Vec<String>)>,
    layers: BTreeMap<LayerId, u64>,
    _hold: LayerHold,
}

impl ImageStore {
    /// Prepares to save the images that `names` mean (as in [`ImageStore::find`]). An image that is named by a tag keeps
    /// that tag; one named by its id goes without a name. Blocking.
    pub fn save(self: &Arc<Self>, names: &[String]) -> Result<Saving, SaveError> {
        let mut images: Vec<(Image, Vec<String>)> = Vec::new();
        for name in names {
            let image = self.find(name)?.ok_or_else(|| SaveError::NoImage(name.clone()))?;
            let tag = name.parse::<Reference>().ok().map(|reference| reference.name());
            let tag = tag.filter(|tag| image.repo_tags.contains(tag));
            match images.iter_mut().find(|(known, _)| known.id == image.id) {
                Some((_, tags)) => tags.extend(tag),
                None => images.push((image, tag.into_iter().collect())),
            }
        }
        let all: Vec<LayerId> =
            images.iter().flat_map(|(image, _)| &image.config.diff_ids).cloned().collect();
        let hold = self.hold(&all);
        let mut layers = BTreeMap::new();
        for (image, layer) in images.iter().flat_map(|(i, _)| i.config.diff_ids.iter().map(move |l| (i, l))) {
            if layers.contains_key(layer) {
                continue;
            }
            let size = self
                .archive_size(layer)?
                .ok_or_else(|| SaveError::NoWayBack { image: image.id.clone(), layer: layer.clone() })?;
            layers.insert(layer.clone(), size);
        }
        Ok(Saving { store: self.clone(), images, layers, _hold: hold })
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
        let mut archive = Writer::new(out);
        for directory in ["blobs", "blobs/sha256"] {
            archive.entry(&entry(directory, Kind::Directory)).map_err(output)?;
        }
        for (layer, size) in &self.layers {
            self.layer(&mut archive, layer, *size)?;
        }
        let (mut index, mut docker) = (Vec::new(), Vec::new());
        for (image, tags) in &self.images {
            let manifest = self.manifest(image);
            let digest = Digest::sha256(&manifest);
            document(&mut archive, &blob_path(&image.id), &image.config.raw)?;
            document(&mut archive, &blob_path(&digest.to_string()), &manifest)?;
            let descriptor = |annotations: Value| {
                json!({"mediaType": MANIFEST, "digest": digest.to_string(), "size": manifest.len(),
                       "annotations": annotations})
            };
            index.extend(tags.iter().map(|tag| {
                let short = tag.rsplit(':').next().unwrap_or_default();
                descriptor(
                    json!({"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": short}),
                )
            }));
            if tags.is_empty() {
                index.push(descriptor(json!({})));
            }
            let familiar = |tag: &String| tag.parse::<Reference>().map_or(tag.clone(), |tag| tag.familiar());
            docker.push(json!({
                "Config": blob_path(&image.id),
                "RepoTags": tags.iter().map(familiar).collect::<Vec<_>>(),
                "Layers": image.config.diff_ids.iter().map(|l| blob_path(l.as_str())).collect::<Vec<_>>(),
            }));
        }
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
                           "manifests": index});
        document(&mut archive, "index.json", index.to_string().as_bytes())?;
        document(&mut archive, "manifest.json", Value::from(docker).to_string().as_bytes())?;
        document(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.finish().map(drop).map_err(output)
    }

    fn manifest(&self, image: &Image) -> Vec<u8> {
        let layers: Vec<Value> = image
            .config
            .diff_ids
            .iter()
            .map(|layer| {
                let size = self.layers.get(layer).copied().unwrap_or_default();
                json!({"mediaType": LAYER, "digest": layer.as_str(), "size": size})
            })
            .collect();
        let config = json!({"mediaType": CONFIG, "digest": image.id, "size": image.config.raw.len()});
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        manifest.to_string().into_bytes()
    }

    fn layer<W: Write>(&self, archive: &mut Writer<W>, layer: &LayerId, size: u64) -> Result<(), SaveError> {
        let entry = entry(&blob_path(layer.as_str()), Kind::File(size));
        let mut written = Ok(());
        let mut hash = Hashing::default();
        let streamed = archive.stream(&entry, |sink| {
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

fn document<W: Write>(archive: &mut Writer<W>, path: &str, bytes: &[u8]) -> Result<(), SaveError> {
    let mut content = bytes;
    archive.file(&entry(path, Kind::File(bytes.len() as u64)), &mut content).map_err(output)
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
