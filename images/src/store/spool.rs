//! An archive that came as a stream, kept in a file without a name until its parts were read in whatever order they are
//! needed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use crate::layer::{Compression, EntryKind, LayerError, Limits, MAGIC_LEN, TarReader};

use super::load::LoadError;

/// Most entries of such an archive: a few for each layer.
const MAX_ENTRIES: u64 = 100_000;
/// Bytes of documents that are read of one archive, each as often as it is referred to: indexes may lead to indexes, and a
/// hostile one to itself in many ways. A document counts as [`LEAST`] at least.
const MAX_DOCUMENTS: u64 = 512 << 20;
const LEAST: u64 = 4096;
/// Most links from one name to the next (docker's archives of old link equal layers).
const MAX_LINKS: usize = 8;

/// The parts of an archive.
pub(super) struct Spool {
    file: File,
    parts: BTreeMap<String, Part>,
    /// Bytes of documents read so far.
    documents: AtomicU64,
}

enum Part {
    File { offset: u64, length: u64 },
    Link(String),
}

/// One file of the archive.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Spool {
    /// Of an archive in `file`; a compressed one is unpacked into what `scratch` gives.
    pub(super) fn new(
        file: File,
        scratch: impl FnOnce() -> Result<File, LoadError>,
    ) -> Result<Self, LoadError> {
        let mut magic = [0; MAGIC_LEN];
        let length = file.read_at(&mut magic, 0).map_err(LoadError::Read)?;
        let mut source = &file;
        source.seek(SeekFrom::Start(0)).map_err(LoadError::Read)?;
        let source = BufReader::with_capacity(256 << 10, source);
        let file = match Compression::from_magic(&magic[..length]) {
            Compression::None => file,
            Compression::Gzip => unpack(MultiGzDecoder::new(source), scratch()?)?,
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(source).map_err(LoadError::Read)?;
                decoder.window_log_max(Limits::default().max_zstd_window_log).map_err(LoadError::Read)?;
                unpack(decoder, scratch()?)?
            }
        };
        let parts = parts(&file)?;
        Ok(Self { file, parts, documents: AtomicU64::new(0) })
    }

    /// Where the file with this name is, links followed.
    pub(super) fn find(&self, name: &str) -> Option<Range> {
        let mut name = normal(name)?;
        for _ in 0..MAX_LINKS {
            match self.parts.get(&name)? {
                Part::File { offset, length } => {
                    return Some(Range { offset: *offset, length: *length });
                }
                Part::Link(target) => name = target.clone(),
            }
        }
        None
    }

    /// A small file whole, at most `limit` bytes.
    pub(super) fn document(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, LoadError> {
        let Some(Range { offset, length }) = self.find(name) else { return Ok(None) };
        if length > limit {
            let reason = format!("{name} has {length} bytes, more than {limit}");
            return Err(LoadError::NoImages(reason));
        }
        let before = self.documents.fetch_add(length.max(LEAST), Ordering::Relaxed);
        if before > MAX_DOCUMENTS {
            let reason = format!("its indexes lead to more than {MAX_DOCUMENTS} bytes of documents");
            return Err(LoadError::NoImages(reason));
        }
        let mut bytes = vec![0; length as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(LoadError::Read)?;
        Ok(Some(bytes))
    }

    /// The bytes of a file.
    pub(super) fn reader(&self, range: Range) -> impl Read + Send + '_ {
        RangeReader { file: &self.file, position: range.offset, left: range.length }
    }
}

fn unpack(mut source: impl Read, mut scratch: File) -> Result<File, LoadError> {
    let limit = Limits::default().max_uncompressed;
    let copied = io::copy(&mut source.by_ref().take(limit + 1), &mut scratch).map_err(LoadError::Read)?;
    match copied > limit {
        true => Err(LoadError::Archive(Box::new(LayerError::Limit { what: "uncompressed bytes", limit }))),
        false => Ok(scratch),
    }
}

fn parts(file: &File) -> Result<BTreeMap<String, Part>, LoadError> {
    let mut source = file;
    source.seek(SeekFrom::Start(0)).map_err(LoadError::Read)?;
    let limits = Limits { max_entries: MAX_ENTRIES, max_uncompressed: u64::MAX >> 1, ..Limits::default() };
    let mut reader = TarReader::new(BufReader::with_capacity(256 << 10, source), &limits, None);
    let mut parts = BTreeMap::new();
    while let Some(entry) = reader.next().map_err(|error| LoadError::Archive(Box::new(error)))? {
        let Some(name) = std::str::from_utf8(&entry.path).ok().and_then(normal) else { continue };
        let part = match entry.kind {
            EntryKind::File(length) if !reader.is_sparse() => {
                Part::File { offset: reader.position(), length }
            }
            EntryKind::Symlink(target) => {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                match String::from_utf8(target).ok().and_then(|t| normal(&format!("{parent}/{t}"))) {
                    Some(target) => Part::Link(target),
                    None => continue,
                }
            }
            EntryKind::HardLink(target) => match String::from_utf8(target).ok().and_then(|t| normal(&t)) {
                Some(target) => Part::Link(target),
                None => continue,
            },
            _ => continue,
        };
        parts.insert(name, part);
    }
    Ok(parts)
}

/// A path without empty parts and dots; None if it leads out of the archive.
fn normal(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

struct RangeReader<'f> {
    file: &'f File,
    position: u64,
    left: u64,
}

impl Read for RangeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = self.left.min(buffer.len() as u64) as usize;
        let read = self.file.read_at(&mut buffer[..wanted], self.position)?;
        self.position += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_but_into_the_archive() {
        assert_eq!(normal("./a//b/"), Some("a/b".to_owned()));
        assert_eq!(normal("a/../b"), Some("b".to_owned()));
        assert_eq!(normal("/a"), Some("a".to_owned()));
        for bad in ["..", "a/../..", "../a", "", ".", "/"] {
            assert_eq!(normal(bad), None, "{bad}");
        }
    }
}
