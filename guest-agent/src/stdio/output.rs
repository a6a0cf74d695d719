//! One output of a container on its way into the log.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;

use super::forward::{Forward, SinkInterest};
use super::line::{Lines, Stream};
use super::log_file::{BATCH, Batch, LogFile};
use super::tap::{Fed, Tap};
use super::timestamp;

/// What one read takes: as much as a pipe holds.
const CHUNK: usize = 64 << 10;

/// The memory through which all output of a pod passes, one chunk at a time. Made when something is written and dropped
/// when all is quiet.
#[derive(Debug)]
pub struct Buffers {
    chunk: Box<[u8]>,
    batch: Vec<u8>,
}

impl Buffers {
    /// The memory for one read, for whoever else moves bytes.
    pub(crate) fn chunk(&mut self) -> &mut [u8] {
        &mut self.chunk
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self { chunk: vec![0; CHUNK].into_boxed_slice(), batch: Vec::with_capacity(BATCH) }
    }
}

/// What there is still to come of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The stream goes on.
    Open,
    /// Everybody who could write has closed it; all has been logged.
    Ended,
}

/// The reading end of a pipe or of a terminal, and the line that is under way.
#[derive(Debug)]
pub struct OutputStream {
    source: OwnedFd,
    lines: Lines,
    taps: Vec<Tap>,
    late: Vec<u32>,
    /// Who logs it, if not the agent.
    forward: Option<Forward>,
    /// Everybody who could write has closed it, and somebody has not got everything yet.
    source_ended: bool,
    /// What the event loop watches now; the loop's own note.
    pub(crate) watched: OutputInterest,
}

/// What an event loop has to watch for a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputInterest {
    /// The source is to be read.
    pub source: bool,
    /// What is to come from whom the output is forwarded to.
    pub sink: SinkInterest,
    /// Somebody who reads along is to take more: see [`OutputStream::stuck_taps`].
    pub taps: bool,
}

