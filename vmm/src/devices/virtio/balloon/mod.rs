//! The balloon (virtio 1.2, 5.5): memory that the guest gives back to the host, asked for or because it is free.

/// What the guest tells of its memory.
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub use statistics::GuestStatistics;

use super::instant::{Answer, InstantDevice, Kind};
use super::release::{PAGE, release};
use super::{Chain, Interrupt, Memory, VirtioDevice, Worker};

// Virtio 1.2, 5.5.3 feature bits; virtio-bindings has none of the balloon's.
const STATS_QUEUE: u32 = 1;
const DEFLATE_ON_OOM: u32 = 2;
const PAGE_REPORTING: u32 = 5;

// Virtio 1.2, 5.5.2. Reporting is queue 4 to the specification; drivers that number only the queues that there are,
// Linux among them, make it 3. Queue 3 is free page hinting, which is not offered: so both are reporting.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;

/// Most bytes of page numbers of one request: 16,384 pages. Linux sends 256 pages at a time.
const MOST_NUMBERS: usize = 64 << 10;
/// Most ranges of one report. Linux sends 32.
const MOST_RANGES: usize = 256;

/// The balloon, served on `worker`: the device and the handle that inflates it.
///
/// # Errors
/// No descriptor is left for its eventfd.
pub fn balloon(worker: &Worker) -> io::Result<(impl VirtioDevice + use<>, BalloonHandle)> {
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let kind = Arc::new(Balloon { wake, state: Mutex::default() });
    Ok((InstantDevice::new(kind.clone(), worker), BalloonHandle { kind }))
}

/// Asks the guest for memory and for numbers. Cheap to clone; any thread.
#[derive(Clone)]
pub struct BalloonHandle {
    kind: Arc<Balloon>,
}

impl BalloonHandle {
    /// Asks the guest to give back so many bytes (whole pages) of its memory, or to take back what is above that. It does
    /// so when it can, and takes memory back by itself before it kills for want of memory.
    pub fn set_target(&self, bytes: u64) {
        let mut state = self.kind.lock();
        state.target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if let Some(interrupt) = &state.interrupt {
            interrupt.config();
        }
    }

    /// Bytes that were asked for, and bytes that the guest says it gave.
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let state = self.kind.lock();
        (u64::from(state.target) * PAGE, u64::from(state.actual) * PAGE)
    }

    /// Asks the guest for new statistics; they are there, in [`BalloonHandle::statistics`], when it has answered.
    pub fn ask_statistics(&self) {
        // Fails only if it was asked 2^64 - 2 times without being woken.
        let _ = self.kind.wake.write(1);
    }

    /// The last that the guest told; None if it never did.
    #[must_use]
    pub fn statistics(&self) -> Option<GuestStatistics> {
        self.kind.lock().statistics
    }

    /// Bytes given back since the machine's birth: by inflating, and because the guest reported them free.
    #[must_use]
    pub fn released(&self) -> (u64, u64) {
        let state = self.kind.lock();
        (state.inflated, state.reported)
    }
}

/// The kind of device that is a balloon.
struct Balloon {
    wake: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    interrupt: Option<Interrupt>,
    /// Pages that the host wants.
    target: u32,
    /// Pages that the guest says it gave.
    actual: u32,
    /// The chain of the statistics queue: the device keeps it and gives it back to ask for new numbers.
    kept: Option<u16>,
    statistics: Option<GuestStatistics>,
    inflated: u64,
    reported: u64,
}

impl Balloon {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases the pages whose numbers are in the chain.
    fn inflate(&self, chain: Chain, memory: &Memory) {
        let mut pages = Pages { memory, run: None, released: 0 };
        let mut left = MOST_NUMBERS;
        for descriptor in chain.filter(|descriptor| !descriptor.is_write_only()) {
            let mut at = descriptor.addr().0;
            let mut length = (descriptor.len() as usize).min(left) / 4 * 4;
            left -= length;
            while length > 0 {
                let mut numbers = [0; 1024];
                let part = length.min(numbers.len());
                if memory.read_slice(&mut numbers[..part], GuestAddress(at)).is_err() {
                    break;
                }
                numbers[..part]
                    .chunks_exact(4)
                    .for_each(|n| pages.add(u32::from_le_bytes([n[0], n[1], n[2], n[3]])));
                // Within guest memory, so it cannot overflow.
                at += part as u64;
                length -= part;
            }
            if left == 0 {
                break;
            }
        }
        pages.release();
        self.lock().inflated += pages.released;
    }

