//! OCI images: references, registries, layers as EROFS files, the image index.
//!
//! The way of an image: a [`Reference`] is resolved at a registry (`registry`), its layers are downloaded, checked and
//! converted in one pass (`layer`), committed in one transaction to the index (`store`), and mounted once per node in a
//! private mount namespace from which pods get clones (`mounts`). Nothing here knows what a pod is.
#![forbid(unsafe_code)]

/// Content digests and their verification.
pub mod digest;
/// Images as the index knows them: identity, names, layers, configuration.
pub mod image;
/// Layers: tar streams become EROFS files.
pub mod layer;
/// Mounts of layer files, in a private namespace, cloned for pods.
pub mod mounts;
/// Which images may be here.
pub mod policy;
/// Image references as users write them.
pub mod reference;
/// The client of OCI distribution registries.
pub mod registry;
/// The image index, the layer files and pulls into them.
pub mod store;

#[doc(hidden)]
pub use registry::fuzzing;

pub use digest::Digest;
pub use image::{Image, ImageConfig, UpperDirectory, make_upper_directories};
pub use layer::LayerId;
pub use mounts::MountError;
pub use reference::{Reference, ReferenceError};
pub use registry::Credentials;
pub use store::{
    ArchiveFailure, BlobUsage, CheckReport, FilesystemUsage, ImageStore, LayerHold, LayerUsage, Problem,
    PullError, PullErrorKind, PullProgress, StoreConfig, StoreError, SweepReport,
};
