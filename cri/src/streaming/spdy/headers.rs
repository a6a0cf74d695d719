//! Header blocks: one zlib stream for each direction of a connection, begun with a dictionary (SPDY/3.1, 2.6.10).

use std::collections::BTreeMap;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use super::dictionary::DICTIONARY;
use super::error::SpdyError;

/// Most bytes of a header block when decompressed.
pub(super) const MAX_BLOCK: usize = 64 << 10;
/// Most headers of a block.
const MAX_HEADERS: u32 = 128;

/// Names in lower case with their values; several values of one name are separated by zero bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(BTreeMap<String, String>);

impl Headers {
    /// Adds a header; the name is made lower case.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.insert(name.to_ascii_lowercase(), value.to_owned());
        self
    }

    /// The (first) value of a header; `name` in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|value| value.split('\0').next())
    }
}

/// Decompresses the blocks of one direction, in the order in which they came.
pub(super) struct HeaderReader(Decompress);

impl HeaderReader {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// One block, of which every byte is needed: the next one continues the same zlib stream.
    pub(super) fn read(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::new();
        let mut chunk = [0; 4096];
        let began = self.0.total_in();
        loop {
            let taken = (self.0.total_in() - began) as usize;
            let before = self.0.total_out();
            let result =
                self.0.decompress(block.get(taken..).unwrap_or(&[]), &mut chunk, FlushDecompress::Sync);
            let length = (self.0.total_out() - before) as usize;
            plain.extend_from_slice(&chunk[..length]);
            if plain.len() > MAX_BLOCK {
                return Err(SpdyError::HeadersTooLong);
            }
            let moved = (self.0.total_in() - began) as usize > taken || length > 0;
            match result {
                Ok(flate2::Status::StreamEnd) => return Err(SpdyError::Headers("their zlib stream ended")),
                Ok(_)
                    if !moved
                        || (length < chunk.len() && (self.0.total_in() - began) as usize >= block.len()) =>
                {
                    return Ok(plain);
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.0.set_dictionary(&DICTIONARY);
                    set.map_err(|_| SpdyError::Headers("they use another dictionary"))?;
                }
                Err(_) => return Err(SpdyError::Headers("they cannot be decompressed")),
            }
        }
    }
}

/// Number of pairs, then name and value of each, every one after its length (SPDY/3.1, 2.6.10).
fn parse(plain: &[u8]) -> Result<Headers, SpdyError> {
    let mut rest = plain;
    let count = number(&mut rest)?;
    if count > MAX_HEADERS {
        return Err(SpdyError::HeadersTooLong);
    }
    let mut headers = BTreeMap::new();
    for _ in 0..count {
        let name = text(&mut rest)?.to_ascii_lowercase();
        let value = text(&mut rest)?;
        if name.is_empty() {
            return Err(SpdyError::Headers("a name is empty"));
        }
        if headers.insert(name, value.to_owned()).is_some() {
            return Err(SpdyError::Headers("a name comes twice"));
        }
    }
    Ok(Headers(headers))
}

const CUT_OFF: SpdyError = SpdyError::Headers("they are cut off");

fn number(rest: &mut &[u8]) -> Result<u32, SpdyError> {
    let (bytes, after) = rest.split_first_chunk::<4>().ok_or(CUT_OFF)?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, SpdyError> {
    let length = number(rest)? as usize;
    let (bytes, after) = rest.split_at_checked(length).ok_or(CUT_OFF)?;
    *rest = after;
    std::str::from_utf8(bytes).map_err(|_| SpdyError::Headers("they are not text"))
}

/// Compresses the blocks of one direction.
pub(super) struct HeaderWriter(Compress);

impl HeaderWriter {
    pub(super) fn new() -> Result<Self, SpdyError> {
        let mut compress = Compress::new(Compression::default(), true);
        compress.set_dictionary(&DICTIONARY).map_err(|_| SpdyError::Headers("the dictionary is refused"))?;
        Ok(Self(compress))
    }

    /// One block; it must be sent, and in this order.
    pub(super) fn write(&mut self, headers: &Headers) -> Result<Vec<u8>, SpdyError> {
        let mut plain = Vec::new();
        plain.extend_from_slice(&(headers.0.len() as u32).to_be_bytes());
        for text in headers.0.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = Vec::new();
        let mut chunk = [0; 4096];
        let (began, mut taken) = (self.0.total_in(), 0);
        loop {
            let before = self.0.total_out();
            self.0
                .compress(&plain[taken..], &mut chunk, FlushCompress::Sync)
                .map_err(|_| SpdyError::Headers("they cannot be compressed"))?;
            let length = (self.0.total_out() - before) as usize;
            block.extend_from_slice(&chunk[..length]);
            taken = (self.0.total_in() - began) as usize;
            if taken == plain.len() && length < chunk.len() {
                return Ok(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_one_connection_are_read_as_written() {
        let (mut writer, mut reader) = (HeaderWriter::new().unwrap(), HeaderReader::new());
        for number in 0..200 {
            let headers = Headers::default().with("streamType", "data").with("port", &number.to_string());
            let block = writer.write(&headers).unwrap();
            let read = reader.read(&block).unwrap();
            assert_eq!(read, headers);
            assert_eq!(read.get("streamtype"), Some("data"));
        }
        assert_eq!(reader.read(&writer.write(&Headers::default()).unwrap()).unwrap(), Headers::default());
    }

    #[test]
    fn a_block_as_long_as_a_buffer_is_read_whole() {
        let (mut writer, mut reader) = (HeaderWriter::new().unwrap(), HeaderReader::new());
        for length in (4096 - 40)..(4096 + 8) {
            let headers = Headers::default().with("x", &"y".repeat(length));
            assert_eq!(reader.read(&writer.write(&headers).unwrap()).unwrap(), headers);
        }
    }

    #[test]
    fn a_block_that_swells_is_refused_before_it_fills_memory() {
        let (mut writer, mut reader) = (HeaderWriter::new().unwrap(), HeaderReader::new());
        let block = writer.write(&Headers::default().with("x", &"y".repeat(10 << 20))).unwrap();
        assert!(block.len() < 64 << 10);
        assert!(matches!(reader.read(&block), Err(SpdyError::HeadersTooLong)));
    }

    #[test]
    fn what_is_no_header_block_is_an_error() {
        for plain in [
            &b"\0\0\0\x01"[..],
            b"\0\0\0\x01\xff\xff\xff\xff",
            b"\0\0\0\x01\0\0\0\0\0\0\0\0",
            b"\0\0\0\x01\0\0\0\x01\xff\0\0\0\0",
            b"\0\0\0\x02\0\0\0\x01a\0\0\0\0\0\0\0\x01A\0\0\0\0",
            b"\xff\xff\xff\xff",
            b"",
        ] {
            assert!(parse(plain).is_err(), "{plain:?}");
        }
        assert!(HeaderReader::new().read(b"no zlib stream at all").is_err());
    }
}
