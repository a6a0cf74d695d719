use std::collections::VecDeque;

use vm_memory::{GuestAddress, GuestMemory as _, VolatileSlice};

use crate::devices::virtio::{ActiveQueue, Chain, GuestMemory, Interrupt, Memory, QueueError};

/// Most pieces of guest memory that one frame may be spread over.
const MOST_PIECES: usize = 512;
/// Most pieces in one chain: Linux makes chains of 19 for frames of 64 KiB.
const MOST_IN_CHAIN: usize = 64;

/// Chains that were taken from the receive queue and wait for a frame. Taken once and looked at once, however many frames
/// of a few bytes come, although each might be one of 64 KiB.
#[derive(Debug, Default)]
pub(super) struct Stock {
    chains: VecDeque<Stocked>,
    pieces: VecDeque<(GuestAddress, usize)>,
    room: usize,
}

#[derive(Clone, Copy, Debug)]
struct Stocked {
    head: u16,
    pieces: usize,
    room: usize,
}

impl Stock {
    /// Takes chains until there is room for `wanted` bytes, in one chain only unless `merging`. False if the driver has
    /// no more: it will notify. Chains that are of no use go back empty.
    pub(super) fn fill(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &Memory,
        interrupt: &Interrupt,
        wanted: usize,
        merging: bool,
    ) -> Result<bool, QueueError> {
        let mut useless = 0;
        while !self.is_enough(wanted, merging) {
            let Some(chain) = queue.pop(memory)? else {
                if useless > 0 {
                    queue.signal(memory, interrupt);
                }
                return Ok(false);
            };
            let head = chain.head_index();
            // Without merging a chain that cannot hold the longest frame still may hold the next one.
            if !self.add(memory, chain) {
                queue.push(memory, head, 0)?;
                useless += 1;
            }
            if useless > queue.size() {
                // A driver that is this fast has other worries; its next kick goes on here.
                queue.kick_self();
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_enough(&self, wanted: usize, merging: bool) -> bool {
        if merging {
            self.room >= wanted || self.pieces.len() >= MOST_PIECES
        } else {
            !self.chains.is_empty()
        }
    }

    /// Keeps the chain, unless it is none for a frame. Its descriptors are read only here: the driver may change them.
    fn add(&mut self, memory: &GuestMemory, chain: Chain) -> bool {
        let (head, before) = (chain.head_index(), self.pieces.len());
        let mut room = 0;
        for (number, buffer) in chain.enumerate() {
            let length = buffer.len() as usize;
            let fits = number < MOST_IN_CHAIN && buffer.is_write_only();
            if !fits || !memory.check_range(buffer.addr(), length) {
                self.pieces.truncate(before);
                return false;
            }
            // Addresses and not slices: those would borrow the memory.
            self.pieces.push_back((buffer.addr(), length));
            room += length;
        }
        if room <= super::HEADER {
            self.pieces.truncate(before);
            return false;
        }
        self.chains.push_back(Stocked { head, pieces: self.pieces.len() - before, room });
        self.room += room;
        true
    }

    /// The room for the next frame: all that there is, or the first chain unless `merging`.
    pub(super) fn pieces<'m>(&self, memory: &'m GuestMemory, merging: bool) -> Vec<VolatileSlice<'m>> {
        let all =
            if merging { self.pieces.len() } else { self.chains.front().map_or(0, |chain| chain.pieces) };
        // They were in range when they were taken, and memory never changes.
        self.pieces
            .iter()
            .take(all)
            .flat_map(|(address, length)| memory.get_slices(*address, *length).flatten())
            .collect()
    }

    /// How many bytes a frame may have now, with its header.
    pub(super) fn room(&self, merging: bool) -> usize {
        if merging { self.room } else { self.chains.front().map_or(0, |chain| chain.room) }
    }

    /// Takes the chains that a frame of `length` bytes has filled: heads, and how much is in each.
    pub(super) fn take(&mut self, mut length: usize, used: &mut Vec<(u16, u32)>) {
        while length > 0 {
            let Some(chain) = self.chains.pop_front() else { return };
            self.pieces.drain(..chain.pieces);
            self.room -= chain.room;
            let count = length.min(chain.room);
            used.push((chain.head, count as u32));
            length -= count;
        }
    }

    /// Puts all chains back into the queue, as if they had never been taken.
    pub(super) fn give_back(&mut self, queue: &mut ActiveQueue) {
        self.chains.iter().for_each(|_| queue.unpop());
        *self = Self::default();
    }
}
