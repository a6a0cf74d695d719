use std::collections::HashMap;

use super::format::BLOCK_U64;
use super::output::Output;
use crate::layer::error::LayerError;

/// Longest name after its prefix, and longest value, that the format takes.
pub(crate) const MAX_NAME: usize = 255;
pub(crate) const MAX_VALUE: usize = u16::MAX as usize;

/// Overlayfs' mark of a directory that hides everything below it.
pub(crate) const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

const HEADER: usize = 12;
// Of attributes that may be shared; what comes later is stored inline.
const MAX_TABLE: usize = 1 << 20;
const MAX_SHARED_ENTRY: usize = 1024;
// Prefixes and their numbers, longest first where one begins another. The ACLs are whole names.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The attributes that several inodes have in common. An attribute is stored inline when it is first seen, and shared
/// from then on.
#[derive(Default)]
pub(crate) struct SharedXattrs {
    seen: HashMap<Vec<u8>, Option<u32>>,
    seen_bytes: usize,
    table: Vec<u8>,
}

impl SharedXattrs {
    /// The attribute body that follows an inode; empty without attributes. The names must have a known prefix and the
    /// sizes must be within bounds, at most 255 attributes. `share_all` keeps the body at its shortest.
    pub(crate) fn body(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)], share_all: bool) -> Vec<u8> {
        if xattrs.is_empty() {
            return Vec::new();
        }
        let (mut shared, mut inline) = (Vec::new(), Vec::new());
        for (name, value) in xattrs {
            let Some(entry) = encode(name, value) else { continue };
            match self.share(&entry, share_all) {
                Some(id) => shared.push(id),
                None => inline.extend_from_slice(&entry),
            }
        }
        assemble(&shared, &inline)
    }

    /// The body `body` with the opaque mark added.
    pub(crate) fn with_opaque(&mut self, body: &[u8]) -> Vec<u8> {
        let Some(entry) = encode(OPAQUE.0, OPAQUE.1) else { return body.to_vec() };
        let Some(id) = self.share(&entry, true) else { return body.to_vec() };
        let (shared, inline) = disassemble(body);
        assemble(&[shared.as_slice(), &[id]].concat(), inline)
    }

    /// Writes the table to the file, at the start of a block, and returns that block; 0 without shared attributes.
    pub(crate) fn write(&self, output: &mut Output<'_>) -> Result<u32, LayerError> {
        if self.table.is_empty() {
            return Ok(0);
        }
        let block = output.position() / BLOCK_U64;
        output.append(&self.table)?;
        output.pad_to_block()?;
        Ok(block as u32)
    }

    fn share(&mut self, entry: &[u8], now: bool) -> Option<u32> {
        if let Some(Some(id)) = self.seen.get(entry) {
            return Some(*id);
        }
        let known = self.seen.contains_key(entry);
        let fits = entry.len() <= MAX_SHARED_ENTRY && self.table.len() + entry.len() <= MAX_TABLE;
        if !now && !fits {
            return None;
        }
        if now || known {
            let id = (self.table.len() / 4) as u32;
            self.table.extend_from_slice(entry);
            self.seen.insert(entry.to_vec(), Some(id));
            return Some(id);
        }
        if self.seen_bytes + entry.len() <= MAX_TABLE {
            self.seen_bytes += entry.len() + 64;
            self.seen.insert(entry.to_vec(), None);
        }
        None
    }
}

/// Whether the format has a number for the attribute's prefix, and the length of the name behind it.
pub(crate) fn suffix_length(name: &[u8]) -> Option<usize> {
    split(name).map(|(_, suffix)| suffix.len())
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, number)| {
        let suffix = name.strip_prefix(*prefix)?;
        let is_whole_name = matches!(number, 2 | 3);
        (is_whole_name == suffix.is_empty()).then_some((*number, suffix))
    })
}

// Length of the name, number of the prefix, length of the value, name, value; padded to 4 bytes.
fn encode(name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
    let (prefix, suffix) = split(name)?;
    let mut entry = vec![u8::try_from(suffix.len()).ok()?, prefix];
    entry.extend_from_slice(&u16::try_from(value.len()).ok()?.to_le_bytes());
    entry.extend_from_slice(suffix);
    entry.extend_from_slice(value);
    entry.resize(entry.len().next_multiple_of(4), 0);
    Some(entry)
}

