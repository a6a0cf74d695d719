use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::devices::virtio::{Chain, Memory};

/// What the guest's kernel says of its memory (virtio 1.2, 5.5.6.3). Hostile: anything may be in it. Sizes are bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatistics {
    /// Swapped in and out.
    pub swapped_in: Option<u64>,
    /// Bytes written to swap.
    pub swapped_out: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free: Option<u64>,
    /// All there is, without what the balloon holds.
    pub total: Option<u64>,
    /// An estimate of what could be had without swapping.
    pub available: Option<u64>,
    /// Caches that can be given up.
    pub caches: Option<u64>,
    /// Times that it killed for want of memory (Linux).
    pub oom_kills: Option<u64>,
}

/// A record: a tag of two bytes and a value of eight, packed.
const RECORD: usize = 10;
/// Most records that are looked at. Linux knows 16.
const MOST: usize = 32;

impl GuestStatistics {
    /// Reads a chain of the statistics queue; what is not understood or not in memory is left out.
    pub(super) fn read(chain: Chain, memory: &Memory) -> Self {
        let mut bytes = [0; RECORD * MOST];
        let mut length = 0;
        for descriptor in chain.take(MOST).filter(|descriptor| !descriptor.is_write_only()) {
            let part = (descriptor.len() as usize).min(bytes.len() - length);
            if memory.read_slice(&mut bytes[length..length + part], descriptor.addr()).is_err() {
                break;
            }
            length += part;
        }
        let mut told = Self::default();
        for record in bytes[..length].chunks_exact(RECORD) {
            let mut value = [0; 8];
            value.copy_from_slice(&record[2..]);
            told.set(u16::from_le_bytes([record[0], record[1]]), u64::from_le_bytes(value));
        }
        told
    }

    fn set(&mut self, tag: u16, value: u64) {
        let to = match tag {
            0 => &mut self.swapped_in,
            1 => &mut self.swapped_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            // Linux, include/uapi/linux/virtio_balloon.h; 8 and 9 are huge pages.
            10 => &mut self.oom_kills,
            _ => return,
        };
        *to = Some(value);
    }
}