    /// Releases the buffers of the chain: free pages, which the driver takes back with the chain.
    fn report(&self, chain: Chain, memory: &Memory) {
        let mut released = 0;
        for descriptor in chain.take(MOST_RANGES).filter(|descriptor| descriptor.is_write_only()) {
            // What could not be released just stays with the guest.
            released += release(memory, descriptor.addr(), u64::from(descriptor.len())).unwrap_or(0);
        }
        self.lock().reported += released;
    }
}

/// Pages that follow each other are released by one system call.
struct Pages<'a> {
    memory: &'a Memory,
    /// First page and the one after the last.
    run: Option<(u64, u64)>,
    released: u64,
}

impl Pages<'_> {
    fn add(&mut self, number: u32) {
        let number = u64::from(number);
        self.run = match self.run {
            Some((first, end)) if number == end => Some((first, end + 1)),
            // Linux hands its pages out from the top.
            Some((first, end)) if number + 1 == first => Some((number, end)),
            _ => {
                self.release();
                Some((number, number + 1))
            }
        };
    }

    fn release(&mut self) {
        if let Some((first, end)) = self.run.take() {
            let result = release(self.memory, GuestAddress(first * PAGE), (end - first) * PAGE);
            self.released += result.unwrap_or(0);
        }
    }
}

impl Kind for Balloon {
    const NAME: &'static str = "balloon";
    const TYPE: u32 = VIRTIO_ID_BALLOON;
    const QUEUES: &'static [u16] = &[64, 64, 16, 64, 64];

    fn features(&self) -> u64 {
        let bits = [
            STATS_QUEUE,
            DEFLATE_ON_OOM,
            PAGE_REPORTING,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        let state = self.lock();
        [state.target.to_le_bytes(), state.actual.to_le_bytes()].concat()
    }

    /// Only `actual` is the driver's to write.
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.lock().actual = u32::from_le_bytes(actual);
        }
    }

    fn activated(&self, interrupt: &Interrupt) {
        self.lock().interrupt = Some(interrupt.clone());
    }

    fn serve(&self, queue: u16, chain: Chain, memory: &Memory) -> Answer {
        match queue {
            INFLATE => self.inflate(chain, memory),
            // The pages are used again when the guest touches them.
            DEFLATE => {}
            STATISTICS => {
                let head = chain.head_index();
                let told = GuestStatistics::read(chain, memory);
                let mut state = self.lock();
                state.statistics = Some(told);
                // A driver has one such chain: a second goes back at once, and so does what is no descriptor of the queue
                // (which breaks it), for it could not be told from a state that makes no sense.
                if state.kept.is_some() || head >= Self::QUEUES[usize::from(STATISTICS)] {
                    return Answer::Done(0);
                }
                state.kept = Some(head);
                return Answer::Kept;
            }
            _ => self.report(chain, memory),
        }
        Answer::Done(0)
    }

    fn woken(&self) -> Option<(u16, u16)> {
        self.lock().kept.take().map(|head| (STATISTICS, head))
    }

    fn wake(&self) -> Option<&EventFd> {
        Some(&self.wake)
    }

    fn reset(&self) {
        let mut state = self.lock();
        // The guest's pages come back to it with the reset (virtio 1.2, 5.5.6: a reset deflates).
        (state.interrupt, state.kept, state.actual) = (None, None, 0);
    }

    fn keep(&self) -> Value {
        let state = self.lock();
        json!({ "target": state.target, "actual": state.actual, "kept": state.kept })
    }

    fn take_over(&self, kept: Value) -> Result<(), String> {
        #[derive(serde::Deserialize)]
        struct Kept {
            target: u32,
            actual: u32,
            kept: Option<u16>,
        }
        let Kept { target, actual, kept } = serde_json::from_value(kept).map_err(|e| e.to_string())?;
        if kept.is_some_and(|head| head >= Self::QUEUES[usize::from(STATISTICS)]) {
            return Err(format!("the chain {kept:?}"));
        }
        let mut state = self.lock();
        (state.target, state.actual, state.kept) = (target, actual, kept);
        Ok(())
    }
}
