//! Memory that comes and goes while the machine runs (virtio 1.2, 5.15): a region reserved at birth, of which the guest
//! plugs as many blocks as the host asks it to.

/// Which blocks are plugged.
mod blocks;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress};

use super::instant::{Answer, InstantDevice, Kind};
use super::release::release;
use super::{Chain, Interrupt, Memory, VirtioDevice, Worker};
use blocks::{Blocks, Mixed};

/// The unit of plugging: what the guest's kernel onlines at least, and a huge page.
pub const BLOCK: u64 = 2 << 20;

/// Virtio 1.2, 5.15.3. The driver may not even read what is unplugged. (What it reads nevertheless is zeros.)
const UNPLUGGED_INACCESSIBLE: u32 = 1;

// Virtio 1.2, 5.15.6.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Bytes of a request: type, padding, address, number of blocks, padding.
const REQUEST: usize = 24;
/// Bytes of an answer: type, padding, state.
const ANSWER: usize = 10;
/// Most descriptors of a request that are looked at.
const DESCRIPTORS: usize = 16;

/// The region cannot be.
#[derive(Debug, Error)]
#[error("virtio-mem: a region of {length} bytes at {start:#x}: {reason}")]
pub struct RegionError {
    /// Guest physical address.
    pub start: u64,
    /// In bytes.
    pub length: u64,
    /// What is wrong.
    pub reason: &'static str,
}

/// More was asked for than the region holds, or no whole blocks.
#[derive(Debug, Error)]
#[error(
    "resize memory: {asked} bytes beyond those at birth: it must be a multiple of 2 MiB and at most {most}"
)]
pub struct ResizeError {
    /// In bytes.
    pub asked: u64,
    /// In bytes.
    pub most: u64,
}

/// The memory device for the region of guest memory from `start` of `length` bytes, both multiples of 2 MiB, served on
/// `worker`: the device and the handle that resizes. At birth nothing is plugged and nothing is asked for.
///
/// # Errors
/// The region cannot be.
pub fn mem(
    start: u64,
    length: u64,
    worker: &Worker,
) -> Result<(impl VirtioDevice + use<>, MemHandle), RegionError> {
    let refuse = |reason| RegionError { start, length, reason };
    if !start.is_multiple_of(BLOCK) || !length.is_multiple_of(BLOCK) {
        return Err(refuse("it is not aligned to 2 MiB"));
    }
    if start.checked_add(length).is_none() || length > MOST {
        return Err(refuse("it is too large"));
    }
    let state = State { blocks: Blocks::new(length / BLOCK), requested: 0, interrupt: None };
    let kind = Arc::new(Mem { start, length, state: Mutex::new(state) });
    Ok((InstantDevice::new(kind.clone(), worker), MemHandle { kind }))
}

/// The largest region: its bitmap takes 512 KiB.
const MOST: u64 = 8 << 40;

/// Resizes the machine's memory. Cheap to clone; any thread.
#[derive(Clone)]
pub struct MemHandle {
    kind: Arc<Mem>,
}

impl MemHandle {
    /// Asks the guest to have `bytes` of memory beyond what it was born with. It plugs or unplugs when it can: unplugging
    /// may take long or stay incomplete; [`MemHandle::plugged`] says how far it is.
    ///
    /// # Errors
    /// See [`ResizeError`]; nothing has changed then.
    pub fn resize(&self, bytes: u64) -> Result<(), ResizeError> {
        let most = self.kind.length;
        if !bytes.is_multiple_of(BLOCK) || bytes > most {
            return Err(ResizeError { asked: bytes, most });
        }
        let mut state = self.kind.lock();
        if state.requested != bytes {
            state.requested = bytes;
            if let Some(interrupt) = &state.interrupt {
                interrupt.config();
            }
        }
        Ok(())
    }

    /// Bytes beyond those at birth that the guest was asked to have.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.kind.lock().requested
    }

    /// Bytes beyond those at birth that the guest has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.kind.lock().blocks.plugged() * BLOCK
    }

    /// Most bytes beyond those at birth.
    #[must_use]
    pub fn most(&self) -> u64 {
        self.kind.length
    }
}

/// The kind of device that is memory.
struct Mem {
    start: u64,
    length: u64,
    state: Mutex<State>,
}

struct State {
    blocks: Blocks,
    /// Bytes.
    requested: u64,
    interrupt: Option<Interrupt>,
}

/// What the driver is answered (virtio 1.2, 5.15.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    State(u16),
    /// Not now: more than was asked for.
    Refused,
    /// The host could not do it; the driver may try again.
    Busy,
    /// The request makes no sense.
    Error,
}

