use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use zstd::stream::write::Encoder;

use super::{CONTENT, LITERAL};
use crate::layer::error::LayerError;

/// Literal bytes gathered into one operation.
const GATHERED: usize = 64 << 10;
/// Headers repeat themselves: the fastest level makes some 20 bytes of each, a higher one little less.
const LEVEL: i32 = 1;

/// Writes down what a layer file will not hold of its archive. What it is told comes in the archive's order.
pub(crate) struct Recorder<'f> {
    out: Encoder<'static, BufWriter<&'f File>>,
    literal: Vec<u8>,
    /// Pieces of content that come before `literal`, of an inode that has no number yet: offset and length.
    pieces: Vec<(u64, u64)>,
}

impl<'f> Recorder<'f> {
    /// Into an empty file.
    pub(crate) fn new(file: &'f File) -> io::Result<Self> {
        let mut out = Encoder::new(BufWriter::new(file), LEVEL)?;
        out.include_checksum(true)?;
        Ok(Self { out, literal: Vec::with_capacity(GATHERED), pieces: Vec::new() })
    }

    /// Bytes of the archive that are no file's content.
    pub(crate) fn literal(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.literal.extend_from_slice(bytes);
        // Of an entry whose number is not known yet there is only padding to come, less than a block.
        if self.literal.len() >= GATHERED && self.pieces.is_empty() { self.flush() } else { Ok(()) }
    }

    /// The archive goes on with this part of the current entry's content.
    pub(crate) fn piece(&mut self, offset: u64, length: u64) -> io::Result<()> {
        if self.pieces.is_empty() {
            self.flush()?;
        }
        match self.pieces.last_mut() {
            Some((start, so_far)) if *start + *so_far == offset => *so_far += length,
            _ => self.pieces.push((offset, length)),
        }
        Ok(())
    }

    /// The inode that holds the pieces told of since the last one.
    pub(crate) fn inode(&mut self, number: u64) -> io::Result<()> {
        for (offset, length) in std::mem::take(&mut self.pieces) {
            self.out.write_all(&[CONTENT])?;
            for value in [number, offset, length] {
                self.number(value)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.literal.is_empty() {
            return Ok(());
        }
        self.out.write_all(&[LITERAL])?;
        self.number(self.literal.len() as u64)?;
        self.out.write_all(&self.literal)?;
        self.literal.clear();
        Ok(())
    }

    fn number(&mut self, mut value: u64) -> io::Result<()> {
        let mut bytes = [0; 10];
        let mut length = 0;
        while value > 0x7f {
            bytes[length] = value as u8 | 0x80;
            value >>= 7;
            length += 1;
        }
        bytes[length] = value as u8;
        self.out.write_all(&bytes[..=length])
    }

    /// Appends all of it to `layer`, a layer file of `size` bytes, and returns how many bytes that are.
    pub(crate) fn append_to(mut self, layer: &File, size: u64) -> Result<u64, LayerError> {
        let append = move || {
            self.flush()?;
            let buffered = self.out.finish()?;
            let mut file = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
            let length = file.stream_position()?;
            file.seek(SeekFrom::Start(0))?;
            let mut out = layer;
            out.seek(SeekFrom::Start(size))?;
            io::copy(&mut file, &mut out)?;
            Ok(length)
        };
        append().map_err(LayerError::WriteFile)
    }
}
