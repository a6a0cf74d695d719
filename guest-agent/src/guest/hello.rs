//! The first frame of each connection that a guest's agent accepts.

use std::time::{Duration, Instant};

use prost::Message as _;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

use crate::protocol::messages::{Hello, hello};

/// Longest first frame, without its length.
const MAX_HELLO: usize = 64;
const LENGTH: usize = size_of::<u32>();
/// How long a connection may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that has not said yet what it is.
#[derive(Debug)]
pub(crate) struct Greeting {
    pub(crate) serial: u32,
    socket: OwnedFd,
    bytes: [u8; LENGTH + MAX_HELLO],
    filled: usize,
    deadline: Instant,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeted {
    /// More bytes are needed.
    NotYet,
    /// A control connection.
    Control,
    /// The stream with this number, not 0.
    Stream(u64),
    /// It has ended, or is none of ours.
    Gone,
}

impl Greeting {
    /// `socket` does not block.
    pub(crate) fn new(serial: u32, socket: OwnedFd, now: Instant) -> Self {
        Self { serial, socket, bytes: [0; LENGTH + MAX_HELLO], filled: 0, deadline: now + PATIENCE }
    }

    pub(crate) const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Reads what there is, and nothing of what follows the frame.
    pub(crate) fn step(&mut self) -> Greeted {
        loop {
            let wanted = match self.wanted() {
                Some(wanted) if wanted > self.filled => wanted,
                Some(_) => return self.finish(),
                None => return Greeted::Gone,
            };
            match rustix::io::read(&self.socket, &mut self.bytes[self.filled..wanted]) {
                Ok(0) => return Greeted::Gone,
                Ok(length) => self.filled += length,
                Err(Errno::AGAIN | Errno::INTR) => return Greeted::NotYet,
                Err(_) => return Greeted::Gone,
            }
        }
    }

    /// The connection itself, from behind the frame on.
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Length of the frame as far as it is known; `None` if it is longer than any that there is.
    fn wanted(&self) -> Option<usize> {
        let (length, _) = self.bytes.split_first_chunk::<LENGTH>()?;
        if self.filled < LENGTH {
            return Some(LENGTH);
        }
        let length = u32::from_le_bytes(*length) as usize;
        (length <= MAX_HELLO).then_some(LENGTH + length)
    }

    fn finish(&self) -> Greeted {
        match Hello::decode(&self.bytes[LENGTH..self.filled]).map(|hello| hello.kind) {
            Ok(Some(hello::Kind::Control(_))) => Greeted::Control,
            Ok(Some(hello::Kind::Stream(number))) if number != 0 => Greeted::Stream(number),
            _ => Greeted::Gone,
        }
    }
}

impl AsFd for Greeting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The first frame of a connection, as it goes over the wire.
pub(crate) fn frame(message: &impl prost::Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn greeting() -> (UnixStream, Greeting) {
        let (left, right) = UnixStream::pair().unwrap();
        right.set_nonblocking(true).unwrap();
        (left, Greeting::new(1, right.into(), Instant::now()))
    }

    fn hello(kind: hello::Kind) -> Vec<u8> {
        frame(&Hello { kind: Some(kind) })
    }

    #[test]
    fn a_stream_says_its_number_in_pieces_and_what_follows_stays_in_the_socket() {
        let (mut peer, mut greeting) = greeting();
        let bytes = hello(hello::Kind::Stream(u64::MAX));
        let (first, second) = bytes.split_at(3);
        assert_eq!(greeting.step(), Greeted::NotYet);
        peer.write_all(first).unwrap();
        assert_eq!(greeting.step(), Greeted::NotYet);
        peer.write_all(&[second, b"raw"].concat()).unwrap();
        assert_eq!(greeting.step(), Greeted::Stream(u64::MAX));
        drop(peer);
        let mut rest = String::new();
        UnixStream::from(greeting.into_socket()).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "raw");
    }

    #[test]
    fn a_control_connection_is_told_from_what_is_none_of_ours() {
        let (mut peer, mut greeting) = greeting();
        peer.write_all(&hello(hello::Kind::Control(hello::Control {}))).unwrap();
        assert_eq!(greeting.step(), Greeted::Control);
        let bad: [&[u8]; 5] =
            [&hello(hello::Kind::Stream(0)), &[0; 4], &[65, 0, 0, 0], &[255; 4], b"\x02\0\0\0\xff\xff"];
        for bytes in bad {
            let (mut peer, mut greeting) = self::greeting();
            peer.write_all(bytes).unwrap();
            assert_eq!(greeting.step(), Greeted::Gone, "{bytes:?}");
        }
    }
}
