//! Holds: layers that containers or pulls need, whether or not an image still lists them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::layer::LayerId;

use super::ImageStore;

/// How many holds each layer has.
#[derive(Default)]
pub(super) struct Holds(Mutex<HashMap<LayerId, usize>>);

impl Holds {
    fn add(&self, layers: &[LayerId]) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in layers {
            *counts.entry(layer.clone()).or_default() += 1;
        }
    }

    /// Takes one hold of each away and returns the layers that have none left.
    fn subtract(&self, layers: &[LayerId]) -> Vec<LayerId> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = Vec::new();
        for layer in layers {
            if let Some(count) = counts.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(layer);
                    free.push(layer.clone());
                }
            }
        }
        free
    }

    /// Whether anything holds the layer.
    pub(super) fn contains(&self, layer: &LayerId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(layer)
    }
}

/// Keeps layer files from being deleted while it lives. When the last hold of a layer that no image uses any more is
/// dropped, its file is deleted in the background.
pub struct LayerHold {
    layers: Vec<LayerId>,
    holds: Arc<Holds>,
    store: Weak<ImageStore>,
}

impl LayerHold {
    pub(super) fn new(layers: &[LayerId], holds: Arc<Holds>, store: Weak<ImageStore>) -> Self {
        holds.add(layers);
        Self { layers: layers.to_vec(), holds, store }
    }

    /// The layers that are held.
    pub fn layers(&self) -> &[LayerId] {
        &self.layers
    }
}

impl Drop for LayerHold {
    fn drop(&mut self) {
        let free = self.holds.subtract(&self.layers);
        if !free.is_empty()
            && let Some(store) = self.store.upgrade()
        {
            store.reclaim_in_background(&free);
        }
    }
}

impl fmt::Debug for LayerHold {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("LayerHold").field(&self.layers).finish()
    }
}
