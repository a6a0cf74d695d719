//! One entry of an archive: a ustar header (POSIX.1-2017 pax, "ustar Interchange Format"), with an extended one before it
//! where that is too small.

use std::io::{self, Read, Write};

use crate::error::{ArchiveError, printable};
use crate::pax::Records;

/// Bytes of a header and of what contents are padded to.
pub(crate) const BLOCK: usize = 512;
/// Largest number in a field of eight bytes, such as the owner's: seven octal digits.
const MAX_SHORT: u64 = 0o7_777_777;
/// Largest number in a field of twelve bytes, such as the size.
const MAX_LONG: u64 = 0o77_777_777_777;

/// A time since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds after that, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file of so many bytes, which follow.
    File(u64),
    /// A file with holes: so many bytes follow, and it has this size.
    Sparse {
        /// Bytes in the archive, map included.
        stored: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// Another name of the file with this path in the archive.
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Link(Vec<u8>),
    /// A directory.
    Directory,
    /// A character device, major and minor.
    Character(u32, u32),
    /// A block device, major and minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Extended attributes, each a full name (`user.x`) and a value.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One entry without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative, without a leading or trailing slash; the root is `.`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of its content.
    pub mtime: Timestamp,
    /// Its extended attributes, in the order in which they are written.
    pub xattrs: Xattrs,
}

/// Writes an archive, entry by entry.
pub struct Writer<W> {
    out: W,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// An archive that goes to `out`, in writes of any size: give it a buffered one.
    pub fn new(out: W) -> Self {
        Self { out, written: 0 }
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// An entry without content.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), ArchiveError> {
        self.header(entry)
    }

    /// An entry and its content, of which exactly the stated length is written: what the reader has beyond it is left
    /// out, and what it lacks becomes zeros (a file that shrinks while it is read).
    pub fn file(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<(), ArchiveError> {
        self.header(entry)?;
        let length = stored(&entry.kind);
        let mut left = length;
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let wanted = left.min(buffer.len() as u64) as usize;
            match content.read(&mut buffer[..wanted]) {
                Ok(0) => break,
                Ok(read) => {
                    self.put(&buffer[..read])?;
                    left -= read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ArchiveError::Tree { action: "read", path: printable(&entry.path), source });
                }
            }
        }
        self.zeros(left + padding(length))
    }

    /// An entry whose content `write` writes: exactly the stated length, or the archive cannot go on and is refused.
    pub fn stream(
        &mut self,
        entry: &Entry,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), ArchiveError> {
        self.header(entry)?;
        let length = stored(&entry.kind);
        let mut content = Content { writer: self, left: length };
        write(&mut content).map_err(ArchiveError::Output)?;
        if content.left > 0 {
            let missing = io::Error::new(io::ErrorKind::UnexpectedEof, "an entry's content is too short");
            return Err(ArchiveError::Output(missing));
        }
        self.zeros(padding(length))
    }

    /// Ends the archive: two blocks of zeros. Returns what it was written to.
    pub fn finish(mut self) -> Result<W, ArchiveError> {
        self.zeros(2 * BLOCK as u64)?;
        self.out.flush().map_err(ArchiveError::Output)?;
        Ok(self.out)
    }

    fn header(&mut self, entry: &Entry) -> Result<(), ArchiveError> {
        if entry.path.is_empty() || entry.path.contains(&0) {
            let path = printable(&entry.path);
            return Err(ArchiveError::Unrepresentable { path, reason: "its name is empty or has a NUL" });
        }
        let mut header = Header::default();
        let mut records = Records::default();
        header.describe(entry, &mut records);
        if !records.bytes().is_empty() {
            let length = records.bytes().len() as u64;
            let mut extended = Header::default();
            extended.set(0..100, b"PaxHeader");
            extended.number(100..108, 0o644);
            extended.numbers(0, 0, length, 0);
            extended.0[156] = b'x';
            self.put(&extended.sealed())?;
            self.put(records.bytes())?;
            self.zeros(padding(length))?;
        }
        self.put(&header.sealed())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(ArchiveError::Output)
    }

    fn zeros(&mut self, mut count: u64) -> Result<(), ArchiveError> {
        let zeros = [0; 4096];
        while count > 0 {
            let length = count.min(zeros.len() as u64);
            self.put(&zeros[..length as usize])?;
            count -= length;
        }
        Ok(())
    }
}

/// An entry's content while it is written.
struct Content<'w, W> {
    writer: &'w mut Writer<W>,
    left: u64,
}

impl<W: Write> Write for Content<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an entry's content is too long"));
        };
        self.writer.out.write_all(bytes)?;
        self.writer.written += bytes.len() as u64;
        self.left = left;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.out.flush()
    }
}

/// Bytes of an entry's content in the archive, without padding.
fn stored(kind: &Kind) -> u64 {
    match kind {
        Kind::File(size) => *size,
        Kind::Sparse { stored, .. } => *stored,
        _ => 0,
    }
}

fn padding(length: u64) -> u64 {
    length.next_multiple_of(BLOCK as u64) - length
}

struct Header([u8; BLOCK]);

impl Default for Header {
    fn default() -> Self {
        let mut header = [0; BLOCK];
        header[257..265].copy_from_slice(b"ustar\x0000");
        Self(header)
    }
}

