use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::digest::Digest;
use crate::image::ConfigError;
use crate::layer::LayerError;
use crate::registry::RegistryError;

/// Why the image store cannot do what was asked. Cheap to clone: joined operations share one failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory of the store cannot be used.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was being done: "create", "open", "rename", "sync".
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        source: Arc<io::Error>,
    },
    /// Another daemon uses the same directory.
    #[error("the image store {0} is in use by another hulld")]
    InUse(PathBuf),
    /// The index cannot be read or written.
    #[error("cannot {action} the image index {path}: {source}")]
    Index {
        /// What was being done: "open", "read", "write".
        action: &'static str,
        /// The index file.
        path: PathBuf,
        /// What the database said.
        source: Arc<redb::Error>,
    },
    /// A record of the index has a form that this version does not know.
    #[error("the image index {path} has an unreadable record {key}: {reason}")]
    Record {
        /// The index file.
        path: PathBuf,
        /// Which record.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The index was written by a newer hulld.
    #[error("the image index {path} has format {found}, this hulld knows up to {known}")]
    Format {
        /// The index file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest format that is known.
        known: u64,
    },
    /// A short id fits several images.
    #[error("the image id prefix {0:?} fits more than one image")]
    Ambiguous(String),
}

impl StoreError {
    /// Whether the disk is full (or a quota is).
    pub fn is_out_of_space(&self) -> bool {
        let source = match self {
            StoreError::File { source, .. } => source.as_ref(),
            StoreError::Index { source, .. } => match source.as_ref() {
                redb::Error::Io(source) => source,
                _ => return false,
            },
            _ => return false,
        };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Why an image was not pulled. Nothing of it is left behind. Cheap to clone: joined pulls share one failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PullError {
    /// The registry cannot be reached, refuses, or answers what cannot be right.
    #[error("cannot pull image {image}: {source}")]
    Registry {
        /// The reference.
        image: String,
        /// What went wrong.
        source: Box<RegistryError>,
    },
    /// The image's configuration is refused.
    #[error("cannot pull image {image}: configuration {digest}: {source}")]
    Config {
        /// The reference.
        image: String,
        /// Digest of the configuration.
        digest: Digest,
        /// Why.
        source: ConfigError,
    },
    /// Manifest and configuration do not describe a container image for this machine.
    #[error("cannot pull image {image}: {reason}")]
    NotRunnable {
        /// The reference.
        image: String,
        /// Why not.
        reason: String,
    },
    /// A layer cannot be downloaded.
    #[error("cannot pull image {image}: layer {layer}: {source}")]
    Download {
        /// The reference.
        image: String,
        /// Digest of the layer's blob.
        layer: Digest,
        /// What went wrong.
        source: Box<RegistryError>,
    },
    /// A layer's content is refused, or its file cannot be written.
    #[error("cannot pull image {image}: layer {layer}: {source}")]
    Layer {
        /// The reference.
        image: String,
        /// Digest of the layer's blob.
        layer: Digest,
        /// What is wrong with it.
        source: Arc<LayerError>,
    },
    /// The store cannot keep the image.
    #[error("cannot store image {image}: {source}")]
    Store {
        /// The reference.
        image: String,
        /// What went wrong.
        source: StoreError,
    },
    /// The pull was given up while it was under way (the daemon is stopping).
    #[error("the pull of image {image} was cancelled")]
    Cancelled {
        /// The reference.
        image: String,
    },
}

/// What kind of failure a pull met, for clients that react to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullErrorKind {
    /// The registry has no such image.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry does not answer as it should; later it may.
    Unavailable,
    /// The image itself is wrong.
    Invalid,
    /// The node's disk is full.
    OutOfSpace,
    /// The node cannot keep the image for another reason.
    Storage,
    /// Given up.
    Cancelled,
}

impl PullError {
    /// The kind of this failure.
    pub fn kind(&self) -> PullErrorKind {
        match self {
            PullError::Registry { source, .. } | PullError::Download { source, .. } => source.kind(),
            PullError::Config { .. } | PullError::NotRunnable { .. } => PullErrorKind::Invalid,
            PullError::Layer { source, .. } => layer_kind(source),
            PullError::Store { source, .. } if source.is_out_of_space() => PullErrorKind::OutOfSpace,
            PullError::Store { .. } => PullErrorKind::Storage,
            PullError::Cancelled { .. } => PullErrorKind::Cancelled,
        }
    }
}

/// A layer fails by the disk, by the stream it comes from, or by its content.
fn layer_kind(error: &LayerError) -> PullErrorKind {
    match error {
        LayerError::WriteFile(source) => match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => PullErrorKind::OutOfSpace,
            _ => PullErrorKind::Storage,
        },
        LayerError::ReadBlob(_) => PullErrorKind::Unavailable,
        _ => PullErrorKind::Invalid,
    }
}
