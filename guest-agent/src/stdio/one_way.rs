//! Bytes from one descriptor to another, for the streams of execs and forwarded ports in a guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

/// Reads in one step: a busy direction leaves time for the others.
const READS: usize = 8;

/// One direction of a conversation. Its end is passed on too: by a shutdown where the receiver is a socket, by closing
/// where it is a pipe.
#[derive(Debug)]
pub struct OneWay {
    from: OwnedFd,
    to: OwnedFd,
    waiting: Vec<u8>,
}

/// What there is to wait for after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// That there is more to read.
    Wanted,
    /// That the receiver takes more.
    Stuck,
    /// Nothing: one of the two has come to its end.
    Ended,
}

impl OneWay {
    /// Takes over both and makes them non-blocking.
    pub fn new(from: OwnedFd, to: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&from, true)?;
        rustix::io::ioctl_fionbio(&to, true)?;
        Ok(Self { from, to, waiting: Vec::new() })
    }

    /// Moves what can be moved, through `chunk`.
    pub fn step(&mut self, chunk: &mut [u8]) -> Flow {
        let waiting = std::mem::take(&mut self.waiting);
        let mut flow = self.pass_on(&waiting);
        for _ in 0..READS {
            if flow != Flow::Wanted {
                return flow;
            }
            flow = match rustix::io::read(&self.from, &mut *chunk) {
                Ok(0) => self.ended(),
                Ok(length) => self.pass_on(&chunk[..length]),
                Err(Errno::AGAIN | Errno::INTR) => return Flow::Wanted,
                Err(_) => self.ended(),
            };
        }
        flow
    }

    fn pass_on(&mut self, bytes: &[u8]) -> Flow {
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::io::write(&self.to, rest) {
                Ok(length) => rest = &rest[length.min(rest.len())..],
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.waiting = rest.to_vec();
                    return Flow::Stuck;
                }
                Err(_) => {
                    // A socket's peer learns that nobody reads any more; a pipe's when it is closed.
                    let _ = shutdown(&self.from, Shutdown::Read);
                    return Flow::Ended;
                }
            }
        }
        Flow::Wanted
    }

    fn ended(&self) -> Flow {
        // No socket: its end is its closing.
        let _ = shutdown(&self.to, Shutdown::Write);
        Flow::Ended
    }

    /// Where the bytes come from.
    pub fn from(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }

    /// Where they go.
    pub fn to(&self) -> BorrowedFd<'_> {
        self.to.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_and_their_end_are_passed_on_and_the_other_direction_stays_open() {
        let (mut left, from) = UnixStream::pair().unwrap();
        let (to, mut right) = UnixStream::pair().unwrap();
        let mut way = OneWay::new(from.into(), to.into()).unwrap();
        let mut chunk = [0; 1024];
        left.write_all(b"hello").unwrap();
        assert_eq!(way.step(&mut chunk), Flow::Wanted);
        left.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(way.step(&mut chunk), Flow::Ended);
        let mut text = String::new();
        right.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        right.write_all(b"x").unwrap();
    }

    #[test]
    fn a_full_receiver_loses_nothing_and_one_that_has_gone_ends_it() {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let (taker, giver) = rustix::pipe::pipe().unwrap();
        writer.set_nonblocking(true).unwrap();
        let mut way = OneWay::new(reader.into(), giver).unwrap();
        let (mut chunk, mut sent) = (vec![0; 64 << 10], 0);
        while way.step(&mut chunk) != Flow::Stuck {
            sent += writer.write(&[b'x'; 8192]).unwrap_or(0);
        }
        drop(writer);
        let mut taker = File::from(taker);
        let mut got = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            got += taker.read(&mut buffer).unwrap();
            if way.step(&mut chunk) == Flow::Ended {
                break;
            }
        }
        drop(way);
        got += taker.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(got, sent);

        let (reader, mut writer) = UnixStream::pair().unwrap();
        let (taker, giver) = rustix::pipe::pipe().unwrap();
        let mut way = OneWay::new(reader.into(), giver).unwrap();
        drop(taker);
        writer.write_all(b"x").unwrap();
        assert_eq!(way.step(&mut chunk), Flow::Ended);
    }
}
