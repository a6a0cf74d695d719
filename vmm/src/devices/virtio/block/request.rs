use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use super::guest_buffers::{GuestBuffers, OutsideMemory};
use super::protocol::{HEADER, ID_BYTES, MAX_DATA, MAX_RANGE_SECTORS, MAX_RANGES, RANGE, SECTOR, Status};
use crate::devices::virtio::{Chain, Memory};

/// What a checked request asks for; its data buffers and ranges are in the [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Fill the buffers from byte `at` of the disk.
    Read { at: u64 },
    /// Put the buffers at byte `at` of the disk.
    Write { at: u64 },
    /// Make completed writes last.
    Flush,
    /// Answer with the serial number.
    GetId,
    /// The content of the ranges is not needed any more.
    Discard,
    /// The ranges read as zeros from now on.
    WriteZeroes,
}

/// Bytes of the disk that a DISCARD or WRITE_ZEROES request names; within the disk, not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// Of the first byte.
    pub(super) at: u64,
    /// In bytes.
    pub(super) length: u64,
    /// Their space may be given back (WRITE_ZEROES only).
    pub(super) unmap: bool,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    /// What driver and device agreed upon.
    pub(super) features: u64,
    /// Most descriptors of a chain.
    pub(super) descriptors: u16,
}

/// One request of the driver: taken out of its chain and checked once, so that what the guest changes in its memory
/// afterwards changes nothing here. Reused, so that a request allocates nothing.
pub(super) struct Request {
    head: u16,
    status: Option<GuestAddress>,
    readable: Pieces,
    writable: Pieces,
    /// The data of a READ or WRITE.
    pub(super) data: GuestBuffers,
    ranges: Vec<Range>,
}

impl Request {
    /// An empty one for chains in `memory`.
    pub(super) fn new(memory: Memory) -> Self {
        Self {
            head: 0,
            status: None,
            readable: Pieces::default(),
            writable: Pieces::default(),
            data: GuestBuffers::new(memory),
            ranges: Vec::new(),
        }
    }

