//! The terminal of an exec: what its user types and what it shows pass through the agent, because the terminal belongs
//! to the container's own devpts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

/// What one read takes.
const CHUNK: usize = 4 << 10;

/// One direction, with the bytes that the receiver has not taken yet.
#[derive(Debug)]
struct Direction {
    waiting: Vec<u8>,
    start: usize,
}

/// What became of one attempt to move bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// Everything that was read has been passed on.
    All,
    /// The receiver takes no more for now.
    Stuck,
    /// Nothing more will come.
    SourceEnded,
    /// Nobody takes it any more.
    SinkEnded,
}

impl Direction {
    const fn new() -> Self {
        Self { waiting: Vec::new(), start: 0 }
    }

    fn pass_on(&mut self, to: BorrowedFd<'_>) -> Moved {
        while self.start < self.waiting.len() {
            match rustix::io::write(to, &self.waiting[self.start..]) {
                Ok(length) => self.start += length,
                Err(Errno::AGAIN | Errno::INTR) => return Moved::Stuck,
                Err(_) => return Moved::SinkEnded,
            }
        }
        self.waiting = Vec::new();
        self.start = 0;
        Moved::All
    }

    /// Reads once, if nothing waits, and passes on.
    fn step(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Moved {
        match self.pass_on(to) {
            Moved::All => {}
            other => return other,
        }
        let mut chunk = [0; CHUNK];
        match rustix::io::read(from, &mut chunk) {
            Ok(0) => Moved::SourceEnded,
            Ok(length) => {
                self.waiting.extend_from_slice(&chunk[..length]);
                self.pass_on(to)
            }
            Err(Errno::AGAIN | Errno::INTR) => Moved::All,
            Err(_) => Moved::SourceEnded,
        }
    }
}

/// What an attached caller types, on its way to a container's stdin.
#[derive(Debug)]
pub struct InputRelay {
    input: OwnedFd,
    typed: Direction,
}

/// What there is to wait for after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// The caller may type more.
    Wanted,
    /// The container does not take more for now.
    Stuck,
    /// The caller will type no more.
    Ended,
    /// The container will read no more.
    Unread,
}

impl InputRelay {
    /// Takes over the caller's end and makes it non-blocking.
    pub fn new(input: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&input, true)?;
        Ok(Self { input, typed: Direction::new() })
    }

    /// Moves what can be moved to `stdin`, which must be non-blocking.
    pub fn step(&mut self, stdin: BorrowedFd<'_>) -> Typed {
        match self.typed.step(self.input.as_fd(), stdin) {
            Moved::All => Typed::Wanted,
            Moved::Stuck => Typed::Stuck,
            Moved::SourceEnded => Typed::Ended,
            Moved::SinkEnded => Typed::Unread,
        }
    }
}

impl AsFd for InputRelay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }
}

/// Passes bytes between a terminal and the ends that the caller of an exec gave.
#[derive(Debug)]
pub struct TerminalRelay {
    terminal: OwnedFd,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    typed: Direction,
    shown: Direction,
    /// The terminal's last user has gone and all that it showed is passed on.
    finished: bool,
}

/// What the relay can do next, for the event loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// The terminal may be read.
    pub terminal_read: bool,
    /// The terminal has not taken all that was typed.
    pub terminal_write: bool,
    /// The input may be read.
    pub input_read: bool,
    /// The output has not taken all that was shown.
    pub output_write: bool,
}

impl TerminalRelay {
    /// Takes over the terminal's primary end and the caller's ends, and makes them non-blocking.
    pub fn new(terminal: OwnedFd, input: Option<OwnedFd>, output: Option<OwnedFd>) -> io::Result<Self> {
        for fd in [Some(&terminal), input.as_ref(), output.as_ref()].into_iter().flatten() {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        Ok(Self {
            terminal,
            input,
            output,
            typed: Direction::new(),
            shown: Direction::new(),
            finished: false,
        })
    }

    /// Moves what can be moved in both directions. An input that ends leaves the terminal open, as a closed keyboard.
    pub fn step(&mut self) -> Interest {
        let mut interest = Interest::default();
        if let Some(input) = &self.input {
            match self.typed.step(input.as_fd(), self.terminal.as_fd()) {
                Moved::All => interest.input_read = true,
                Moved::Stuck => interest.terminal_write = true,
                Moved::SourceEnded | Moved::SinkEnded => self.input = None,
            }
        }
        match self.show() {
            Moved::All => interest.terminal_read = true,
            Moved::Stuck => interest.output_write = true,
            Moved::SourceEnded | Moved::SinkEnded => self.finished = true,
        }
        interest
    }

    /// Whether the terminal's last user has gone and everything it showed has been passed on.
    pub const fn is_finished(&self) -> bool {
        self.finished
    }

    /// Whether the caller has not taken yet what the terminal showed.
    pub const fn waits_for_reader(&self) -> bool {
        !self.shown.waiting.is_empty()
    }

    fn show(&mut self) -> Moved {
        if let Some(output) = &self.output {
            match self.shown.step(self.terminal.as_fd(), output.as_fd()) {
                // The program behind the terminal must not be held up by a caller that has gone.
                Moved::SinkEnded => self.output = None,
                other => return other,
            }
        }
        match rustix::io::read(&self.terminal, &mut [0; CHUNK]) {
            Ok(0) => Moved::SourceEnded,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Moved::All,
            Err(_) => Moved::SourceEnded,
        }
    }

    /// The terminal's primary end.
    pub fn terminal(&self) -> BorrowedFd<'_> {
        self.terminal.as_fd()
    }

    /// The caller's input, until it has ended.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    /// The caller's output.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_pass_both_ways_and_the_end_of_input_leaves_the_output_open() {
        let (terminal, mut program) = UnixStream::pair().unwrap();
        let (input, typist) = rustix::pipe::pipe().unwrap();
        let (screen, output) = rustix::pipe::pipe().unwrap();
        let mut relay = TerminalRelay::new(terminal.into(), Some(input), Some(output)).unwrap();
        let mut typist = File::from(typist);
        typist.write_all(b"ls\n").unwrap();
        program.write_all(b"a b\n").unwrap();
        let interest = relay.step();
        assert!(interest.input_read && interest.terminal_read);
        let mut typed = [0; 3];
        program.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"ls\n");
        drop(typist);
        relay.step();
        program.write_all(b"more").unwrap();
        relay.step();
        assert!(!relay.is_finished());
        drop(program);
        relay.step();
        assert!(relay.is_finished());
        drop(relay);
        let mut shown = String::new();
        File::from(screen).read_to_string(&mut shown).unwrap();
        assert_eq!(shown, "a b\nmore");
    }

    #[test]
    fn a_reader_that_does_not_read_holds_up_the_terminal_and_not_the_agent() {
        let (terminal, mut program) = UnixStream::pair().unwrap();
        let (_screen, output) = rustix::pipe::pipe().unwrap();
        program.set_nonblocking(true).unwrap();
        let mut relay = TerminalRelay::new(terminal.into(), None, Some(output)).unwrap();
        let mut stuck = false;
        for _ in 0..1000 {
            let _ = program.write(&[b'x'; 4096]);
            stuck |= relay.step().output_write;
        }
        assert!(stuck);
        assert!(relay.waits_for_reader());
        assert!(relay.shown.waiting.len() <= CHUNK);
    }
}
