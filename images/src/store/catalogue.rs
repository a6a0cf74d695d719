//! The index in memory: what queries answer from. Changed only after the same change was committed on disk.

use std::collections::{BTreeMap, BTreeSet};

use crate::image::{Image, ImageConfig};
use crate::layer::LayerId;
use crate::policy::Pattern;
use crate::reference::Reference;

use super::error::StoreError;
use super::index::{Change, ImageRecord, LayerRecord};
use super::stack::mounted;

/// One image with the names that point at it.
pub(super) struct Entry {
    pub(super) record: ImageRecord,
    pub(super) config: ImageConfig,
    pub(super) names: BTreeSet<String>,
}

/// All images, names and layers of the index.
#[derive(Default)]
pub(super) struct Catalogue {
    pub(super) images: BTreeMap<String, Entry>,
    pub(super) names: BTreeMap<String, String>,
    pub(super) layers: BTreeMap<LayerId, LayerRecord>,
    /// Names of images that nobody collects.
    pub(super) pinned: Vec<Pattern>,
}

impl Catalogue {
    /// The image with this id as clients see it.
    pub(super) fn image(&self, id: &str) -> Option<Image> {
        let entry = self.images.get(id)?;
        let (repo_digests, repo_tags) = entry.names.iter().cloned().partition(|name| name.contains('@'));
        let distinct: BTreeSet<&LayerId> = entry.record.layers.iter().collect();
        let layers_size: u64 =
            distinct.iter().filter_map(|id| self.layers.get(*id)).map(|layer| layer.size).sum();
        let is_opaque = |id: &LayerId| self.layers.get(id).is_some_and(|layer| layer.opaque_root);
        Some(Image {
            id: id.to_owned(),
            repo_tags,
            repo_digests,
            size: layers_size + entry.record.documents_size,
            layers: mounted(&entry.record.layers, is_opaque).to_vec(),
            upper_directories: entry.record.upper_directories.clone(),
            config: entry.config.clone(),
            pinned: self.is_pinned(entry),
            pulled_at: entry.record.pulled_at,
        })
    }

    /// Whether the image is exempt from collection.
    pub(super) fn is_pinned(&self, entry: &Entry) -> bool {
        let fits = |name: &String| {
            let reference = name.parse::<Reference>();
            reference.is_ok_and(|reference| self.pinned.iter().any(|pattern| pattern.fits(&reference)))
        };
        entry.record.pinned || (!self.pinned.is_empty() && entry.names.iter().any(fits))
    }

    /// The id that `name` means: a full id with or without algorithm, a reference, or a unique prefix of an id. What
    /// cannot be a name at all names nothing.
    pub(super) fn resolve(&self, name: &str) -> Result<Option<String>, StoreError> {
        if self.images.contains_key(name) {
            return Ok(Some(name.to_owned()));
        }
        let is_hex = !name.is_empty() && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let full = format!("sha256:{name}");
        if is_hex && self.images.contains_key(&full) {
            return Ok(Some(full));
        }
        let reference = name.parse::<Reference>();
        if let Some(id) = reference.as_ref().ok().and_then(|reference| self.names.get(&reference.name())) {
            return Ok(Some(id.clone()));
        }
        let prefix = match name.strip_prefix("sha256:") {
            // The prefix of nothing would fit whichever image is the only one.
            Some("") => return Ok(None),
            Some(_) => name,
            None if is_hex => full.as_str(),
            None => return Ok(None),
        };
        let mut fitting = self.images.range(prefix.to_owned()..).take_while(|(id, _)| id.starts_with(prefix));
        match (fitting.next(), fitting.next()) {
            (Some(_), Some(_)) => Err(StoreError::Ambiguous(name.to_owned())),
            (first, _) => Ok(first.map(|(id, _)| id.clone())),
        }
    }

    /// Layers that no image uses, except those for which `held` says yes.
    pub(super) fn unused_layers(&self, held: impl Fn(&LayerId) -> bool) -> Vec<LayerId> {
        let used: BTreeSet<&LayerId> = self.images.values().flat_map(|entry| &entry.record.layers).collect();
        self.layers.keys().filter(|id| !used.contains(id) && !held(id)).cloned().collect()
    }

    /// Whether some image uses the layer.
    pub(super) fn is_used(&self, layer: &LayerId) -> bool {
        self.images.values().any(|entry| entry.record.layers.contains(layer))
    }

    /// The change that takes the image out, with its names and the documents that no other image has.
    pub(super) fn removal(&self, id: &str) -> Change {
        let Some(entry) = self.images.get(id) else { return Change::default() };
        let shared: BTreeSet<_> = self
            .images
            .iter()
            .filter(|(other, _)| other.as_str() != id)
            .flat_map(|(_, entry)| &entry.record.documents)
            .collect();
        let mut delete_blobs: Vec<String> =
            entry.record.documents.iter().filter(|d| !shared.contains(d)).map(ToString::to_string).collect();
        delete_blobs.push(id.to_owned());
        Change {
            delete_images: vec![id.to_owned()],
            delete_names: entry.names.iter().cloned().collect(),
            delete_blobs,
            ..Change::default()
        }
    }

    /// Follows a committed change. `configs` has the configurations of the images that it puts.
    pub(super) fn apply(&mut self, change: &Change, mut configs: BTreeMap<String, ImageConfig>) {
        for name in &change.delete_names {
            self.forget_name(name);
        }
        for id in &change.delete_images {
            self.images.remove(id);
        }
        for id in &change.delete_layers {
            self.layers.remove(id);
        }
        self.layers.extend(change.put_layers.iter().cloned());
        for (id, record) in &change.put_images {
            match (self.images.get_mut(id), configs.remove(id)) {
                (Some(entry), _) => entry.record = record.clone(),
                (None, Some(config)) => {
                    let entry = Entry { record: record.clone(), config, names: BTreeSet::new() };
                    self.images.insert(id.clone(), entry);
                }
                (None, None) => {}
            }
        }
        for (name, id) in &change.put_names {
            self.forget_name(name);
            self.names.insert(name.clone(), id.clone());
            if let Some(entry) = self.images.get_mut(id) {
                entry.names.insert(name.clone());
            }
        }
    }

    fn forget_name(&mut self, name: &str) {
        if let Some(id) = self.names.remove(name)
            && let Some(entry) = self.images.get_mut(&id)
        {
            entry.names.remove(name);
        }
    }
}