impl Header {
    /// Fills in what fits; the rest goes to the records.
    fn describe(&mut self, entry: &Entry, records: &mut Records) {
        let mut path = entry.path.clone();
        if entry.kind == Kind::Directory {
            path.push(b'/');
        }
        if let Kind::Sparse { size, .. } = entry.kind {
            records.add(b"GNU.sparse.major", b"1");
            records.add(b"GNU.sparse.minor", b"0");
            records.add(b"GNU.sparse.name", &path);
            records.add(b"GNU.sparse.realsize", size.to_string().as_bytes());
            path = sparse_name(&path);
        }
        self.path(&path, records);
        if let Kind::Link(target) | Kind::HardLink(target) = &entry.kind {
            match target.len() {
                ..=100 => self.set(157..257, target),
                _ => {
                    self.set(157..257, &target[..100]);
                    records.add(b"linkpath", target);
                }
            }
        }
        self.number(100..108, u64::from(entry.mode & 0o7777));
        let size = stored(&entry.kind);
        for (key, value, limit) in [
            (&b"uid"[..], u64::from(entry.uid), MAX_SHORT),
            (b"gid", u64::from(entry.gid), MAX_SHORT),
            (b"size", size, MAX_LONG),
        ] {
            if value > limit {
                records.add(key, value.to_string().as_bytes());
            }
        }
        let Timestamp { seconds, nanoseconds } = entry.mtime;
        let fitting = u64::try_from(seconds).ok().filter(|seconds| *seconds <= MAX_LONG);
        if nanoseconds != 0 || fitting.is_none() {
            records.add(b"mtime", decimal(seconds, nanoseconds).as_bytes());
        }
        self.numbers(entry.uid.into(), entry.gid.into(), size, fitting.unwrap_or(0));
        for (name, value) in &entry.xattrs {
            records.add(&[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        self.0[156] = match entry.kind {
            Kind::File(_) | Kind::Sparse { .. } => b'0',
            Kind::HardLink(_) => b'1',
            Kind::Link(_) => b'2',
            Kind::Character(..) => b'3',
            Kind::Block(..) => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        if let Kind::Character(major, minor) | Kind::Block(major, minor) = entry.kind {
            // Linux has twelve bits of major and twenty of minor numbers: they always fit.
            self.number(329..337, u64::from(major).min(MAX_SHORT));
            self.number(337..345, u64::from(minor).min(MAX_SHORT));
        }
    }

    /// A path of up to 100 bytes is the name; up to 256, if a slash is in the right place, prefix and name.
    fn path(&mut self, path: &[u8], records: &mut Records) {
        if path.len() <= 100 {
            return self.set(0..100, path);
        }
        // The slash between the two belongs to neither; a directory's own last one must stay with the name.
        let slash = (1..path.len().min(156))
            .rev()
            .find(|at| path[*at] == b'/' && *at + 1 < path.len() && path.len() - at - 1 <= 100);
        match slash {
            Some(at) => {
                self.set(345..500, &path[..at]);
                self.set(0..100, &path[at + 1..]);
            }
            None => {
                self.set(0..100, &path[..100]);
                records.add(b"path", path);
            }
        }
    }

    fn numbers(&mut self, uid: u64, gid: u64, size: u64, mtime: u64) {
        let fitting = |value: u64, limit| if value > limit { 0 } else { value };
        self.number(108..116, fitting(uid, MAX_SHORT));
        self.number(116..124, fitting(gid, MAX_SHORT));
        self.number(124..136, fitting(size, MAX_LONG));
        self.number(136..148, mtime);
    }

    fn set(&mut self, field: std::ops::Range<usize>, value: &[u8]) {
        let start = field.start;
        let length = value.len().min(field.len());
        self.0[start..start + length].copy_from_slice(&value[..length]);
    }

    /// Octal digits up to the field's last byte, which stays NUL.
    fn number(&mut self, field: std::ops::Range<usize>, value: u64) {
        let width = field.len() - 1;
        self.set(field, format!("{value:0width$o}").as_bytes());
    }

    fn sealed(mut self) -> [u8; BLOCK] {
        self.set(148..156, b"        ");
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.set(148..156, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

/// Where readers that know no sparse files put what they see, as GNU tar names it.
fn sparse_name(path: &[u8]) -> Vec<u8> {
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    [&path[..at], b"GNUSparseFile.0/", &path[at..]].concat()
}

/// Seconds with a fraction, as PAX writes times.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    // A negative time is -(whole seconds towards zero) and a fraction that counts away from zero.
    let (sign, whole, fraction) = match (seconds < 0, nanoseconds) {
        (true, 0) => ("-", seconds.unsigned_abs(), 0),
        (true, _) => ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
        (false, _) => ("", seconds.unsigned_abs(), nanoseconds),
    };
    match fraction {
        0 => format!("{sign}{whole}"),
        _ => format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_count_backwards() {
        assert_eq!(decimal(5, 0), "5");
        assert_eq!(decimal(5, 500_000_000), "5.5");
        assert_eq!(decimal(-1, 500_000_000), "-0.5");
        assert_eq!(decimal(-2, 0), "-2");
        assert_eq!(decimal(i64::MIN, 0), "-9223372036854775808");
    }

    #[test]
    fn a_name_with_a_nul_is_refused() {
        let entry = Entry {
            path: b"a\0b".to_vec(),
            kind: Kind::Fifo,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        };
        assert!(Writer::new(Vec::new()).entry(&entry).is_err());
    }
}
