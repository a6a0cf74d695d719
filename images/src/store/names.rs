//! What people do to images that are here: name them, count them, clear them up.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;

use crate::layer::LayerId;
use crate::reference::Reference;

use super::ImageStore;
use super::error::StoreError;
use super::index::Change;

/// What one layer occupies, and who needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerUsage {
    /// Which one.
    pub layer: LayerId,
    /// Bytes of disk that its file occupies.
    pub bytes: u64,
    /// Ids of the images that have it.
    pub images: Vec<String>,
    /// Whether a container or a pull needs it.
    pub held: bool,
}

impl ImageStore {
    /// Gives the image that `name` means (as in [`ImageStore::find`]) one more name; an image that had it before loses
    /// it. Returns the image's id, None if there is no such image. `new` must be a tag: a digest cannot be chosen.
    pub fn tag(&self, name: &str, new: &Reference) -> Result<Option<String>, StoreError> {
        let _writer = self.write();
        let Some(id) = self.read().resolve(name)? else { return Ok(None) };
        let change = Change { put_names: vec![(new.name(), id.clone())], ..Change::default() };
        self.index.commit(&change)?;
        self.apply(&change, BTreeMap::new());
        Ok(Some(id))
    }

    /// Removes one name; with the last tag the image goes too, but for images that never had one. Returns the removed
    /// names, then the id if the image went; nothing if `name` (a reference) is not a name of any image.
    pub fn remove_name(&self, name: &Reference) -> Result<Vec<String>, StoreError> {
        let name = name.name();
        let is_last = {
            let catalogue = self.read();
            let Some(id) = catalogue.names.get(&name) else { return Ok(Vec::new()) };
            let tags = |entry: &super::catalogue::Entry| {
                entry.names.iter().filter(|name| !name.contains('@')).count()
            };
            let is_tag = !name.contains('@');
            catalogue.images.get(id).is_none_or(|entry| match is_tag {
                true => tags(entry) == 1,
                false => tags(entry) == 0 && entry.names.len() == 1,
            })
        };
        if is_last {
            return self.remove(&name);
        }
        let _writer = self.write();
        let change = Change { delete_names: vec![name.clone()], ..Change::default() };
        self.index.commit(&change)?;
        self.apply(&change, BTreeMap::new());
        Ok(vec![name])
    }

    /// Removes images that no tag leads to any more, or all that nobody uses, and returns their ids with the bytes that
    /// became free. `in_use` says of an id whether a container needs it; pinned images stay.
    pub fn prune(&self, all: bool, in_use: impl Fn(&str) -> bool) -> Result<(Vec<String>, u64), StoreError> {
        let candidates: Vec<String> = {
            let catalogue = self.read();
            let is_dangling =
                |entry: &super::catalogue::Entry| entry.names.iter().all(|name| name.contains('@'));
            let wanted = catalogue.images.iter().filter(|(_, entry)| !catalogue.is_pinned(entry));
            wanted.filter(|(_, entry)| all || is_dangling(entry)).map(|(id, _)| id.clone()).collect()
        };
        let before = self.usage()?.bytes;
        let mut removed = Vec::new();
        for id in candidates.into_iter().filter(|id| !in_use(id)) {
            if !self.remove(&id)?.is_empty() {
                removed.push(id);
            }
        }
        self.sweep()?;
        Ok((removed, before.saturating_sub(self.usage()?.bytes)))
    }

    /// Every layer on the node, ordered by id. Looks at each file.
    pub fn layer_usage(&self) -> Vec<LayerUsage> {
        let catalogue = self.read();
        let mut users: BTreeMap<&LayerId, BTreeSet<&String>> = BTreeMap::new();
        for (id, entry) in &catalogue.images {
            for layer in &entry.record.layers {
                users.entry(layer).or_default().insert(id);
            }
        }
        let usage = |(layer, record): (&LayerId, &super::index::LayerRecord)| {
            let file = std::fs::metadata(self.files.layer(layer));
            LayerUsage {
                layer: layer.clone(),
                bytes: file.map_or(record.size, |file| file.blocks() * 512),
                images: users.get(layer).into_iter().flatten().map(|id| (*id).clone()).collect(),
                held: self.holds.contains(layer),
            }
        };
        catalogue.layers.iter().map(usage).collect()
    }
}
