//! Converted layers that no image has yet: temporary files that live as long as a pull wants them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::layer::LayerId;

use super::error::StoreError;
use super::files::Temporary;
use super::index::LayerRecord;

/// A converted, synced layer file. Deleted when the last pull that shares it drops it without having committed it.
pub(super) struct Staged {
    pub(super) layer: LayerId,
    pub(super) record: LayerRecord,
    /// Directories that the layer implies.
    pub(super) implied: Vec<Vec<u8>>,
    file: Mutex<Temporary>,
}

impl Staged {
    pub(super) fn new(layer: LayerId, record: LayerRecord, implied: Vec<Vec<u8>>, file: Temporary) -> Self {
        Self { layer, record, implied, file: Mutex::new(file) }
    }

    /// Gives the file its final name. The caller holds the writer lock and has seen that the index lacks the layer.
    pub(super) fn publish(&self) -> Result<(), StoreError> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).publish(&self.layer)
    }

    /// Undoes [`Staged::publish`] when the transaction failed.
    pub(super) fn unpublish(&self) {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).unpublish(&self.layer);
    }
}

/// The staged layers of all pulls that are under way, so that one pull can use what another has just converted.
#[derive(Default)]
pub(super) struct StagedLayers(Mutex<HashMap<LayerId, Weak<Staged>>>);

impl StagedLayers {
    pub(super) fn get(&self, layer: &LayerId) -> Option<Arc<Staged>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(layer).and_then(Weak::upgrade)
    }

    pub(super) fn insert(&self, staged: &Arc<Staged>) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.retain(|_, staged| staged.strong_count() > 0);
        map.insert(staged.layer.clone(), Arc::downgrade(staged));
    }
}
