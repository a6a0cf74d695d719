//! The way back: the exact tar stream that a layer came from.
//!
//! A layer file holds the content of every file of its archive, byte for byte. What it does not hold (headers, padding,
//! the order of things) is written down beside it while it is converted, as tar-split does for unpacked trees: a list of
//! literal bytes and of pieces of inodes' content. It is compressed and lies behind the file system in the same file,
//! where no mount looks. Put together again it gives the archive, and its hash the layer's diffID: a container's image
//! can be pushed and saved without a copy of its blobs, and a layer file be checked to the last byte.
//!
//! Format: one zstd frame of operations. `0 LENGTH BYTES…` is literal; `1 INODE OFFSET LENGTH` a piece of a regular
//! file's content. Numbers are LEB128.

mod rebuild;
mod record;

pub use rebuild::{RebuildError, archive_size, rebuild};
pub(crate) use record::Recorder;

const LITERAL: u8 = 0;
const CONTENT: u8 = 1;
