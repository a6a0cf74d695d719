//! A directory tree as a tar stream, the other way round of what hull-images does with a layer.
//!
//! [`write_tree`] walks a tree that a container may have filled, and may be filling still: it follows no link, leaves the
//! tree by no name, and needs memory for the names of the directories on its way and nothing else. With
//! [`Marks::ToWhiteouts`] the tree is the upper directory of an overlay and the stream a layer of an image (image-spec
//! layer.md): overlayfs' marks become whiteouts. Equal trees give equal bytes.
#![forbid(unsafe_code)]

mod entry;
mod error;
mod pax;
mod sparse;
mod tree;
mod walk;

pub use entry::{Entry, Kind, Timestamp, Writer, Xattrs};
pub use error::ArchiveError;
pub use tree::{Ids, Marks, Name, Options, Summary, list_upper, write_tree};
