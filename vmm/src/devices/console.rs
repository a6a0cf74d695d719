use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, fallocate, fstat, ftruncate};

/// The file never grows beyond this.
const LIMIT: u64 = 1 << 20;
/// When it would, this much of its beginning goes; a multiple of every filesystem's block size.
const DROPPED: u64 = LIMIT / 2;
/// Bytes of a line that are kept back until its end is there.
const LINE: usize = 512;
const PANIC: &[u8] = b"Kernel panic";

/// What the guest prints on its serial port, in a file of bounded size that keeps the newest.
pub struct ConsoleLog {
    file: File,
    /// Bytes in the file, as far as we know.
    size: u64,
    line: Vec<u8>,
    panic: Option<String>,
}

impl ConsoleLog {
    /// Writes to `file`, a regular file that is open for append. What is in it counts.
    #[must_use]
    pub fn new(file: OwnedFd) -> Self {
        let file = File::from(file);
        let size = fstat(&file).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        Self { file, size, line: Vec::with_capacity(LINE), panic: None }
    }

    /// The line by which the kernel said why it panicked, without its time.
    #[must_use]
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// Writes what is there of a line.
    pub fn flush_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        if self.panic.is_none()
            && let Some(at) = self.line.windows(PANIC.len()).position(|window| window == PANIC)
        {
            let text = String::from_utf8_lossy(self.line.get(at..).unwrap_or_default());
            let printable = text.chars().filter(|c| !c.is_control()).collect();
            self.panic = Some(printable);
        }
        if self.size + self.line.len() as u64 > LIMIT {
            self.shorten();
        }
        // A full disk loses the line, and nothing else.
        if self.file.write_all(&self.line).is_ok() {
            self.size += self.line.len() as u64;
        }
        self.line.clear();
    }

    fn shorten(&mut self) {
        if fallocate(&self.file, FallocateFlags::COLLAPSE_RANGE, 0, DROPPED).is_ok() {
            self.size -= DROPPED;
        } else if ftruncate(&self.file, 0).is_ok() {
            // tmpfs, say, cannot cut off a beginning.
            self.size = 0;
        }
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for byte in data {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE {
                self.flush_line();
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Called after every byte: lines are written when they end.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_guest_that_prints_for_ever_does_not_fill_the_disk_and_its_last_words_are_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let appending = std::fs::OpenOptions::new().append(true).open(file.path()).unwrap();
        let mut log = ConsoleLog::new(appending.into());

        for i in 0..100_000 {
            writeln!(log, "line {i} of a guest that never stops to print, whatever happens").unwrap();
        }
        log.write_all(b"last words").unwrap();
        log.flush_line();

        let mut text = String::new();
        file.reopen().unwrap().read_to_string(&mut text).unwrap();
        assert!(text.len() as u64 <= LIMIT, "{}", text.len());
        assert!(
            text.ends_with("line 99999 of a guest that never stops to print, whatever happens\nlast words")
        );
    }

    #[test]
    fn the_reason_of_a_panic_is_kept_without_control_characters() {
        let mut log = ConsoleLog::new(tempfile::tempfile().unwrap().into());

        log.write_all(b"[    0.9] Kernel panic - not syncing: no \x1b[31minit\r\nand more\n").unwrap();

        assert_eq!(log.panic(), Some("Kernel panic - not syncing: no [31minit"));
    }
}