impl OutputStream {
    /// Takes over `source` and makes it non-blocking.
    pub fn new(source: OwnedFd, stream: Stream) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&source, true)?;
        Ok(Self {
            source,
            lines: Lines::new(stream),
            taps: Vec::new(),
            late: Vec::new(),
            forward: None,
            source_ended: false,
            watched: OutputInterest::default(),
        })
    }

    /// Gives everything to `forward`, as it is, and logs nothing.
    pub fn forward_to(&mut self, forward: Forward) {
        self.forward = Some(forward);
    }

    /// The connection that takes everything, if there is one.
    pub const fn forward(&self) -> Option<&Forward> {
        self.forward.as_ref()
    }

    /// What has to happen before there is something to do again.
    pub fn interest(&self) -> OutputInterest {
        let sink = self.forward.as_ref().map_or(SinkInterest::None, Forward::interest);
        let taps = self.deadline().is_some();
        OutputInterest { source: !self.source_ended && sink != SinkInterest::Write && !taps, sink, taps }
    }

    /// Whether somebody has not taken all that was read.
    pub fn waits_for_sink(&self) -> bool {
        self.interest().sink != SinkInterest::None || self.deadline().is_some()
    }

    /// Gives what comes from now on to `pipe` as well. While it takes nothing nothing more is read; after two
    /// seconds it is let go, with what it has taken: see [`Self::take_late`].
    pub fn tap(&mut self, number: u32, pipe: OwnedFd) -> io::Result<()> {
        self.taps.push(Tap::new(number, pipe)?);
        Ok(())
    }

    /// The pipes of those who have to take something before more is read.
    pub fn stuck_taps(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.taps.iter().filter(|tap| tap.deadline().is_some()).map(|tap| tap.pipe.as_fd())
    }

    /// When somebody who reads along is let go unless they take something before.
    pub fn deadline(&self) -> Option<Instant> {
        self.taps.iter().filter_map(Tap::deadline).min()
    }

    /// How many read along.
    pub const fn taps(&self) -> usize {
        self.taps.len()
    }

    /// Lets go of one.
    pub fn forget_tap(&mut self, number: u32) {
        self.taps.retain(|tap| tap.number != number);
    }

    /// Lets go of all.
    pub fn forget_taps(&mut self) {
        self.taps = Vec::new();
    }

    /// Lets go of those whose reader has gone.
    pub fn forget_gone_taps(&mut self) {
        self.taps.retain(|tap| !tap.is_gone());
    }

    /// Those that were let go because they were too slow, since this was last asked.
    pub fn take_late(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.late)
    }

    fn feed_taps(taps: &mut Vec<Tap>, late: &mut Vec<u32>, feed: impl Fn(&mut Tap) -> Fed) {
        taps.retain_mut(|tap| {
            let fed = feed(tap);
            if fed == Fed::Late {
                late.push(tap.number);
            }
            fed == Fed::Kept
        });
    }

    /// Whether everybody who reads along has everything, after another attempt to send what waits.
    fn taps_take_more(&mut self, now: Instant) -> bool {
        if self.deadline().is_some() {
            Self::feed_taps(&mut self.taps, &mut self.late, |tap| tap.step(now));
        }
        self.deadline().is_none()
    }

    /// Reads one chunk and logs it.
    pub fn pump(&mut self, log: &mut LogFile, buffers: &mut Buffers) -> Progress {
        if !self.taps_take_more(Instant::now()) {
            return Progress::Open;
        }
        self.read_once(log, buffers).map_or(Progress::Ended, |_| Progress::Open)
    }

    /// Logs everything that is in the stream at this moment, but does not run after somebody who goes on writing.
    pub fn drain(&mut self, log: &mut LogFile, buffers: &mut Buffers) -> Progress {
        // A terminal's count lacks what its buffers hold back; an amount of zero only means one look.
        let mut left = rustix::io::ioctl_fionread(&self.source).unwrap_or(0).max(1);
        loop {
            match self.read_once(log, buffers) {
                None => return Progress::Ended,
                Some(0) => return Progress::Open,
                // The look for the stream's end comes after the last byte.
                Some(_) if left == 0 => return Progress::Open,
                Some(length) => left = left.saturating_sub(length as u64),
            }
        }
    }

    /// Logs the beginning of a line as it is, without waiting for its end.
    pub fn flush(&mut self, log: &mut LogFile, buffers: &mut Buffers) {
        let mut batch = Batch { buffer: &mut buffers.batch, file: log };
        self.lines.finish(&timestamp::rfc3339(timestamp::now()), &mut batch);
        batch.flush();
    }

    /// Number of bytes, 0 if there is nothing now, `None` at the end. Does not wait for those who read along, but for
    /// their having everything at the end.
    fn read_once(&mut self, log: &mut LogFile, buffers: &mut Buffers) -> Option<usize> {
        if self.source_ended {
            return self.rest();
        }
        if self.forward.as_mut().is_some_and(|forward| !forward.takes_more()) {
            return Some(0);
        }
        let length = match rustix::io::read(&self.source, &mut *buffers.chunk) {
            Ok(0) => None,
            Ok(length) => Some(length),
            Err(Errno::AGAIN | Errno::INTR) => return Some(0),
            // A terminal says EIO when its last user is gone.
            Err(_) => None,
        };
        let Some(length) = length else {
            self.source_ended = true;
            match &mut self.forward {
                Some(forward) => forward.end(),
                None if log.is_open() => self.flush(log, buffers),
                None => {}
            }
            return self.rest();
        };
        let bytes = &buffers.chunk[..length];
        if !self.taps.is_empty() {
            let now = Instant::now();
            Self::feed_taps(&mut self.taps, &mut self.late, |tap| tap.push(bytes, now));
        }
        match &mut self.forward {
            Some(forward) => forward.push(bytes),
            None if log.is_open() => {
                let time = timestamp::rfc3339(timestamp::now());
                let mut batch = Batch { buffer: &mut buffers.batch, file: log };
                self.lines.push(bytes, &time, &mut batch);
                batch.flush();
            }
            None => {}
        }
        Some(length)
    }

    /// The end, once everybody has everything; 0 before.
    fn rest(&mut self) -> Option<usize> {
        let taken = self.taps_take_more(Instant::now());
        let forwarded = self.forward.as_mut().is_none_or(Forward::is_done);
        if taken && forwarded { None } else { Some(0) }
    }
}

