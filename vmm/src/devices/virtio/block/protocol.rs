//! Virtio 1.2, section 5.2, "Block Device": the numbers of the protocol and the configuration space.

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The unit of every sector number and capacity, whatever the block size is.
pub(super) const SECTOR: u64 = 512;

/// Bytes before the data of every request: type, reserved, sector.
pub(super) const HEADER: usize = 16;

/// Bytes of one range of a DISCARD or WRITE_ZEROES request: sector, number of sectors, flags.
pub(super) const RANGE: usize = 16;

/// Bytes of the answer to GET_ID.
pub(super) const ID_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

/// Most ranges of one DISCARD or WRITE_ZEROES request that a device offers to take.
pub(super) const MAX_RANGES: u32 = 16;

/// Most sectors of one range: 2 GiB. One range is one system call, which nothing interrupts.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Most bytes that one READ or WRITE may move. Linux asks for at most 4 MiB unless told otherwise; a pause waits for what
/// is under way, so that has to end.
pub(super) const MAX_DATA: u64 = 64 << 20;

/// What a device of this kind can do, and how it presents itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traits {
    /// Descriptors of its queue.
    pub(super) queue_size: u16,
    /// Logical block size in bytes: what the guest's kernel reads and writes in.
    pub(super) block_size: u32,
    /// Writes are refused and the guest knows beforehand.
    pub(super) read_only: bool,
    /// A completed write may be lost until a FLUSH: the driver has to ask.
    pub(super) flush: bool,
    /// DISCARD and WRITE_ZEROES are offered, in units of this many bytes.
    pub(super) discard: Option<u32>,
}

impl Traits {
    /// The feature bits to offer.
    pub(super) fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_TOPOLOGY,
        ];
        if self.read_only {
            bits.push(blk::VIRTIO_BLK_F_RO);
        }
        if self.flush {
            bits.push(blk::VIRTIO_BLK_F_FLUSH);
        }
        if self.discard.is_some() {
            bits.extend([blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    /// Most data buffers of one request: header and status take one descriptor each (virtio 1.2, 2.7.5.3.1: no chain is
    /// longer than its queue, not even an indirect one).
    pub(super) fn most_segments(&self) -> u32 {
        u32::from(self.queue_size) - 2
    }

    /// The configuration space of a device that holds `capacity` bytes.
    pub(super) fn config(&self, capacity: u64) -> [u8; CONFIG] {
        let mut config = [0; CONFIG];
        put(&mut config, 0, &(capacity / SECTOR).to_le_bytes());
        put(&mut config, 12, &self.most_segments().to_le_bytes());
        put(&mut config, 20, &self.block_size.to_le_bytes());
        // Topology: physical blocks are pages of the host's cache; smaller writes make it read first.
        let exponent = (PHYSICAL_BLOCK / self.block_size.max(1)).max(1).trailing_zeros() as u8;
        put(&mut config, 24, &[exponent, 0]);
        put(&mut config, 26, &((PHYSICAL_BLOCK / self.block_size.max(1)).max(1) as u16).to_le_bytes());
        put(&mut config, 34, &1_u16.to_le_bytes());
        if let Some(granularity) = self.discard {
            put(&mut config, 36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(&mut config, 40, &MAX_RANGES.to_le_bytes());
            put(&mut config, 44, &(granularity / SECTOR as u32).to_le_bytes());
            put(&mut config, 48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(&mut config, 52, &MAX_RANGES.to_le_bytes());
            put(&mut config, 56, &[1]);
        }
        config
    }
}

/// Bytes of `struct virtio_blk_config` up to and with `write_zeroes_may_unmap` and its padding.
pub(super) const CONFIG: usize = 60;

const PHYSICAL_BLOCK: u32 = 4096;

fn put(config: &mut [u8; CONFIG], at: usize, bytes: &[u8]) {
    config[at..at + bytes.len()].copy_from_slice(bytes);
}

/// What the driver reads back as the last byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Done.
    Ok,
    /// Not done, or only in part.
    IoError,
    /// The device does not do such a thing.
    Unsupported,
}

impl Status {
    /// The byte.
    pub(super) fn byte(self) -> u8 {
        (match self {
            Self::Ok => blk::VIRTIO_BLK_S_OK,
            Self::IoError => blk::VIRTIO_BLK_S_IOERR,
            Self::Unsupported => blk::VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits() -> Traits {
        Traits { queue_size: 128, block_size: 512, read_only: false, flush: true, discard: Some(4096) }
    }

    #[test]
    fn the_configuration_space_is_laid_out_as_the_specification_says() {
        let config = traits().config(3 * SECTOR + 100);
        assert_eq!(config[0..8], 3_u64.to_le_bytes());
        assert_eq!(config[12..16], 126_u32.to_le_bytes());
        assert_eq!(config[20..24], 512_u32.to_le_bytes());
        assert_eq!(config[24..28], [3, 0, 8, 0]);
        assert_eq!(config[34..36], [1, 0]);
        assert_eq!(config[40..44], MAX_RANGES.to_le_bytes());
        assert_eq!(config[44..48], 8_u32.to_le_bytes());
        assert_eq!(config[56], 1);
    }

    #[test]
    fn what_a_device_cannot_do_is_not_offered() {
        let none = Traits { read_only: true, flush: false, discard: None, ..traits() };
        for bit in [blk::VIRTIO_BLK_F_FLUSH, blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES] {
            assert_eq!(none.features() & 1 << bit, 0);
            assert_ne!(traits().features() & 1 << bit, 0);
        }
        assert_ne!(none.features() & 1 << blk::VIRTIO_BLK_F_RO, 0);
        assert_eq!(none.config(0)[36..60], [0; 24]);
    }
}
