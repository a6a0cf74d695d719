//! Layers: a compressed tar archive becomes one EROFS image file, in one pass.
//!
//! ```text
//! blob ─ digest, size ─ decompress ─ diffID ─ tar entries ─ layer.erofs
//! ```
//! No tree of files is ever written: names are kept in memory ([`tree`]), inodes and data go straight to the image
//! ([`erofs`]). Whatever the archive holds, nothing outside the one output file is touched.
//!
//! How an entry is read where the specification leaves room:
//! - Later entries replace earlier ones of the same path; a directory named again keeps its entries and takes the new
//!   attributes; a directory replaced by something else loses them.
//! - A symbolic link in the parents of a path is followed within the layer, its `/` being the layer's root, as containerd
//!   does. `..` in an entry's own path is refused.
//! - Whiteouts (`.wh.NAME`, or a character device 0:0) hide lower layers only, whether they come before or after what this
//!   layer has under the name; a directory that is hidden and present is opaque.
//! - A hard link takes its target's attributes, as with every extraction; it may come before its target.
//! - A directory that has entries here and is not named itself is reported ([`Converted::implied_directories`]), so that
//!   containers can show it as the layers below do ([`stack`]).
//! - Extended attributes are kept by an allow-list, see [`xattr`].

mod apply;
mod compression;
mod convert;
mod erofs;
mod error;
mod finish;
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod ingest;
mod limits;
mod links;
mod path;
mod stack;
mod tar;
mod tar_split;
#[cfg(test)]
mod tests;
mod tree;
mod xattr;

pub use compression::Compression;
pub use convert::{Converted, Target, convert};
pub use error::{EntryProblem, LayerError};
pub use id::{InvalidLayerId, LayerId};
pub use ingest::{BlobExpectation, ingest};
pub use limits::Limits;
pub use tar_split::{RebuildError, archive_size, rebuild};

pub(crate) use compression::MAGIC_LEN;
pub(crate) use erofs::ImageReader;
pub(crate) use stack::{Overlaid, StackLayer, overlaid};
pub(crate) use tar::{EntryKind, TarReader};
