use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest, Sha256};

use super::apply::Layer;
use super::erofs::{ImageWriter, Unsealed, check_access};
use super::error::LayerError;
use super::id::LayerId;
use super::limits::Limits;
use super::tar::TarReader;

/// What a finished conversion says about its layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// Of the uncompressed archive.
    pub diff_id: LayerId,
    /// Bytes of the layer file.
    pub size: u64,
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
pub fn convert(tar: impl Read, out: &File, limits: &Limits) -> Result<Converted, LayerError> {
    let mut hashing = Hashing { inner: tar, hash: Sha256::new() };
    let written = write(BufReader::with_capacity(256 << 10, &mut hashing), out, limits)?;
    written.seal(LayerId::of(hashing.hash))
}

/// A layer file but for its super block.
pub(super) struct Written<'f> {
    unsealed: Unsealed<'f>,
    entries: u64,
    content: u64,
    opaque_root: bool,
    implied_directories: Vec<Vec<u8>>,
}

/// Everything that does not need the digest.
pub(super) fn write<'f>(
    tar: impl BufRead,
    out: &'f File,
    limits: &Limits,
) -> Result<Written<'f>, LayerError> {
    check_access(out)?;
    let mut reader = TarReader::new(tar, limits);
    let mut layer = Layer::new(ImageWriter::new(out), limits);
    layer.read(&mut reader)?;
    let (content, opaque_root) = (layer.content, layer.hides_all_lower());
    let (unsealed, implied_directories) = layer.finish()?;
    Ok(Written { unsealed, entries: reader.entries(), content, opaque_root, implied_directories })
}

impl Written<'_> {
    /// Makes the file a file system. Its UUID comes from the diffID: the same layer gives the same bytes.
    pub(super) fn seal(self, diff_id: LayerId) -> Result<Converted, LayerError> {
        let Self { unsealed, entries, content, opaque_root, implied_directories } = self;
        let size = unsealed.size;
        unsealed.seal(uuid(&diff_id))?;
        Ok(Converted { diff_id, size, entries, content, opaque_root, implied_directories })
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