impl Mem {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, request: [u8; REQUEST], memory: &Memory) -> Outcome {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&request[8..16]);
        let count = u16::from_le_bytes([request[16], request[17]]);
        if kind == UNPLUG_ALL {
            return self.unplug_all(memory);
        }
        let Some((first, count)) = self.place(u64::from_le_bytes(address), u64::from(count)) else {
            return Outcome::Error;
        };
        match kind {
            PLUG => self.plug(first, count),
            UNPLUG => self.unplug(first, count, memory),
            STATE => Outcome::State(match self.lock().blocks.state(first, count) {
                Ok(true) => 0,
                Ok(false) => 1,
                Err(Mixed) => 2,
            }),
            _ => Outcome::Error,
        }
    }

    /// The blocks at an address, if they are in the region.
    fn place(&self, address: u64, count: u64) -> Option<(u64, u64)> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let end = offset.checked_add(count * BLOCK)?;
        (count > 0 && end <= self.length).then_some((offset / BLOCK, count))
    }

    fn plug(&self, first: u64, count: u64) -> Outcome {
        let mut state = self.lock();
        if state.blocks.state(first, count) != Ok(false) {
            return Outcome::Error;
        }
        if (state.blocks.plugged() + count) * BLOCK > state.requested {
            return Outcome::Refused;
        }
        state.blocks.set(first, count, true);
        Outcome::Done
    }

    fn unplug(&self, first: u64, count: u64, memory: &Memory) -> Outcome {
        let mut state = self.lock();
        if state.blocks.state(first, count) != Ok(true) {
            return Outcome::Error;
        }
        if release(memory, GuestAddress(self.start + first * BLOCK), count * BLOCK).is_err() {
            return Outcome::Busy;
        }
        state.blocks.set(first, count, false);
        Outcome::Done
    }

    fn unplug_all(&self, memory: &Memory) -> Outcome {
        let mut state = self.lock();
        if state.blocks.plugged() > 0 {
            if release(memory, GuestAddress(self.start), self.length).is_err() {
                return Outcome::Busy;
            }
            let all = self.length / BLOCK;
            state.blocks.set(0, all, false);
        }
        Outcome::Done
    }
}

impl Kind for Mem {
    const NAME: &'static str = "mem";
    const TYPE: u32 = VIRTIO_ID_MEM;
    const QUEUES: &'static [u16] = &[16];

    fn features(&self) -> u64 {
        1 << UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// `struct virtio_mem_config`: block size, node, address, region, usable region, plugged, requested. All of the region
    /// is usable at all times.
    fn config(&self) -> Vec<u8> {
        let state = self.lock();
        let plugged = state.blocks.plugged() * BLOCK;
        [BLOCK, 0, self.start, self.length, self.length, plugged, state.requested]
            .map(u64::to_le_bytes)
            .concat()
    }

    fn activated(&self, interrupt: &Interrupt) {
        self.lock().interrupt = Some(interrupt.clone());
    }

    fn serve(&self, _: u16, chain: Chain, memory: &Memory) -> Answer {
        let mut request = [0; REQUEST];
        let (mut read, mut room) = (0, Vec::new());
        for descriptor in chain.take(DESCRIPTORS) {
            if descriptor.is_write_only() {
                room.push((descriptor.addr(), descriptor.len() as usize));
                continue;
            }
            let part = (descriptor.len() as usize).min(REQUEST - read);
            if memory.read_slice(&mut request[read..read + part], descriptor.addr()).is_err() {
                return Answer::Done(0);
            }
            read += part;
        }
        // Without room for an answer nothing is done: the driver could not know.
        if room.iter().map(|(_, length)| length).sum::<usize>() < ANSWER {
            return Answer::Done(0);
        }
        let outcome = if read == REQUEST { self.answer(request, memory) } else { Outcome::Error };
        Answer::Done(put(&outcome.bytes(), &room, memory))
    }

    fn reset(&self) {
        // What is plugged stays plugged (virtio 1.2, 5.15.5.2): the driver asks for the state, or unplugs all.
        self.lock().interrupt = None;
    }

    fn keep(&self) -> Value {
        let state = self.lock();
        let (start, length, requested) = (self.start, self.length, state.requested);
        json!({ "start": start, "length": length, "requested": requested, "plugged": state.blocks.runs() })
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        #[derive(serde::Deserialize)]
        struct Kept {
            start: u64,
            length: u64,
            requested: u64,
            plugged: Vec<(u64, u64)>,
        }
        let kept: Kept = serde_json::from_value(kept).map_err(|e| e.to_string())?;
        if (kept.start, kept.length) != (self.start, self.length) {
            return Err(format!("a region of {} bytes at {:#x}", kept.length, kept.start));
        }
        if !kept.requested.is_multiple_of(BLOCK) || kept.requested > self.length {
            return Err(format!("{} bytes requested", kept.requested));
        }
        let mut blocks = Blocks::new(self.length / BLOCK);
        for (first, count) in kept.plugged {
            let end = first.checked_add(count).filter(|end| count > 0 && *end <= self.length / BLOCK);
            if end.is_none() || blocks.state(first, count) != Ok(false) {
                return Err(format!("{count} blocks plugged from {first}"));
            }
            blocks.set(first, count, true);
        }
        let mut state = self.lock();
        (state.blocks, state.requested) = (blocks, kept.requested);
        Ok(())
    }
}

impl Outcome {
    fn bytes(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Self::Done => (0_u16, 0),
            Self::State(state) => (0, state),
            Self::Refused => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; ANSWER];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// Writes an answer into the buffers; the number of bytes that arrived.
fn put(bytes: &[u8], room: &[(GuestAddress, usize)], memory: &Memory) -> u32 {
    let mut done = 0;
    for (address, length) in room {
        let part = (*length).min(bytes.len() - done);
        if memory.write_slice(&bytes[done..done + part], *address).is_err() {
            break;
        }
        done += part;
    }
    done as u32
}
