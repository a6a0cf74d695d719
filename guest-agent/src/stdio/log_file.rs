//! A container's log file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::line::{Entries, MAX_ENTRY};

/// Size of the buffer in which entries gather for one write.
pub(super) const BATCH: usize = 64 << 10;
const _: () = assert!(BATCH >= MAX_ENTRY);

/// The file that entries are appended to, or nothing. A container is never held up or told when it cannot be written
/// (full disk, quota): the output is dropped and the next is tried anew.
#[derive(Debug, Default)]
pub struct LogFile {
    file: Option<OwnedFd>,
    /// The last write stopped within an entry.
    torn: bool,
    dropped: u64,
}

impl LogFile {
    /// Appends to `file`, which is open for appending; `None` drops everything.
    pub const fn new(file: Option<OwnedFd>) -> Self {
        Self { file, torn: false, dropped: 0 }
    }

    /// Goes on in another file. What was written before is whole in the old one, except for a line under way.
    pub fn replace(&mut self, file: OwnedFd) {
        self.file = Some(file);
        self.torn = false;
    }

    /// Nothing more will come; the file is closed.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Bytes that could not be written.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether there is a file at all.
    pub const fn is_open(&self) -> bool {
        self.file.is_some()
    }

    fn write(&mut self, entries: &[u8]) {
        let Some(file) = &self.file else { return };
        let file = file.as_fd();
        if self.torn {
            // A reader finds the next entry at a line's beginning; the torn one before it will not parse.
            if write_some(file, b"\n") != 1 {
                self.dropped += entries.len() as u64;
                return;
            }
            self.torn = false;
        }
        let mut rest = entries;
        while !rest.is_empty() {
            let written = write_some(file, rest);
            if written == 0 {
                self.torn = rest.len() < entries.len() && entries[entries.len() - rest.len() - 1] != b'\n';
                self.dropped += rest.len() as u64;
                return;
            }
            rest = &rest[written.min(rest.len())..];
        }
    }
}

/// How much was written, 0 if nothing could be.
fn write_some(file: BorrowedFd<'_>, bytes: &[u8]) -> usize {
    rustix::io::retry_on_intr(|| rustix::io::write(file, bytes)).unwrap_or(0)
}

/// Gathers entries in a buffer and writes them together.
pub(super) struct Batch<'a> {
    pub(super) buffer: &'a mut Vec<u8>,
    pub(super) file: &'a mut LogFile,
}

impl Batch<'_> {
    /// Writes what has gathered.
    pub(super) fn flush(&mut self) {
        self.file.write(self.buffer);
        self.buffer.clear();
    }
}

impl Entries for Batch<'_> {
    fn entry(&mut self, pieces: [&[u8]; 6]) {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        if self.buffer.len() + length > BATCH {
            self.flush();
        }
        for piece in pieces {
            self.buffer.extend_from_slice(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn a_full_device_drops_output_and_never_blocks() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = LogFile::new(Some(full.into()));
        log.write(b"one\n");
        log.write(b"two\n");
        assert_eq!(log.dropped(), 8);
    }

    #[test]
    fn after_a_torn_entry_the_next_begins_on_its_own_line() {
        let mut file = tempfile::tempfile().unwrap();
        let mut log = LogFile::new(Some(file.try_clone().unwrap().into()));
        log.write(b"begun");
        log.torn = true;
        log.write(b"next\n");
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "begun\nnext\n");
    }

    #[test]
    fn entries_gather_and_a_replaced_file_gets_only_what_comes_later() {
        let (mut old, mut new) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut log = LogFile::new(Some(old.try_clone().unwrap().into()));
        let mut buffer = Vec::new();
        let big = vec![b'x'; 30_000];
        let mut batch = Batch { buffer: &mut buffer, file: &mut log };
        for _ in 0..3 {
            batch.entry([b"", b"", b"", b"", &big, b"\n"]);
        }
        batch.flush();
        log.replace(new.try_clone().unwrap().into());
        log.write(b"new\n");
        let read = |file: &mut std::fs::File| {
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(read(&mut old).len(), 3 * 30_001);
        assert_eq!(read(&mut new), b"new\n");
    }
}
