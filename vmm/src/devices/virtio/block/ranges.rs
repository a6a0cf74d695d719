use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::leased::{Lease, Leased};

/// How long writes that are under way are waited for.
const DRAIN: Duration = Duration::from_secs(5);
/// Most ranges: several for each container of a pod.
const MOST: usize = 4096;

/// Why a range of the scratch disk cannot be opened or closed.
#[derive(Debug, Error)]
pub enum RangeError {
    /// It is not a part of the disk.
    #[error(
        "scratch disk: {length} bytes at {offset}: they must be within its {capacity} bytes, not 0, multiples of 4096"
    )]
    Place {
        /// Its first byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Of the disk.
        capacity: u64,
    },
    /// It has bytes of another one.
    #[error("scratch disk: {length} bytes at {offset}: another range that is open has some of them")]
    Overlap {
        /// Its first byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// There are too many.
    #[error("scratch disk: {MOST} ranges are open, and no more can be")]
    TooMany,
    /// A write does not end.
    #[error("scratch disk: a write to the range at {offset} has been under way for {} s", DRAIN.as_secs())]
    StillWritten {
        /// Its first byte.
        offset: u64,
    },
}

/// Where the guest may write. Together they are the most of the host's disk that it can take.
#[derive(Default)]
pub(super) struct WritableRanges(Mutex<BTreeMap<u64, Arc<Leased<u64>>>>);

impl WritableRanges {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Leased<u64>>>> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self, offset: u64, length: u64, capacity: u64) -> Result<(), RangeError> {
        let end = offset.checked_add(length).filter(|end| {
            length > 0 && *end <= capacity && offset.is_multiple_of(4096) && length.is_multiple_of(4096)
        });
        let end = end.ok_or(RangeError::Place { offset, length, capacity })?;
        let mut ranges = self.lock();
        if ranges.get(&offset).is_some_and(|known| ***known == length) {
            return Ok(());
        }
        // The last that begins before the end.
        let before = ranges.range(..end).next_back();
        if before.is_some_and(|(start, length)| start + ***length > offset) {
            return Err(RangeError::Overlap { offset, length });
        }
        if ranges.len() >= MOST {
            return Err(RangeError::TooMany);
        }
        ranges.insert(offset, Leased::new(length));
        Ok(())
    }

    pub(super) fn close(&self, offset: u64) -> Result<(), RangeError> {
        let range = self.lock().remove(&offset);
        let Some(range) = range else { return Ok(()) };
        if range.wait(DRAIN) { Ok(()) } else { Err(RangeError::StillWritten { offset }) }
    }

    /// Keeps all ranges that these bytes are in open for as long as the leases live. Bytes that are in none are an error:
    /// the whole request is refused.
    pub(super) fn lease(&self, at: u64, length: u64) -> io::Result<(Lease<u64>, Vec<Lease<u64>>)> {
        let outside = || io::Error::from(io::ErrorKind::PermissionDenied);
        let ranges = self.lock();
        let end = at.checked_add(length).ok_or_else(outside)?;
        let (start, first) = ranges.range(..=at).next_back().ok_or_else(outside)?;
        let mut reached = start + ***first;
        // Nearly always one; requests to neighbours may have been put together.
        let mut more = Vec::new();
        while reached < end {
            let next = ranges.get(&reached).ok_or_else(outside)?;
            reached += ***next;
            more.push(next.lease());
        }
        if reached <= at { Err(outside()) } else { Ok((first.lease(), more)) }
    }

    pub(super) fn all(&self) -> Vec<(u64, u64)> {
        self.lock().iter().map(|(offset, length)| (*offset, ***length)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: u64 = 1 << 20;

    #[test]
    fn only_what_is_open_from_end_to_end_can_be_written() {
        let ranges = WritableRanges::default();
        assert!(ranges.lease(0, 512).is_err(), "nothing is open at first");
        for (offset, length) in [(4096, 8192), (12288, 4096), (65536, 4096)] {
            ranges.open(offset, length, CAPACITY).unwrap();
        }
        for (at, length) in [(4096, 8192), (4608, 512), (8192, 8192), (12288, 4096), (69120, 512)] {
            assert!(ranges.lease(at, length).is_ok(), "{at} {length}");
        }
        let outside = [
            (0, 512),
            (3584, 1024),
            (12288, 4608),
            (16384, 512),
            (69632, 512),
            (65536, 1 << 19),
            (0, u64::MAX),
        ];
        for (at, length) in outside {
            assert!(ranges.lease(at, length).is_err(), "{at} {length}");
        }
        assert!(ranges.lease(u64::MAX, 2).is_err());
    }

    #[test]
    fn a_range_is_a_part_of_the_disk_that_no_other_has() {
        let ranges = WritableRanges::default();
        for (offset, length) in
            [(0, 0), (512, 4096), (0, 512), (CAPACITY, 4096), (0, CAPACITY + 4096), (u64::MAX - 4095, 4096)]
        {
            assert!(
                matches!(ranges.open(offset, length, CAPACITY), Err(RangeError::Place { .. })),
                "{offset}"
            );
        }
        ranges.open(8192, 8192, CAPACITY).unwrap();
        ranges.open(8192, 8192, CAPACITY).unwrap();
        for (offset, length) in [(4096, 8192), (8192, 4096), (12288, 4096), (0, CAPACITY)] {
            let refused = ranges.open(offset, length, CAPACITY);
            assert!(matches!(refused, Err(RangeError::Overlap { .. })), "{offset}");
        }
        ranges.close(8192).unwrap();
        ranges.close(8192).unwrap();
        assert!(ranges.lease(8192, 512).is_err());
        ranges.open(0, CAPACITY, CAPACITY).unwrap();
    }
}
