//! How a record lies in its file, so that a torn one is recognised.
//!
//! magic "HULL", a version byte, three zero bytes, the payload's length (u32, little endian), its CRC-32 (u32, little
//! endian), the payload. A file may hold several: the last whole one counts.

use prost::Message;

const MAGIC: &[u8; 4] = b"HULL";
const VERSION: u8 = 1;
const HEADER: usize = 16;

/// Largest record, in bytes; a CRI request is at most 16 MiB and a record holds one of them.
pub const MAX_RECORD: usize = 17 << 20;

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Shorter or longer than its header says, or no header at all.
    #[error("the record is torn: {0} bytes are not what its header announces")]
    Torn(usize),
    /// Not written by hull, or by a version that this one does not know.
    #[error("the record has an unknown format")]
    UnknownFormat,
    /// The bytes changed after they were written.
    #[error("the record's checksum does not match its content")]
    Checksum,
    /// Not the message that was expected.
    #[error("the record's content cannot be decoded: {0}")]
    Content(String),
    /// Over [`MAX_RECORD`].
    #[error("the record would have {0} bytes, more than {MAX_RECORD}")]
    TooLarge(usize),
}

/// The bytes of a file that holds `record`.
pub fn encode(record: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = record.encoded_len();
    if length > MAX_RECORD {
        return Err(FrameError::TooLarge(length));
    }
    let mut bytes = Vec::with_capacity(HEADER + length);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    record.encode(&mut bytes).map_err(|error| FrameError::Content(error.to_string()))?;
    let checksum = crc32fast::hash(&bytes[HEADER..]);
    bytes[12..HEADER].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// The record in the bytes of a file that holds one.
pub fn decode<R: Message + Default>(bytes: &[u8]) -> Result<R, FrameError> {
    let payload = payload(bytes)?;
    if HEADER + payload.len() != bytes.len() {
        return Err(FrameError::Torn(bytes.len()));
    }
    content(payload)
}

/// The last whole record in the bytes of a file that holds several, and how many bytes lead up to its end: what follows
/// is torn. An error if not even the first is whole.
pub fn decode_last<R: Message + Default>(bytes: &[u8]) -> Result<(R, usize), FrameError> {
    let mut last = payload(bytes)?;
    let mut end = HEADER + last.len();
    while let Ok(next) = payload(&bytes[end..]) {
        last = next;
        end += HEADER + next.len();
    }
    Ok((content(last)?, end))
}

/// Of the first record in `bytes`.
fn payload(bytes: &[u8]) -> Result<&[u8], FrameError> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (Some(header), Some(length), Some(checksum)) = (bytes.get(..8), word(8), word(12)) else {
        return Err(FrameError::Torn(bytes.len()));
    };
    if header[..4] != *MAGIC || header[4] != VERSION {
        return Err(FrameError::UnknownFormat);
    }
    let payload = bytes[HEADER..].get(..length as usize).ok_or(FrameError::Torn(bytes.len()))?;
    if crc32fast::hash(payload) != checksum {
        return Err(FrameError::Checksum);
    }
    Ok(payload)
}

fn content<R: Message + Default>(payload: &[u8]) -> Result<R, FrameError> {
    R::decode(payload).map_err(|error| FrameError::Content(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::SandboxRecord;

    fn record() -> SandboxRecord {
        SandboxRecord { id: "a".repeat(64), boot_id: "boot".into(), created_at: 7, ..Default::default() }
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let bytes = encode(&record()).unwrap();
        assert_eq!(decode::<SandboxRecord>(&bytes).unwrap(), record());
    }

    #[test]
    fn a_record_cut_anywhere_is_torn() {
        let bytes = encode(&record()).unwrap();
        for length in 0..bytes.len() {
            assert_eq!(decode::<SandboxRecord>(&bytes[..length]), Err(FrameError::Torn(length)));
        }
    }

    #[test]
    fn of_several_records_the_last_whole_one_counts() {
        let states = [1, 2, 3].map(|created_at| SandboxRecord { created_at, ..record() });
        let frames = states.each_ref().map(|state| encode(state).unwrap());
        let bytes = frames.concat();
        let ends = [frames[0].len(), frames[0].len() + frames[1].len(), bytes.len()];
        for length in 0..=bytes.len() {
            let last = decode_last::<SandboxRecord>(&bytes[..length]).ok();
            let whole = ends.iter().rposition(|end| *end <= length);
            assert_eq!(last, whole.map(|index| (states[index].clone(), ends[index])), "{length}");
        }
        // What a power cut leaves of a longer file: zeros.
        let zeros = [&bytes[..ends[1]], &[0; 500]].concat();
        assert_eq!(decode_last::<SandboxRecord>(&zeros).unwrap(), (states[1].clone(), ends[1]));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let bytes = encode(&record()).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            // Bytes 5 to 7 are reserved.
            assert_eq!(decode::<SandboxRecord>(&changed).is_ok(), (5..8).contains(&at), "byte {at}");
        }
    }

    #[test]
    fn zeros_after_a_power_cut_are_no_record() {
        assert_eq!(decode::<SandboxRecord>(&[0; 4096]), Err(FrameError::UnknownFormat));
    }
}
