//! A reader of tar archives made for hostile input: V7, ustar, star, GNU and PAX.
//!
//! Where readers in the field disagree about where an entry ends or what it is called, the archive is refused: such a
//! disagreement lets an entry hide from a scanner (CVE-2025-62518).

mod header;
mod input;
mod number;
pub(crate) mod pax;
mod reader;
mod sparse;

pub(crate) use reader::TarReader;

use super::erofs::Timestamp;
use pax::Xattrs;

/// A piece of a file's content, in order.
pub(crate) enum Content<'a> {
    Data(&'a [u8]),
    /// This many bytes of zeros that the archive does not hold.
    Hole(u64),
}

/// One entry, before its path has been looked at.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, 0o7777 at most.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: Xattrs,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// With its size in bytes, holes included.
    File(u64),
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice(Device),
    BlockDevice(Device),
    Directory,
    Fifo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Reads the content of an extended header as if an entry followed. For the fuzz targets.
pub(super) fn read_extended_header(content: &[u8]) -> Result<(), &'static str> {
    let mut records = pax::Records::default();
    records.read(content)?;
    assert!(records.xattrs.len() <= pax::MAX_XATTRS);
    assert!(records.mtime.is_none_or(|mtime| mtime.nanoseconds < 1_000_000_000));
    Ok(())
}
