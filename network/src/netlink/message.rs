use std::borrow::Cow;

use rustix::io::Errno;

/// Length of struct nlmsghdr.
pub(crate) const HEADER: usize = 16;
pub(crate) const F_REQUEST: u16 = 1;
pub(crate) const F_ACK: u16 = 4;
pub(crate) const F_DUMP: u16 = 0x300;
pub(crate) const F_EXCL: u16 = 0x200;
pub(crate) const F_CREATE: u16 = 0x400;
pub(crate) const F_REPLACE: u16 = 0x100;
const NESTED: u16 = 0x8000;

/// Messages that go to the kernel in one datagram. Each is handled on its own: an error of one does not keep the
/// following from being tried (but an nf_tables transaction fails as a whole).
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) entries: Vec<Entry>,
}

/// What is known of one message of a batch.
#[derive(Debug)]
pub(super) struct Entry {
    /// What it does, for errors: "adding address 10.0.0.2/24".
    pub(super) what: Cow<'static, str>,
    pub(super) acknowledged: bool,
    pub(super) tolerated: &'static [Errno],
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a message that the kernel must answer. `body` writes what follows the header.
    pub(crate) fn push(
        &mut self,
        kind: u16,
        flags: u16,
        what: impl Into<Cow<'static, str>>,
        body: impl FnOnce(&mut Message<'_>),
    ) {
        self.push_tolerating(&[], kind, flags, what, body);
    }

    /// Like `push`; the given errors count as success.
    pub(crate) fn push_tolerating(
        &mut self,
        tolerated: &'static [Errno],
        kind: u16,
        flags: u16,
        what: impl Into<Cow<'static, str>>,
        body: impl FnOnce(&mut Message<'_>),
    ) {
        self.append(
            Entry { what: what.into(), acknowledged: flags & F_DUMP != F_DUMP, tolerated },
            kind,
            flags,
            body,
        );
    }

    /// Adds a message to which the kernel answers only if it fails.
    pub(super) fn push_unacknowledged(
        &mut self,
        kind: u16,
        what: &'static str,
        body: impl FnOnce(&mut Message<'_>),
    ) {
        self.append(Entry { what: what.into(), acknowledged: false, tolerated: &[] }, kind, 0, body);
    }

    fn append(&mut self, entry: Entry, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) {
        let start = self.bytes.len();
        let flags = flags | F_REQUEST | if entry.acknowledged { F_ACK } else { 0 };
        // The sequence number is the position in the batch, counted from 1.
        let sequence = self.entries.len() as u32 + 1;
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        body(&mut Message { bytes: &mut self.bytes });
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        pad(&mut self.bytes);
        self.entries.push(entry);
    }
}

/// The body of one message while it is written.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    bytes: &'a mut Vec<u8>,
}

impl Message<'_> {
    /// A fixed part, e.g. struct ifinfomsg.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        pad(self.bytes);
        self
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Lengths are 16 bits wide; no value of ours is near that.
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.raw(value)
    }

    /// In the machine's byte order, as rtnetlink has it.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// In network byte order, as nf_tables has it.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// With the terminating zero byte.
    pub(crate) fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub(crate) fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Message<'_>)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&0u16.to_ne_bytes());
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        body(&mut Message { bytes: self.bytes });
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in a received message, one after the other; stops at the first that is malformed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The first attribute of this kind.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        { self }.find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The first attribute of this kind as a string without its terminating zero.
    pub(crate) fn string(self, kind: u16) -> Option<String> {
        let value = self.get(kind)?;
        let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
        Some(String::from_utf8_lossy(&value[..end]).into_owned())
    }

    /// The first attribute of this kind as a number in the machine's byte order.
    pub(crate) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.get(kind)?.try_into().ok()?))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.0.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_they_were_written() {
        let mut bytes = Vec::new();
        Message { bytes: &mut bytes }.u32(7, 99).string(3, "eth0").nested(5, |m| {
            m.attribute(1, &[1, 2, 3]);
        });
        let attributes = Attributes(&bytes);
        assert_eq!(attributes.u32(7), Some(99));
        assert_eq!(attributes.string(3).as_deref(), Some("eth0"));
        assert_eq!(Attributes(attributes.get(5).unwrap()).get(1), Some(&[1u8, 2, 3][..]));
        assert_eq!(attributes.get(8), None);
    }

    #[test]
    fn malformed_attributes_end_the_list_and_nothing_more() {
        for bytes in [&[][..], &[1], &[0; 4], &[3, 0, 1, 0], &[200, 0, 1, 0, 5], &[255, 255, 255, 255]] {
            assert_eq!(Attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
