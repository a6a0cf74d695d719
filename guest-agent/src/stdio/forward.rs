//! Output on its way to somebody else who logs it: from a guest to its VMM.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, sockopt};

/// A connection that takes what a container writes, in order and as it is. The container is held up while it takes
/// nothing; when it breaks the output is dropped.
#[derive(Debug)]
pub struct Forward {
    socket: OwnedFd,
    waiting: Vec<u8>,
    start: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing more will come from here; what waits is still to be sent.
    Ending,
    /// The peer has been told of the end, and will tell that it has everything.
    Told,
    /// The peer has everything, or has gone.
    Done,
}

/// What there is to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SinkInterest {
    /// Nothing.
    #[default]
    None,
    /// That it takes more.
    Write,
    /// That it says it has everything.
    Read,
}

impl Forward {
    /// Takes over `socket`, which is connected or about to be, and sends `first` before anything else.
    pub fn new(socket: OwnedFd, first: Vec<u8>) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, waiting: first, start: 0, state: State::Open })
    }

    /// Whether it takes more now, after another attempt to send what waits.
    pub(super) fn takes_more(&mut self) -> bool {
        self.step();
        self.start == self.waiting.len()
    }

    /// Sends bytes, or keeps them until they can be sent.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.state == State::Open {
            self.waiting.extend_from_slice(bytes);
            self.step();
        }
    }

    /// Nothing more will come.
    pub(super) fn end(&mut self) {
        if self.state == State::Open {
            self.state = State::Ending;
        }
        self.step();
    }

    /// Whether the peer has everything, or has gone.
    pub(super) fn is_done(&mut self) -> bool {
        self.step();
        self.state == State::Done
    }

    /// What has to happen next.
    pub(super) fn interest(&self) -> SinkInterest {
        match self.state {
            State::Done => SinkInterest::None,
            State::Told => SinkInterest::Read,
            State::Open | State::Ending if self.start < self.waiting.len() => SinkInterest::Write,
            State::Open | State::Ending => SinkInterest::None,
        }
    }

    fn step(&mut self) {
        while matches!(self.state, State::Open | State::Ending) && self.start < self.waiting.len() {
            match rustix::io::write(&self.socket, &self.waiting[self.start..]) {
                Ok(length) => self.start += length,
                Err(Errno::AGAIN | Errno::INTR) => return,
                // On its way to be connected, unless that has failed.
                Err(Errno::NOTCONN) if matches!(sockopt::socket_error(&self.socket), Ok(Ok(()))) => return,
                Err(_) => self.state = State::Done,
            }
        }
        self.waiting = Vec::new();
        self.start = 0;
        if self.state == State::Ending {
            let told = rustix::net::shutdown(&self.socket, Shutdown::Write);
            self.state = if told.is_ok() { State::Told } else { State::Done };
        }
        if self.state == State::Told
            && !matches!(rustix::io::read(&self.socket, &mut [0; 64]), Err(Errno::AGAIN | Errno::INTR))
        {
            // The end, an error, or bytes, which nobody is to send here.
            self.state = State::Done;
        }
    }
}

impl AsFd for Forward {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Forward) {
        let (peer, ours) = UnixStream::pair().unwrap();
        (peer, Forward::new(ours.into(), b"hello ".to_vec()).unwrap())
    }

    #[test]
    fn all_is_sent_in_order_and_done_only_when_the_peer_says_so() {
        let (mut peer, mut forward) = pair();
        forward.push(b"one ");
        forward.push(b"two");
        forward.end();
        assert_eq!((forward.is_done(), forward.interest()), (false, SinkInterest::Read));
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello one two");
        assert!(!forward.is_done());
        drop(peer);
        assert_eq!((forward.is_done(), forward.interest()), (true, SinkInterest::None));
    }

    #[test]
    fn a_peer_that_does_not_read_takes_no_more_and_one_that_has_gone_takes_everything() {
        let (mut peer, mut forward) = pair();
        while forward.takes_more() {
            forward.push(&[b'x'; 60_000]);
        }
        assert_eq!(forward.interest(), SinkInterest::Write);
        forward.end();
        assert!(!forward.is_done());
        let mut bytes = vec![0; 30_000];
        peer.read_exact(&mut bytes).unwrap();
        drop(peer);
        assert!(forward.is_done() && forward.takes_more());
        forward.push(b"dropped");
        assert!(forward.waiting.is_empty());
        let (mut peer, mut forward) = pair();
        forward.end();
        peer.write_all(b"?").unwrap();
        assert!(forward.is_done(), "nobody is to send anything here");
    }
}