impl AsFd for OutputStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    struct Case {
        writer: File,
        stream: OutputStream,
        file: File,
        log: LogFile,
        buffers: Buffers,
    }

    fn case() -> Case {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let file = tempfile::tempfile().unwrap();
        let log = LogFile::new(Some(file.try_clone().unwrap().into()));
        let stream = OutputStream::new(reader, Stream::Stderr).unwrap();
        Case { writer: writer.into(), stream, file, log, buffers: Buffers::default() }
    }

    impl Case {
        fn contents(&mut self) -> Vec<String> {
            let mut text = String::new();
            self.file.rewind().unwrap();
            self.file.read_to_string(&mut text).unwrap();
            text.lines().map(|line| line[31..].to_owned()).collect()
        }
    }

    #[test]
    fn everything_written_before_the_end_is_logged_once() {
        let mut case = case();
        case.writer.write_all(b"one\ntwo").unwrap();
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Open);
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Open);
        case.writer.write_all(b" three\nfour").unwrap();
        drop(std::mem::replace(&mut case.writer, tempfile::tempfile().unwrap()));
        assert_eq!(case.stream.drain(&mut case.log, &mut case.buffers), Progress::Ended);
        assert_eq!(case.contents(), ["stderr F one", "stderr F two three", "stderr P four"]);
    }

    #[test]
    fn a_drain_takes_all_there_is_and_does_not_wait_for_a_writer_that_stays() {
        let mut case = case();
        case.writer.write_all(&[b'x'; 40_000]).unwrap();
        case.writer.write_all(b"\n").unwrap();
        assert_eq!(case.stream.drain(&mut case.log, &mut case.buffers), Progress::Open);
        let lengths: Vec<usize> = case.contents().iter().map(String::len).collect();
        assert_eq!(lengths, [9 + 16_384, 9 + 16_384, 9 + 40_000 - 2 * 16_384]);
    }

    #[test]
    fn whoever_reads_along_gets_every_byte_and_who_is_too_slow_is_let_go() {
        let mut case = case();
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let ((mut reader, fast), (_stalled, slow), (gone, left)) = {
            let ((reader, fast), slow, left) = (pipe(), pipe(), pipe());
            ((File::from(reader), fast), slow, left)
        };
        drop(gone);
        for (number, end) in [fast, slow, left].into_iter().enumerate() {
            case.stream.tap(number as u32, end).unwrap();
        }
        case.stream.forget_gone_taps();
        assert_eq!(case.stream.taps(), 2);
        let mut round = |case: &mut Case, byte: u8| {
            case.writer.write_all(&[byte; 60_000]).unwrap();
            case.stream.pump(&mut case.log, &mut case.buffers);
            let mut seen = vec![0; 60_000];
            reader.read_exact(&mut seen).unwrap();
            assert_eq!(seen, [byte; 60_000]);
        };
        round(&mut case, 0);
        round(&mut case, 1);
        // The second of them did not fit the pipe of the one that reads nothing: the container waits for it, for a while
        assert!(!case.stream.interest().source && case.stream.interest().taps);
        case.writer.write_all(b"held").unwrap();
        case.stream.pump(&mut case.log, &mut case.buffers);
        assert_eq!(rustix::io::ioctl_fionread(&case.stream).unwrap(), 4);
        let deadline = case.stream.deadline().unwrap();
        assert!(!case.stream.taps_take_more(deadline - std::time::Duration::from_millis(1)));
        assert!(case.stream.taps_take_more(deadline) && case.stream.interest().source);
        assert_eq!((case.stream.taps(), case.stream.take_late()), (1, vec![1]));
        case.stream.pump(&mut case.log, &mut case.buffers);
        reader.read_exact(&mut [0; 4]).unwrap();
        case.stream.forget_taps();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "its end tells");
    }

    #[test]
    fn a_reader_along_that_comes_late_misses_nothing_of_a_container_that_has_ended() {
        let mut case = case();
        let (reader, pipe) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        case.stream.tap(1, pipe).unwrap();
        case.writer.write_all(&[b'x'; 60_000]).unwrap();
        case.stream.pump(&mut case.log, &mut case.buffers);
        case.writer.write_all(&[b'y'; 60_000]).unwrap();
        drop(std::mem::replace(&mut case.writer, tempfile::tempfile().unwrap()));
        // Its end does not wait for the reader: all is logged now. What comes of the stream does.
        assert_eq!(case.stream.drain(&mut case.log, &mut case.buffers), Progress::Open);
        assert_eq!(case.contents().concat().matches('y').count(), 60_000);
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Open);
        let mut reader = File::from(reader);
        let mut seen = vec![0; 60_000];
        reader.read_exact(&mut seen).unwrap();
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Ended);
        drop(case.stream);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, [b'y'; 60_000]);
    }

    #[test]
    fn what_is_forwarded_is_not_logged_and_ends_when_the_other_side_has_it() {
        let mut case = case();
        let (mut peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        case.stream.forward_to(Forward::new(socket.into(), b"first ".to_vec()).unwrap());
        case.writer.write_all(b"one\ntwo").unwrap();
        drop(std::mem::replace(&mut case.writer, tempfile::tempfile().unwrap()));
        assert_eq!(case.stream.drain(&mut case.log, &mut case.buffers), Progress::Open);
        assert_eq!(
            case.stream.interest(),
            OutputInterest { source: false, sink: SinkInterest::Read, taps: false }
        );
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first one\ntwo");
        drop(peer);
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Ended);
        assert!(case.contents().is_empty());
    }

    #[test]
    fn a_forward_that_takes_nothing_holds_up_the_writer() {
        let mut case = case();
        let (_peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        case.stream.forward_to(Forward::new(socket.into(), Vec::new()).unwrap());
        rustix::io::ioctl_fionbio(&case.writer, true).unwrap();
        while case.stream.interest().source {
            let _ = case.writer.write(&[b'x'; 4096]);
            case.stream.pump(&mut case.log, &mut case.buffers);
        }
        let before = rustix::io::ioctl_fionread(&case.stream).unwrap();
        while case.writer.write(&[b'x'; 4096]).is_ok() {}
        assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Open);
        assert!(rustix::io::ioctl_fionread(&case.stream).unwrap() > before);
    }

    #[test]
    fn without_a_log_output_is_read_and_dropped() {
        let mut case = case();
        case.log = LogFile::new(None);
        for _ in 0..10 {
            case.writer.write_all(&[b'x'; 60_000]).unwrap();
            assert_eq!(case.stream.pump(&mut case.log, &mut case.buffers), Progress::Open);
        }
    }
}
