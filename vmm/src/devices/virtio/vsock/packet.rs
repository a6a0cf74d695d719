//! The header of a packet (virtio 1.2, 5.10.6), read once from guest memory and never looked at there again.

use vm_memory::VolatileSlice;

use crate::devices::virtio::vectored;

/// Length of a header in bytes.
pub(super) const HEADER: usize = 44;
/// Longest payload of a packet, either way: what Linux takes (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub(super) const MAX_PAYLOAD: usize = 64 << 10;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// Flags of a SHUTDOWN: the sender will not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// The sender will not send any more.
pub(super) const NO_SEND: u32 = 2;
/// Both.
pub(super) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for (virtio 1.2, 5.10.6, `virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    const ALL: [(u16, Self); 7] = [
        (1, Self::Request),
        (2, Self::Response),
        (3, Self::Reset),
        (4, Self::Shutdown),
        (5, Self::Data),
        (6, Self::CreditUpdate),
        (7, Self::CreditRequest),
    ];

    /// `None` if no such operation exists.
    pub(super) fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == number).map(|(_, op)| op)
    }

    pub(super) fn number(self) -> u16 {
        Self::ALL.into_iter().find(|(_, op)| *op == self).map_or(0, |(number, _)| number)
    }
}

/// The two ports of a stream. There is one guest, so they name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header, in the machine's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// All the room that the sender has for this stream's data.
    pub(super) buffer: u32,
    /// How much of the stream's data the sender's application has taken, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Header {
    /// The header at the beginning of a chain; `None` if the chain is too short.
    pub(super) fn read(pieces: &[VolatileSlice<'_>]) -> Option<Self> {
        let mut bytes = [0; HEADER];
        (vectored::copy_out(pieces, &mut bytes) == HEADER).then(|| Self::parse(&bytes))
    }

    /// Writes it to the beginning of a chain, which has at least [`HEADER`] bytes.
    pub(super) fn write(&self, pieces: &[VolatileSlice<'_>]) {
        vectored::copy_in(pieces, &self.bytes());
    }

    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            source_cid: u64::from_le_bytes(fields.take()),
            destination_cid: u64::from_le_bytes(fields.take()),
            source_port: u32::from_le_bytes(fields.take()),
            destination_port: u32::from_le_bytes(fields.take()),
            length: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buffer: u32::from_le_bytes(fields.take()),
            forwarded: u32::from_le_bytes(fields.take()),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.source_cid.to_le_bytes());
        bytes.extend(self.destination_cid.to_le_bytes());
        bytes.extend(self.source_port.to_le_bytes());
        bytes.extend(self.destination_port.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buffer.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_it_was_written() {
        let header = Header {
            source_cid: 3,
            destination_cid: 2,
            source_port: 1024,
            destination_port: 0x4000_0001,
            length: 77,
            kind: TYPE_STREAM,
            op: Op::Data.number(),
            flags: 3,
            buffer: 0x0004_0000,
            forwarded: u32::MAX,
        };
        let bytes: [u8; HEADER] = header.bytes().try_into().unwrap();
        assert_eq!(Header::parse(&bytes), header);
        // virtio 1.2, 5.10.6: le64 src_cid, le64 dst_cid, le32 src_port, dst_port, len, le16 type, op, le32 flags, …
        assert_eq!(bytes[16..20], 1024_u32.to_le_bytes());
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
    }

    #[test]
    fn operations_keep_their_numbers_and_others_are_none() {
        for number in 1..=7 {
            assert_eq!(Op::from_number(number).unwrap().number(), number);
        }
        assert_eq!((Op::from_number(0), Op::from_number(8)), (None, None));
    }
}
