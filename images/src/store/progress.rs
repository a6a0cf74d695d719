use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc::UnboundedSender;

use crate::digest::Digest;

/// What a pull has done so far. Layers are named by the digest of their compressed blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullProgress {
    /// The reference was resolved; always the first event.
    Resolved {
        /// What the reference means at the registry.
        digest: Digest,
        /// Digest and compressed size in bytes of each layer, lowest first. Empty when the registry still means the
        /// image that is here already; then nothing follows.
        layers: Vec<(Digest, u64)>,
    },
    /// So many bytes of the layer's blob have arrived, in total. Sent at most every 100 ms per layer.
    Downloaded {
        /// Which layer.
        layer: Digest,
        /// Bytes so far.
        bytes: u64,
    },
    /// The layer is downloaded, checked and converted.
    LayerDone {
        /// Which layer.
        layer: Digest,
    },
    /// The layer was on this node already.
    LayerExists {
        /// Which layer.
        layer: Digest,
    },
}

/// The progress of one pull, told to everybody who waits for it. Those who come late are told what happened before.
#[derive(Default)]
pub(super) struct Board(Mutex<Told>);

#[derive(Default)]
struct Told {
    resolved: Option<PullProgress>,
    /// Bytes of layers that are not finished.
    bytes: HashMap<Digest, u64>,
    finished: Vec<PullProgress>,
    listeners: Vec<UnboundedSender<PullProgress>>,
}

impl Board {
    /// Adds a listener.
    pub(super) fn subscribe(&self, listener: UnboundedSender<PullProgress>) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = told.bytes.iter();
        let bytes =
            bytes.map(|(layer, bytes)| PullProgress::Downloaded { layer: layer.clone(), bytes: *bytes });
        for event in told.resolved.iter().cloned().chain(bytes).chain(told.finished.iter().cloned()) {
            // A listener that is gone is dropped at the next event.
            let _ = listener.send(event);
        }
        told.listeners.push(listener);
    }

    /// Tells everybody.
    pub(super) fn tell(&self, event: PullProgress) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &event {
            PullProgress::Resolved { .. } => told.resolved = Some(event.clone()),
            PullProgress::Downloaded { layer, bytes } => {
                told.bytes.insert(layer.clone(), *bytes);
            }
            PullProgress::LayerDone { layer } | PullProgress::LayerExists { layer } => {
                told.bytes.remove(layer);
                told.finished.push(event.clone());
            }
        }
        told.listeners.retain(|listener| listener.send(event.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_listener_hears_what_happened_before() {
        let board = Board::default();
        let layer = Digest::sha256(b"1");
        let resolved =
            PullProgress::Resolved { digest: Digest::sha256(b"m"), layers: vec![(layer.clone(), 9)] };
        board.tell(resolved.clone());
        board.tell(PullProgress::Downloaded { layer: layer.clone(), bytes: 5 });
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        board.subscribe(sender);
        board.tell(PullProgress::LayerDone { layer: layer.clone() });
        assert_eq!(receiver.try_recv().unwrap(), resolved);
        assert_eq!(receiver.try_recv().unwrap(), PullProgress::Downloaded { layer: layer.clone(), bytes: 5 });
        assert_eq!(receiver.try_recv().unwrap(), PullProgress::LayerDone { layer });
        assert!(receiver.try_recv().is_err());
    }
}
