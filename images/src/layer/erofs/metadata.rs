use super::format::{BLOCK, BLOCK_U64, SLOT};
use super::output::Output;
use crate::layer::error::LayerError;

const FIRST_RUN: usize = 4;
const LAST_RUN: usize = 256;

/// Places inodes, with their attributes and inline tails, into runs of blocks that lie between the file data.
///
/// A run is reserved in the file when it is begun and written when it is full, so an inode's number is known at once and
/// nothing of an inode stays in memory. Runs grow from 16 KiB to 1 MiB: a small layer stays small.
pub(crate) struct Metadata {
    /// Where the open run lies in the file; 0 when there is none.
    start: u64,
    capacity: usize,
    content: Vec<u8>,
    /// Used bytes of each begun block of the run, multiples of an inode slot.
    used: Vec<u16>,
    next_capacity: usize,
}

impl Metadata {
    pub(crate) fn new() -> Self {
        Self { start: 0, capacity: 0, content: Vec::new(), used: Vec::new(), next_capacity: FIRST_RUN }
    }

    /// Stores an inode (`head`: inode and attributes) and returns its number. When both fit one block, they are in one;
    /// a longer head takes blocks of its own and must have no tail.
    pub(crate) fn place(
        &mut self,
        output: &mut Output<'_>,
        head: &[u8],
        tail: &[u8],
    ) -> Result<u64, LayerError> {
        let size = (head.len() + tail.len()).next_multiple_of(SLOT as usize);
        let position = match self.find(size) {
            Some(position) => position,
            None => {
                self.close(output)?;
                self.open(output, size.div_ceil(BLOCK))?;
                self.begin(size)
            }
        };
        self.content[position..position + head.len()].copy_from_slice(head);
        self.content[position + head.len()..][..tail.len()].copy_from_slice(tail);
        Ok((self.start + position as u64) / SLOT)
    }

    /// Reads back what was placed.
    pub(crate) fn read(
        &self,
        output: &mut Output<'_>,
        bytes: &mut [u8],
        position: u64,
    ) -> Result<(), LayerError> {
        let in_run = position.checked_sub(self.start).and_then(|offset| usize::try_from(offset).ok());
        match in_run.and_then(|offset| self.content.get(offset..offset + bytes.len())) {
            Some(content) => bytes.copy_from_slice(content),
            None => output.read_at(bytes, position)?,
        }
        Ok(())
    }

    /// Writes the open run out.
    pub(crate) fn close(&mut self, output: &Output<'_>) -> Result<(), LayerError> {
        output.write_at(&self.content, self.start)?;
        self.start = 0;
        self.capacity = 0;
        self.content.clear();
        self.used.clear();
        Ok(())
    }

    fn open(&mut self, output: &mut Output<'_>, at_least: usize) -> Result<(), LayerError> {
        self.capacity = self.next_capacity.max(at_least);
        self.next_capacity = (self.next_capacity * 2).min(LAST_RUN);
        self.start = output.position();
        output.skip(self.capacity as u64 * BLOCK_U64)
    }

    // The fullest begun block that still takes `size`, or fresh ones.
    fn find(&mut self, size: usize) -> Option<usize> {
        let fits = |used: &u16| usize::from(*used) + size <= BLOCK;
        let best = self.used.iter().enumerate().filter(|(_, used)| fits(used)).max_by_key(|(_, used)| **used);
        if let Some((block, used)) = best {
            let position = block * BLOCK + usize::from(*used);
            self.used[block] += size as u16;
            return Some(position);
        }
        (self.used.len() + size.div_ceil(BLOCK) <= self.capacity).then(|| self.begin(size))
    }

    fn begin(&mut self, size: usize) -> usize {
        let position = self.used.len() * BLOCK;
        let blocks = size.div_ceil(BLOCK);
        self.content.resize(position + blocks * BLOCK, 0);
        self.used.extend(std::iter::repeat_n(BLOCK as u16, blocks - 1));
        self.used.push((size - (blocks - 1) * BLOCK) as u16);
        position
    }
}
