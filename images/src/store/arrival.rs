//! The last step of everything that brings an image: one transaction makes it exist.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use crate::digest::Digest;
use crate::image::{Image, ImageConfig};

use super::ImageStore;
use super::error::StoreError;
use super::index::{Change, ImageRecord};
use super::kept::layer_digests;
use super::staged::Staged;

/// An image of which everything is on the node, and checked.
pub(super) struct Arrival {
    /// Digest of the configuration.
    pub(super) id: Digest,
    pub(super) config: ImageConfig,
    /// Indexes and manifests that led to it, with their digests.
    pub(super) documents: Vec<(Digest, Bytes)>,
    /// References in normal form that mean it from now on. A name that meant another image moves.
    pub(super) names: Vec<String>,
    /// Those layers that the index may not have yet.
    pub(super) staged: Vec<Arc<Staged>>,
}

impl ImageStore {
    /// The one transaction that makes an image exist. Blocking. On failure everything is as before.
    pub(super) fn commit(&self, arrival: &Arrival) -> Result<Image, StoreError> {
        let id = arrival.id.to_string();
        let _writer = self.write();
        let mut published: Vec<&Arc<Staged>> = Vec::new();
        if let Err(error) = self.publish_and_commit(&id, arrival, &mut published) {
            published.iter().for_each(|staged| staged.unpublish());
            return Err(error);
        }
        // It was put there a moment ago and the writer lock is still held.
        self.read().image(&id).ok_or_else(|| StoreError::Record {
            path: self.files.index(),
            key: id,
            reason: "it vanished while it was written".to_owned(),
        })
    }

    fn publish_and_commit<'a>(
        &self,
        id: &str,
        arrival: &'a Arrival,
        published: &mut Vec<&'a Arc<Staged>>,
    ) -> Result<(), StoreError> {
        let mut change = self.describe(id, arrival);
        let (blobs, mut has_blobs) = (layer_digests(&arrival.documents), false);
        for staged in &arrival.staged {
            let known = self.read().layers.contains_key(&staged.layer);
            if known || change.put_layers.iter().any(|(layer, _)| *layer == staged.layer) {
                continue;
            }
            has_blobs |= staged.publish(|digest| blobs.contains(digest))?;
            published.push(staged);
            change.put_layers.push((staged.layer.clone(), staged.record));
            if !staged.implied.is_empty() {
                change.put_implied.push((staged.layer.clone(), staged.implied.clone()));
            }
        }
        self.add_upper_directories(&mut change)?;
        if has_blobs {
            self.files.sync_blobs()?;
        }
        if !published.is_empty() {
            self.files.sync_layers()?;
        }
        self.index.commit(&change)?;
        self.apply(&change, BTreeMap::from([(id.to_owned(), arrival.config.clone())]));
        Ok(())
    }

    /// The change of the index without layers: image, documents and names.
    fn describe(&self, id: &str, arrival: &Arrival) -> Change {
        let catalogue = self.read();
        let mut record = match catalogue.images.get(id) {
            Some(entry) => entry.record.clone(),
            None => ImageRecord {
                layers: arrival.config.diff_ids.clone(),
                documents: Vec::new(),
                documents_size: arrival.config.raw.len() as u64,
                pinned: false,
                pulled_at: now(),
                upper_directories: Vec::new(),
            },
        };
        let mut put_blobs = vec![(arrival.id.clone(), arrival.config.raw.clone())];
        for (digest, bytes) in &arrival.documents {
            // The latest last, also if it was here before.
            let known = record.documents.len();
            record.documents.retain(|one| one != digest);
            let is_new = record.documents.len() == known;
            record.documents.push(digest.clone());
            if is_new {
                record.documents_size += bytes.len() as u64;
                put_blobs.push((digest.clone(), bytes.clone()));
            }
        }
        let put_names = arrival.names.iter().map(|name| (name.clone(), id.to_owned())).collect();
        Change { put_images: vec![(id.to_owned(), record)], put_names, put_blobs, ..Change::default() }
    }
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}
