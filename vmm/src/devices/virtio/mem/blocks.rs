/// Which blocks of a region are plugged: a bit for each.
pub(super) struct Blocks {
    bits: Vec<u64>,
    plugged: u64,
}

/// Some of the blocks are plugged and some are not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mixed;

impl Blocks {
    /// None of `count` blocks.
    pub(super) fn new(count: u64) -> Self {
        Self { bits: vec![0; usize::try_from(count.div_ceil(64)).unwrap_or(0)], plugged: 0 }
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Whether all of these blocks are plugged, or none; the caller has checked that they are in the region.
    pub(super) fn state(&self, first: u64, count: u64) -> Result<bool, Mixed> {
        let state = self.is_plugged(first);
        if (first..first + count).all(|block| self.is_plugged(block) == state) {
            Ok(state)
        } else {
            Err(Mixed)
        }
    }

    /// Marks blocks, whatever they were.
    pub(super) fn set(&mut self, first: u64, count: u64, plugged: bool) {
        for block in first..first + count {
            if self.is_plugged(block) != plugged
                && let Some(word) = self.bits.get_mut((block / 64) as usize)
            {
                *word ^= 1 << (block % 64);
                self.plugged = if plugged { self.plugged + 1 } else { self.plugged - 1 };
            }
        }
    }

    /// The plugged blocks as runs: first and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in (0..self.bits.len() as u64 * 64).filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }

    fn is_plugged(&self, block: u64) -> bool {
        self.bits.get((block / 64) as usize).is_some_and(|word| word & 1 << (block % 64) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once_and_told_as_runs() {
        let mut blocks = Blocks::new(130);
        blocks.set(60, 10, true);
        blocks.set(65, 2, true);
        blocks.set(129, 1, true);
        blocks.set(63, 1, false);
        assert_eq!(blocks.plugged(), 10);
        assert_eq!(blocks.runs(), [(60, 3), (64, 6), (129, 1)]);
        assert_eq!(blocks.state(60, 3), Ok(true));
        assert_eq!(blocks.state(60, 4), Err(Mixed));
        assert_eq!(blocks.state(0, 60), Ok(false));
    }
}
