//! Log files as CRI has them: `TIME STREAM TAGS TEXT` a line, P for a part of a line and F for its end.

mod changes;
mod follow;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(super) use follow::follow;

/// Longest record in bytes: 16 KiB of text, the time, the stream, and some room. What is longer is no record.
const MAX_RECORD: u64 = 64 << 10;

/// Where the two streams of a container go.
pub(super) struct Sink<'a> {
    pub(super) out: &'a mut dyn Write,
    pub(super) err: &'a mut dyn Write,
}

/// One container's log, from file to file as it is rotated.
#[derive(Debug)]
pub(super) struct ContainerLog {
    path: PathBuf,
    timestamps: bool,
    file: Option<BufReader<File>>,
    /// A record whose end has not been written yet.
    partial: Vec<u8>,
    /// For stdout and stderr: the last record was a part of a line.
    within_line: [bool; 2],
}

impl ContainerLog {
    /// The log at `path`, which may not be there yet; with `tail`, from so many lines before its end.
    pub(super) fn open(path: &Path, timestamps: bool, tail: Option<usize>) -> io::Result<Self> {
        let mut file = open_if_there(path)?;
        if let (Some(file), Some(lines)) = (&mut file, tail) {
            seek_to_tail(file, lines)?;
        }
        Ok(ContainerLog { path: path.into(), timestamps, file, partial: Vec::new(), within_line: [false; 2] })
    }

    /// The directory in which the file and its replacements appear.
    pub(super) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Copies what has been written since the last time. True if there was anything.
    pub(super) fn copy_new(&mut self, sink: &mut Sink<'_>) -> io::Result<bool> {
        let mut any = false;
        loop {
            any |= self.copy_file(sink)?;
            // The agent may have written to the old file up to the moment it changed over, so the old one is read to
            // its end once more after the new one has been seen.
            if !self.replaced()? {
                break;
            }
            any |= self.copy_file(sink)?;
            self.partial.clear();
            self.file = open_if_there(&self.path)?;
        }
        sink.out.flush()?;
        sink.err.flush()?;
        Ok(any)
    }

    fn copy_file(&mut self, sink: &mut Sink<'_>) -> io::Result<bool> {
        let mut any = false;
        loop {
            let Some(file) = &mut self.file else { return Ok(any) };
            let room = MAX_RECORD.saturating_sub(self.partial.len() as u64);
            let read = file.take(room).read_until(b'\n', &mut self.partial)?;
            if read == 0 && room > 0 {
                return Ok(any);
            }
            any = true;
            if self.partial.ends_with(b"\n") || self.partial.len() as u64 >= MAX_RECORD {
                let record = std::mem::take(&mut self.partial);
                self.write(&record, sink)?;
            }
        }
    }

    fn write(&mut self, record: &[u8], sink: &mut Sink<'_>) -> io::Result<()> {
        let record = record.strip_suffix(b"\n").unwrap_or(record);
        let Some(Record { time, stderr, whole, text }) = Record::parse(record) else {
            // Not ours; shown as it is rather than swallowed.
            sink.out.write_all(record)?;
            return sink.out.write_all(b"\n");
        };
        let out = if stderr { &mut sink.err } else { &mut sink.out };
        let within_line = &mut self.within_line[usize::from(stderr)];
        if self.timestamps && !*within_line {
            out.write_all(time)?;
            out.write_all(b" ")?;
        }
        out.write_all(text)?;
        if whole {
            out.write_all(b"\n")?;
        }
        *within_line = !whole;
        Ok(())
    }

    /// True if another file has taken the place of the one being read, or it was cut short.
    fn replaced(&mut self) -> io::Result<bool> {
        let now = match std::fs::metadata(&self.path) {
            Ok(now) => now,
            // Between renaming the old file and making the new one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(file) = &mut self.file else { return Ok(true) };
        let own = file.get_ref().metadata()?;
        if (own.dev(), own.ino()) != (now.dev(), now.ino()) {
            return Ok(true);
        }
        if now.len() < file.stream_position()? {
            file.seek(SeekFrom::Start(0))?;
            self.partial.clear();
        }
        Ok(false)
    }
}

/// The parts of one line of the file.
struct Record<'a> {
    time: &'a [u8],
    stderr: bool,
    /// A line ends here.
    whole: bool,
    text: &'a [u8],
}

impl<'a> Record<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
        let stderr = match stream {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        // Tags are separated by colons; the first one says whether the line is whole.
        let whole = match tags.split(|byte| *byte == b':').next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Record { time, stderr, whole, text: parts.next().unwrap_or_default() })
    }
}

fn open_if_there(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::with_capacity(64 << 10, file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Goes to where the last `lines` lines begin. Memory grows with `lines`, not with the file.
fn seek_to_tail(file: &mut BufReader<File>, lines: usize) -> io::Result<()> {
    let mut starts: VecDeque<u64> = VecDeque::new();
    let (mut position, mut at_start, mut record) = (0, true, Vec::new());
    loop {
        record.clear();
        let read = file.take(MAX_RECORD).read_until(b'\n', &mut record)? as u64;
        if read == 0 {
            break;
        }
        if at_start {
            starts.push_back(position);
            if starts.len() > lines {
                starts.pop_front();
            }
        }
        at_start = Record::parse(&record).is_none_or(|record| record.whole);
        position += read;
    }
    file.seek(SeekFrom::Start(starts.front().copied().unwrap_or(position)))?;
    Ok(())
}

#[cfg(test)]
mod tests;
