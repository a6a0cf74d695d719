use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::{CONTENT, LITERAL};
use crate::layer::erofs::ImageReader;

/// Bytes that are copied at once.
const PIECE: usize = 256 << 10;

/// Why a layer's archive cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The layer file cannot be read, or is not what was written.
    #[error("the layer file cannot be read: {0}")]
    Layer(#[source] io::Error),
    /// Whoever wants the archive takes no more.
    #[error("cannot write the archive: {0}")]
    Output(#[source] io::Error),
}

/// Writes the tar stream that `layer` was made from to `out`: what is behind the file system of `size` bytes, `length`
/// bytes long, says how. Blocking. Damage that keeps the form is not noticed here: compare the stream's SHA-256 with the
/// layer's diffID.
pub fn rebuild(layer: &File, size: u64, length: u64, out: &mut impl Write) -> Result<(), RebuildError> {
    let read = RebuildError::Layer;
    let image = ImageReader::new(layer.try_clone().map_err(read)?).map_err(read)?;
    let mut operations = Operations::new(layer, size, length).map_err(read)?;
    let mut buffer = vec![0; PIECE];
    while let Some(operation) = operations.next().map_err(read)? {
        match operation {
            Operation::Literal(mut left) => {
                while left > 0 {
                    let take = left.min(PIECE as u64) as usize;
                    operations.split.read_exact(&mut buffer[..take]).map_err(read)?;
                    out.write_all(&buffer[..take]).map_err(RebuildError::Output)?;
                    left -= take as u64;
                }
            }
            Operation::Content { inode, mut offset, length: mut left } => {
                let content = image.content(inode).map_err(read)?;
                while left > 0 {
                    let (position, available) = content.at(offset).map_err(read)?;
                    let take = left.min(available).min(PIECE as u64) as usize;
                    layer.read_exact_at(&mut buffer[..take], position).map_err(read)?;
                    out.write_all(&buffer[..take]).map_err(RebuildError::Output)?;
                    (offset, left) = (offset + take as u64, left - take as u64);
                }
            }
        }
    }
    Ok(())
}

/// Bytes of the archive that [`rebuild`] with the same arguments would write. Reads no file's content.
pub fn archive_size(layer: &File, size: u64, length: u64) -> io::Result<u64> {
    let mut operations = Operations::new(layer, size, length)?;
    let mut total = 0_u64;
    while let Some(operation) = operations.next()? {
        let length = match operation {
            Operation::Literal(length) => {
                let skipped = io::copy(&mut operations.split.by_ref().take(length), &mut io::sink())?;
                if skipped < length {
                    return Err(damaged("it is cut off"));
                }
                length
            }
            Operation::Content { length, .. } => length,
        };
        total = total.checked_add(length).ok_or_else(|| damaged("its lengths are too large"))?;
    }
    Ok(total)
}

enum Operation {
    /// So many bytes follow.
    Literal(u64),
    Content {
        inode: u64,
        offset: u64,
        length: u64,
    },
}

struct Operations {
    split: BufReader<zstd::stream::read::Decoder<'static, BufReader<io::Take<File>>>>,
}

impl Operations {
    fn new(layer: &File, size: u64, length: u64) -> io::Result<Self> {
        let mut file = layer.try_clone()?;
        file.seek(SeekFrom::Start(size))?;
        let decoder = zstd::stream::read::Decoder::new(file.take(length))?;
        Ok(Self { split: BufReader::with_capacity(64 << 10, decoder) })
    }

    fn next(&mut self) -> io::Result<Option<Operation>> {
        let split = &mut self.split;
        if split.fill_buf()?.is_empty() {
            return Ok(None);
        }
        match byte(split)? {
            LITERAL => number(split).map(|length| Some(Operation::Literal(length))),
            CONTENT => {
                let (inode, offset, length) = (number(split)?, number(split)?, number(split)?);
                Ok(Some(Operation::Content { inode, offset, length }))
            }
            _ => Err(damaged("an unknown operation")),
        }
    }
}

fn byte(split: &mut impl Read) -> io::Result<u8> {
    let mut byte = [0];
    split.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn number(split: &mut impl Read) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = byte(split)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged("a number is too long"))
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("its way back to an archive is damaged: {what}"))
}
