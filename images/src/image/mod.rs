//! Images as the index knows them.

mod config;
mod upper;

pub use config::{ConfigError, ImageConfig, MAX_CONFIG, MAX_LAYERS};
pub use upper::{UpperDirectory, make_upper_directories};

use crate::layer::LayerId;

/// One pulled image. A value: later changes to the index do not show in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// The digest of the image's configuration, `sha256:<64 hex>`; the image's identity.
    pub id: String,
    /// Tag references in their normal form (`docker.io/library/busybox:latest`), sorted. Empty when every tag moved on.
    pub repo_tags: Vec<String>,
    /// Digest references (`docker.io/library/busybox@sha256:…`), sorted. The digest is that of what the registry served
    /// for the reference: the index for a multi-platform image, else the manifest.
    pub repo_digests: Vec<String>,
    /// Bytes on this node's disk: the EROFS files of the layers (a layer used twice counts once) plus the stored
    /// manifest and configuration. Layers shared with other images count in each of them.
    pub size: u64,
    /// The layers that a container mounts, lowest first. Layers below one that hides all of them (an opaque mark in its
    /// root, which overlayfs ignores) are not among them; `config.diff_ids` has all.
    pub layers: Vec<LayerId>,
    /// Directories that must be made in a container's writable directory, by [`make_upper_directories`], before it is
    /// mounted over `layers`: parents before children, the root first (with an empty path). Empty for nearly all images.
    pub upper_directories: Vec<UpperDirectory>,
    /// What the image says about its processes.
    pub config: ImageConfig,
    /// Whether the image is exempt from the kubelet's garbage collection.
    pub pinned: bool,
    /// When the image was first pulled, in nanoseconds since the Unix epoch.
    pub pulled_at: i64,
}
