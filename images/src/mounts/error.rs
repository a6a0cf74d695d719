use std::path::PathBuf;

use rustix::io::Errno;

use crate::layer::LayerId;

/// Why a layer cannot be mounted or handed out.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MountError {
    /// The index does not know the layer.
    #[error("layer {0} is not on this node")]
    Unknown(LayerId),
    /// The layer's file cannot be opened.
    #[error("cannot open the file of layer {layer}: {source}")]
    Open {
        /// Which layer.
        layer: LayerId,
        /// What the kernel said.
        source: Errno,
    },
    /// The kernel refused the EROFS mount; `step` says at which call.
    #[error("cannot mount layer {layer} ({step}): {source}{log}")]
    Mount {
        /// Which layer.
        layer: LayerId,
        /// The call that failed.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
        /// The kernel's own message, with a leading separator; empty if it left none.
        log: String,
    },
    /// The private namespace of layer mounts cannot be made or entered.
    #[error("cannot set up the namespace of layer mounts at {path} ({step}): {source}")]
    Namespace {
        /// Where it is pinned.
        path: PathBuf,
        /// The call that failed.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The thread that serves the namespace is gone (the store is closing).
    #[error("the namespace of layer mounts is closed")]
    Closed,
}