fn assemble(shared: &[u32], inline: &[u8]) -> Vec<u8> {
    if shared.is_empty() && inline.is_empty() {
        return Vec::new();
    }
    let mut body = vec![0; HEADER];
    body[4] = shared.len() as u8;
    for id in shared {
        body.extend_from_slice(&id.to_le_bytes());
    }
    body.extend_from_slice(inline);
    body
}

fn disassemble(body: &[u8]) -> (Vec<u32>, &[u8]) {
    if body.is_empty() {
        return (Vec::new(), body);
    }
    let (ids, inline) = body[HEADER..].split_at(usize::from(body[4]) * 4);
    (ids.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect(), inline)
}

/// One attribute in the body behind an inode.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Its name and value.
    Inline(Vec<u8>, Vec<u8>),
    /// Its place in the table of shared ones, in steps of 4 bytes.
    Shared(u32),
}

/// The attributes of the body behind an inode; `None` if it is damaged.
pub(crate) fn decode(body: &[u8]) -> Option<Vec<Value>> {
    if body.is_empty() {
        return Some(Vec::new());
    }
    if body.len() < HEADER || body.len() < HEADER + usize::from(body[4]) * 4 {
        return None;
    }
    let (shared, mut inline) = disassemble(body);
    let mut values: Vec<Value> = shared.into_iter().map(Value::Shared).collect();
    while !inline.is_empty() {
        let (name, value, length) = decode_entry(inline)?;
        values.push(Value::Inline(name, value));
        inline = inline.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(values)
}

/// Name and value of the entry that `bytes` begin with, and its length without padding; `None` if it is damaged.
pub(crate) fn decode_entry(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>, usize)> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    let (suffix, value) = (usize::from(head[0]), usize::from(u16::from_le_bytes([head[2], head[3]])));
    let (prefix, _) = PREFIXES.iter().find(|(_, number)| *number == head[1])?;
    let name = [prefix, rest.get(..suffix)?].concat();
    let value = rest.get(suffix..suffix + value)?.to_vec();
    let length = 4 + suffix + value.len();
    Some((name, value, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &str, value: &str) -> (Vec<u8>, Vec<u8>) {
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    }

    #[test]
    fn an_attribute_is_shared_from_its_second_sight() {
        let mut shared = SharedXattrs::default();
        let xattrs = [xattr("user.colour", "blue")];
        let first = shared.body(&xattrs, false);
        assert_eq!((first[4], first.len()), (0, 12 + 16));
        let second = shared.body(&xattrs, false);
        assert_eq!((second[4], second.len()), (1, 12 + 4));
        assert_eq!(shared.body(&xattrs, false), second);
    }

    #[test]
    fn the_opaque_mark_is_added_to_what_is_there() {
        let mut shared = SharedXattrs::default();
        assert_eq!(shared.with_opaque(&[]).len(), 16);
        let body = shared.body(&[xattr("user.a", "1")], false);
        let marked = shared.with_opaque(&body);
        assert_eq!(marked.len(), body.len() + 4);
        assert_eq!(&marked[16..], &body[12..]);
    }

    #[test]
    fn a_body_is_read_back() {
        let mut shared = SharedXattrs::default();
        let xattrs = [xattr("user.colour", "blue"), xattr("system.posix_acl_default", "acl")];
        let inline = |(name, value): &(Vec<u8>, Vec<u8>)| Value::Inline(name.clone(), value.clone());
        let body = shared.body(&xattrs, false);
        assert_eq!(decode(&body).unwrap(), xattrs.iter().map(inline).collect::<Vec<_>>());
        let body = shared.body(&[xattrs[0].clone(), xattr("trusted.other", "")], false);
        assert_eq!(decode(&body).unwrap(), [Value::Shared(0), inline(&xattr("trusted.other", ""))]);
        let (name, value, _) = decode_entry(&shared.table).unwrap();
        assert_eq!((name, value), xattrs[0]);
        for length in 1..body.len() - 4 {
            // Whole entries are missing, or it is damaged; never a panic.
            let _ = decode(&body[..length]);
        }
        assert_eq!(decode(&body[..HEADER]), None);
    }

    #[test]
    fn only_names_with_a_number_are_known() {
        assert_eq!(suffix_length(b"user.x"), Some(1));
        assert_eq!(suffix_length(b"system.posix_acl_access"), Some(0));
        assert_eq!(suffix_length(b"system.posix_acl_access2"), None);
        assert_eq!(suffix_length(b"user."), None);
        assert_eq!(suffix_length(b"btrfs.x"), None);
    }
}
