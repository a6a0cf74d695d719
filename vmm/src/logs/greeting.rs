use std::os::fd::OwnedFd;

use hull_agent::protocol::messages::LogHello;
use hull_agent::stdio::Stream;
use prost::Message;
use rustix::io::Errno;

/// Longest frame that a connection may begin with, without its length.
const LONGEST: usize = 512;
/// Longest container id.
const LONGEST_ID: usize = 128;
const LENGTH: usize = 4;

/// A connection whose first frame is still coming.
#[derive(Debug)]
pub(super) struct Greeting {
    socket: OwnedFd,
    bytes: Vec<u8>,
}

/// Who a connection is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) container: String,
    pub(super) stream: Stream,
}

impl Origin {
    /// Its place in [`super::Log::open`].
    pub(super) fn place(&self) -> usize {
        usize::from(self.stream == Stream::Stderr)
    }
}

/// What reading has brought.
#[derive(Debug)]
pub(super) enum Progress {
    /// More must come.
    Incomplete(Greeting),
    /// The rest of the connection is output.
    Complete(OwnedFd, Origin),
    /// This is no log connection.
    Refused,
}

impl Greeting {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, bytes: Vec::new() }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Reads what has come of the frame, and not a byte beyond it.
    pub(super) fn read(mut self) -> Progress {
        loop {
            let wanted = match self.bytes.first_chunk::<LENGTH>() {
                None => LENGTH,
                Some(length) => LENGTH + u32::from_le_bytes(*length) as usize,
            };
            if wanted > LENGTH + LONGEST {
                return Progress::Refused;
            }
            let missing = wanted - self.bytes.len();
            if missing == 0 && wanted >= LENGTH && self.bytes.len() > LENGTH {
                return match origin(&self.bytes[LENGTH..]) {
                    Some(origin) => Progress::Complete(self.socket, origin),
                    None => Progress::Refused,
                };
            }
            if missing == 0 {
                // An empty frame names no container.
                return Progress::Refused;
            }
            let mut some = [0; LONGEST];
            let room = missing.min(LONGEST);
            match rustix::io::read(&self.socket, &mut some[..room]) {
                Ok(0) => return Progress::Refused,
                Ok(count) => self.bytes.extend_from_slice(&some[..count.min(room)]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Progress::Incomplete(self),
                Err(_) => return Progress::Refused,
            }
        }
    }
}

fn origin(frame: &[u8]) -> Option<Origin> {
    let hello = LogHello::decode(frame).ok()?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let container = hello.container_id;
    if container.is_empty() || container.len() > LONGEST_ID || !container.chars().all(allowed) {
        return None;
    }
    let stream = match hello.stream {
        0 => Stream::Stdout,
        1 => Stream::Stderr,
        _ => return None,
    };
    Some(Origin { container, stream })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn frame(container: &str, stream: u32) -> Vec<u8> {
        let body = LogHello { container_id: container.to_owned(), stream }.encode_to_vec();
        [&(body.len() as u32).to_le_bytes()[..], &body].concat()
    }

    fn greet(bytes: &[u8]) -> (Progress, UnixStream) {
        let (mut left, right) = UnixStream::pair().unwrap();
        right.set_nonblocking(true).unwrap();
        left.write_all(bytes).unwrap();
        (Greeting::new(right.into()).read(), left)
    }

    #[test]
    fn a_connection_says_whose_it_is_and_what_follows_is_left_alone() {
        let bytes = [frame("abc-1", 1), b"output".to_vec()].concat();
        let (Progress::Complete(socket, origin), _peer) = greet(&bytes) else { panic!() };
        assert_eq!(origin, Origin { container: "abc-1".into(), stream: Stream::Stderr });
        let mut text = [0; 6];
        UnixStream::from(socket).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"output");
    }

    #[test]
    fn it_may_come_in_pieces() {
        let bytes = frame("abc", 0);
        let (mut progress, mut peer) = greet(&bytes[..1]);
        for byte in &bytes[1..] {
            let Progress::Incomplete(greeting) = progress else { panic!() };
            peer.write_all(&[*byte]).unwrap();
            progress = greeting.read();
        }
        assert!(matches!(progress, Progress::Complete(..)));
    }

    #[test]
    fn whatever_else_is_refused() {
        let long = "x".repeat(129);
        for bytes in [
            vec![0; 4],
            vec![0xff; 8],
            513_u32.to_le_bytes().to_vec(),
            [&3_u32.to_le_bytes()[..], &[0xff; 3]].concat(),
            frame("", 0),
            frame("a/b", 0),
            frame("a\n", 0),
            frame("abc", 2),
            frame(&long, 0),
        ] {
            assert!(matches!(greet(&bytes).0, Progress::Refused), "{bytes:?}");
        }
        let (left, right) = UnixStream::pair().unwrap();
        drop(left);
        assert!(matches!(Greeting::new(right.into()).read(), Progress::Refused));
    }
}
