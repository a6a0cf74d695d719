use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest, Sha256};

use super::apply::Layer;
use super::erofs::{ImageWriter, Unsealed, check_access};
use super::error::LayerError;
use super::id::LayerId;
use super::limits::Limits;
use super::tar::TarReader;
use super::tar_split::Recorder;

/// What a finished conversion says about its layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// Of the uncompressed archive.
    pub diff_id: LayerId,
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes behind it that lead back to the archive ([`rebuild`](super::rebuild)); 0 if that was not asked for.
    pub tar_split: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// Sum of the sizes of all files in the archive, holes included.
    pub content: u64,
    /// Whether the layer hides everything in the layers below it (a `.wh..wh..opq` in its root). Overlayfs ignores the
    /// mark on a root, so whoever mounts must leave the lower layers out.
    pub opaque_root: bool,
    /// Directories that the archive has entries in but does not name, shallow ones first, relative to the root. In a
    /// container they must look as a lower layer has them. At most 16,384 and 1 MiB of paths; deeper ones beyond that
    /// are left out.
    pub implied_directories: Vec<Vec<u8>>,
}

/// Converts a tar archive to an EROFS image, in one pass and in bounded memory.
///
/// `tar` gives the uncompressed archive and is read to its end. `out` is a fresh, empty file, open for reading and
/// writing; it is not synced. Nothing is verified: `diff_id` of the answer is for the caller to compare. Blocking. After
/// an error the file's content means nothing, and it has no super block.
pub fn convert<'f>(
    tar: impl Read,
    out: impl Into<Target<'f>>,
    limits: &Limits,
) -> Result<Converted, LayerError> {
    let mut hashing = Hashing { inner: tar, hash: Sha256::new() };
    let written = write(BufReader::with_capacity(256 << 10, &mut hashing), out.into(), limits)?;
    written.seal(LayerId::of(hashing.hash))
}

/// Where a layer is written.
#[derive(Clone, Copy, Debug)]
pub struct Target<'f> {
    /// The layer file.
    pub layer: &'f File,
    /// An empty file, open for reading and writing, in which the way back to the archive is gathered; it is appended to
    /// the layer file at the end and is of no use then. Without one a layer cannot be turned back.
    pub scratch: Option<&'f File>,
}

impl<'f> From<&'f File> for Target<'f> {
    fn from(layer: &'f File) -> Self {
        Self { layer, scratch: None }
    }
}

/// A layer file but for its super block.
pub(super) struct Written<'f> {
    unsealed: Unsealed<'f>,
    tar_split: u64,
    entries: u64,
    content: u64,
    opaque_root: bool,
    implied_directories: Vec<Vec<u8>>,
}

/// Everything that does not need the digest.
pub(super) fn write<'f>(
    tar: impl BufRead,
    target: Target<'f>,
    limits: &Limits,
) -> Result<Written<'f>, LayerError> {
    let out = target.layer;
    check_access(out)?;
    let recorder = target.scratch.map(Recorder::new).transpose().map_err(LayerError::WriteFile)?;
    let mut reader = TarReader::new(tar, limits, recorder);
    let mut layer = Layer::new(ImageWriter::new(out), limits);
    layer.read(&mut reader)?;
    let (content, opaque_root) = (layer.content, layer.hides_all_lower());
    let (unsealed, implied_directories) = layer.finish()?;
    let entries = reader.entries();
    let tar_split = match reader.into_recorder() {
        Some(recorder) => recorder.append_to(out, unsealed.size)?,
        None => 0,
    };
    Ok(Written { unsealed, tar_split, entries, content, opaque_root, implied_directories })
}

impl Written<'_> {
    /// Makes the file a file system. Its UUID comes from the diffID: the same layer gives the same bytes.
    pub(super) fn seal(self, diff_id: LayerId) -> Result<Converted, LayerError> {
        let Self { unsealed, tar_split, entries, content, opaque_root, implied_directories } = self;
        let size = unsealed.size;
        unsealed.seal(uuid(&diff_id))?;
        Ok(Converted { diff_id, size, tar_split, entries, content, opaque_root, implied_directories })
    }
}

// RFC 9562, version 8: custom content.
fn uuid(diff_id: &LayerId) -> [u8; 16] {
    let mut uuid = [0; 16];
    // The first 32 of the id's 64 hex digits; LayerId has checked them.
    if hex::decode_to_slice(&diff_id.hex()[..32], &mut uuid).is_err() {
        uuid = [0; 16];
    }
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}
