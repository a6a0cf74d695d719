use std::io::BufRead;

use super::header::{BLOCK, Header};
use super::input::{Input, limit};
use super::number;
use crate::layer::error::{EntryProblem, LayerError};

/// A stretch of a sparse file that has data; what lies between stretches is a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Checks that a map is in order, lies within the file and accounts for all stored bytes.
pub(super) fn check(segments: &[Segment], real_size: u64, stored: u64) -> Result<(), &'static str> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for segment in segments {
        if segment.offset < end {
            return Err("its segments overlap or are out of order");
        }
        end = segment.offset.checked_add(segment.length).ok_or("a segment ends beyond 64 bits")?;
        sum += segment.length;
    }
    if end > real_size {
        return Err("a segment ends beyond the file");
    }
    if sum != stored {
        return Err("its segments do not add up to the stored size");
    }
    Ok(())
}

/// The map of an old GNU sparse entry and the file's size: 4 places in the header, 21 in each following block.
pub(super) fn old_gnu_map<R: BufRead>(
    input: &mut Input<'_, R>,
    header: &Header<'_>,
    path: &[u8],
) -> Result<(Vec<Segment>, u64), LayerError> {
    let bad = |reason| LayerError::entry(path, EntryProblem::BadSparseMap(reason));
    let (places, mut more, real_size) = header.gnu_sparse().ok_or_else(|| bad("a number is malformed"))?;
    let mut segments = Vec::new();
    push_places(&mut segments, places).ok_or_else(|| bad("a number is malformed"))?;
    let mut block = [0; BLOCK];
    while more {
        if !input.read_block(&mut block)? {
            return Err(input.truncated("a sparse map"));
        }
        push_places(&mut segments, &block[..504]).ok_or_else(|| bad("a number is malformed"))?;
        limit("sparse segments", segments.len() as u64, input.limits.max_sparse_segments)?;
        more = block[504] != 0;
    }
    Ok((segments, real_size))
}

/// The map of a PAX 1.0 sparse entry and its bytes in the archive; it lies before the data: decimal lines,
/// padded to whole blocks.
pub(super) fn inline_map<R: BufRead>(
    input: &mut Input<'_, R>,
    stored: u64,
    path: &[u8],
) -> Result<(Vec<Segment>, u64), LayerError> {
    let bad = |reason| LayerError::entry(path, EntryProblem::BadSparseMap(reason));
    let (mut text, mut numbers) = (Vec::new(), Vec::<u64>::new());
    let (mut wanted, mut read) = (1_u64, 0_u64);
    let mut block = [0; BLOCK];
    while (numbers.len() as u64) < wanted {
        if read + BLOCK as u64 > stored.next_multiple_of(BLOCK as u64) {
            return Err(bad("it is longer than the content"));
        }
        if !input.read_block(&mut block)? {
            return Err(input.truncated("a sparse map"));
        }
        read += BLOCK as u64;
        for byte in block {
            if (numbers.len() as u64) >= wanted {
                break;
            }
            if byte != b'\n' {
                text.push(byte);
                continue;
            }
            let value = number::decimal(&text).ok_or_else(|| bad("a number is malformed"))?;
            text.clear();
            if numbers.is_empty() {
                limit("sparse segments", value, input.limits.max_sparse_segments)?;
                wanted += value * 2;
            }
            numbers.push(value);
        }
        if text.len() > 20 {
            return Err(bad("a number is malformed"));
        }
    }
    let segments =
        numbers[1..].chunks_exact(2).map(|pair| Segment { offset: pair[0], length: pair[1] }).collect();
    Ok((segments, read))
}

// Offset and length, 12 bytes each; an empty place ends the list.
fn push_places(segments: &mut Vec<Segment>, places: &[u8]) -> Option<()> {
    for place in places.chunks_exact(24) {
        if place[0] == 0 || place[12] == 0 {
            break;
        }
        let number = |bytes| number::field(bytes).and_then(|value| u64::try_from(value).ok());
        segments.push(Segment { offset: number(&place[..12])?, length: number(&place[12..])? });
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_do_not_add_up_are_refused() {
        let map = [Segment { offset: 10, length: 5 }, Segment { offset: 20, length: 0 }];
        assert!(check(&map, 20, 5).is_ok());
        assert!(check(&map, 19, 5).is_err());
        assert!(check(&map, 20, 6).is_err());
        let overlapping = [Segment { offset: 0, length: 5 }, Segment { offset: 4, length: 1 }];
        assert!(check(&overlapping, 20, 6).is_err());
        let overflowing = [Segment { offset: u64::MAX, length: 2 }];
        assert!(check(&overflowing, u64::MAX, 2).is_err());
    }
}