    /// The chain to give back.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// The ranges of a DISCARD or WRITE_ZEROES.
    pub(super) fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Takes a chain apart. An error is the status to [answer](Request::answer) with.
    ///
    /// Virtio 1.2, 5.2.6 and 2.7.4: how a request is cut into descriptors says nothing; what can be read comes before what
    /// can be written; the status is the last byte that can be written.
    pub(super) fn take(&mut self, chain: Chain, limits: &Limits) -> Result<Operation, Status> {
        self.head = chain.head_index();
        self.status = None;
        self.readable.clear();
        self.writable.clear();
        self.data.clear();
        self.ranges.clear();
        let in_order = self.collect(chain, limits.descriptors)?;
        self.status = self.writable.take_last_byte();
        if !in_order || self.status.is_none() {
            return Err(Status::IoError);
        }
        let mut header = [0; HEADER];
        self.readable.take(self.data.memory(), &mut header).map_err(|_| Status::IoError)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64_at(&header, 8);
        match kind {
            blk::VIRTIO_BLK_T_IN => {
                self.only(self.readable.length == 0)?;
                let at = self.place(sector, self.writable.length, limits)?;
                self.use_as_data(false)?;
                Ok(Operation::Read { at })
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.only(self.writable.length == 0)?;
                let at = self.place(sector, self.readable.length, limits)?;
                self.use_as_data(true)?;
                Ok(Operation::Write { at })
            }
            blk::VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            blk::VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            blk::VIRTIO_BLK_T_DISCARD if limits.features & 1 << blk::VIRTIO_BLK_F_DISCARD != 0 => {
                self.take_ranges(false, limits.capacity)?;
                Ok(Operation::Discard)
            }
            blk::VIRTIO_BLK_T_WRITE_ZEROES if limits.features & 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES != 0 => {
                self.take_ranges(true, limits.capacity)?;
                Ok(Operation::WriteZeroes)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Answers GET_ID: as much of the serial number, padded with zeros, as the driver has room for. Returns the bytes
    /// written.
    pub(super) fn answer_id(&mut self, serial: &str) -> Result<u64, Status> {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        self.writable.put(self.data.memory(), &id).map_err(|_| Status::IoError)
    }

    /// Writes the status and says how many bytes of the chain were written, `data` of them before the status. A chain
    /// without a place for a status goes back with nothing written.
    pub(super) fn answer(&self, status: Status, data: u64) -> u32 {
        let Some(at) = self.status else { return 0 };
        match self.data.memory().write_obj(status.byte(), at) {
            Ok(()) => u32::try_from(data).unwrap_or(u32::MAX - 1) + 1,
            Err(_) => 0,
        }
    }

    /// Collects the chain's buffers; false if one to be read comes after one to be written. If the chain breaks off (a
    /// loop, an address outside memory, an indirect table in another) its end is not known, so neither is the status.
    fn collect(&mut self, chain: Chain, most: u16) -> Result<bool, Status> {
        let (mut in_order, mut ended) = (true, false);
        for (number, descriptor) in chain.enumerate() {
            if number >= usize::from(most) {
                return Err(Status::IoError);
            }
            ended = !descriptor.has_next();
            if descriptor.is_write_only() {
                self.writable.push(descriptor.addr(), descriptor.len());
            } else {
                in_order &= self.writable.is_empty();
                self.readable.push(descriptor.addr(), descriptor.len());
            }
        }
        if ended { Ok(in_order) } else { Err(Status::IoError) }
    }

    /// A request with buffers in the wrong direction is none.
    fn only(&self, right: bool) -> Result<(), Status> {
        if right { Ok(()) } else { Err(Status::IoError) }
    }

    /// Where on the disk `length` bytes from `sector` are, if they are.
    fn place(&self, sector: u64, length: u64, limits: &Limits) -> Result<u64, Status> {
        if !length.is_multiple_of(SECTOR) || length > MAX_DATA {
            return Err(Status::IoError);
        }
        within(sector, length, limits.capacity).ok_or(Status::IoError)
    }

    fn use_as_data(&mut self, readable: bool) -> Result<(), Status> {
        let pieces = if readable { &self.readable } else { &self.writable };
        for (address, length) in pieces.rest() {
            self.data.push(*address, *length).map_err(|OutsideMemory| Status::IoError)?;
        }
        Ok(())
    }

    /// Virtio 1.2, 5.2.6.1: reserved flags, and `unmap` on a DISCARD, are answered with UNSUPP.
    fn take_ranges(&mut self, zeroes: bool, capacity: u64) -> Result<(), Status> {
        let length = usize::try_from(self.readable.length).map_err(|_| Status::IoError)?;
        if length == 0 || !length.is_multiple_of(RANGE) || length > RANGE * MAX_RANGES as usize {
            return Err(Status::IoError);
        }
        for _ in 0..length / RANGE {
            let mut raw = [0; RANGE];
            self.readable.take(self.data.memory(), &mut raw).map_err(|_| Status::IoError)?;
            let sectors = u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]);
            let flags = u32::from_le_bytes([raw[12], raw[13], raw[14], raw[15]]);
            let unmap = flags == blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || unmap && !zeroes {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            let length = u64::from(sectors) * SECTOR;
            let at = within(u64_at(&raw, 0), length, capacity).ok_or(Status::IoError)?;
            if length > 0 {
                self.ranges.push(Range { at, length, unmap });
            }
        }
        Ok(())
    }
}

/// The byte at which `sector` begins, if `length` bytes from there are within `capacity`.
fn within(sector: u64, length: u64, capacity: u64) -> Option<u64> {
    let at = sector.checked_mul(SECTOR)?;
    let end = at.checked_add(length)?;
    (end <= capacity).then_some(at)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// The buffers of one direction, consumed from both ends. Nothing says yet that they are in memory.
#[derive(Default)]
struct Pieces {
    pieces: Vec<(GuestAddress, u32)>,
    first: usize,
    length: u64,
}

impl Pieces {
    fn clear(&mut self) {
        self.pieces.clear();
        (self.first, self.length) = (0, 0);
    }

    fn push(&mut self, address: GuestAddress, length: u32) {
        if length > 0 {
            self.pieces.push((address, length));
            self.length += u64::from(length);
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// What is left.
    fn rest(&self) -> &[(GuestAddress, u32)] {
        &self.pieces[self.first..]
    }

    /// Cuts the last byte off and says where it is.
    fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, length) = self.pieces.last_mut()?;
        *length -= 1;
        self.length -= 1;
        let at = address.0.checked_add(u64::from(*length)).map(GuestAddress);
        if *length == 0 {
            self.pieces.pop();
        }
        at
    }

    /// Reads the next bytes; it is an error if there are fewer.
    fn take(&mut self, memory: &Memory, into: &mut [u8]) -> Result<(), OutsideMemory> {
        self.each(into.len(), |address, range| {
            memory.read_slice(&mut into[range], address).map_err(|_| OutsideMemory)
        })
        .and_then(|missing| if missing == 0 { Ok(()) } else { Err(OutsideMemory) })
    }

    /// Writes the next bytes, as many as there is room for, and returns how many.
    fn put(&mut self, memory: &Memory, bytes: &[u8]) -> Result<u64, OutsideMemory> {
        let missing = self.each(bytes.len(), |address, range| {
            memory.write_slice(&bytes[range], address).map_err(|_| OutsideMemory)
        })?;
        Ok((bytes.len() - missing) as u64)
    }

    /// Consumes `count` bytes piece by piece; returns how many were not there.
    fn each(
        &mut self,
        count: usize,
        mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), OutsideMemory>,
    ) -> Result<usize, OutsideMemory> {
        let mut done = 0;
        while done < count {
            let Some((address, length)) = self.pieces.get_mut(self.first) else { break };
            let part = (*length as usize).min(count - done);
            each(*address, done..done + part)?;
            done += part;
            self.length -= part as u64;
            *length -= part as u32;
            if *length == 0 {
                self.first += 1;
            } else {
                *address = GuestAddress(address.0.checked_add(part as u64).ok_or(OutsideMemory)?);
            }
        }
        Ok(count - done)
    }
}
