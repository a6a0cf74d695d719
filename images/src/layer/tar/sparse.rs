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
