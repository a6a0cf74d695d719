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
    let mut split = layer.try_clone().map_err(read)?;
    split.seek(SeekFrom::Start(size)).map_err(read)?;
    let decoder = zstd::stream::read::Decoder::new(split.take(length)).map_err(read)?;
    let mut split = BufReader::with_capacity(64 << 10, decoder);
    let mut buffer = vec![0; PIECE];
    while !split.fill_buf().map_err(read)?.is_empty() {
        match byte(&mut split).map_err(read)? {
            LITERAL => {
                let mut left = number(&mut split).map_err(read)?;
                while left > 0 {
                    let take = left.min(PIECE as u64) as usize;
                    split.read_exact(&mut buffer[..take]).map_err(read)?;
                    out.write_all(&buffer[..take]).map_err(RebuildError::Output)?;
                    left -= take as u64;
                }
            }
            CONTENT => {
                let inode = number(&mut split).map_err(read)?;
                let mut offset = number(&mut split).map_err(read)?;
                let mut left = number(&mut split).map_err(read)?;
                let extents = image.content(inode).map_err(read)?;
                while left > 0 {
                    let (position, available) = extents.at(offset).map_err(read)?;
                    let take = left.min(available).min(PIECE as u64) as usize;
                    layer.read_exact_at(&mut buffer[..take], position).map_err(read)?;
                    out.write_all(&buffer[..take]).map_err(RebuildError::Output)?;
                    (offset, left) = (offset + take as u64, left - take as u64);
                }
            }
            _ => return Err(read(damaged("an unknown operation"))),
        }
    }
    Ok(())
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
