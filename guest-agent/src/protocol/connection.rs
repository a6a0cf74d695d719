//! A connection for code that may wait: tests, and the agent's birth.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::messages::Message;
use super::{Frame, FrameReader, FrameWriter};

/// Sends and receives whole frames on a blocking unix stream socket.
#[derive(Debug)]
pub struct BlockingConnection {
    socket: OwnedFd,
    reader: FrameReader,
}

impl BlockingConnection {
    /// Takes over a connected, blocking unix stream socket.
    pub const fn new(socket: OwnedFd) -> Self {
        Self { socket, reader: FrameReader::new() }
    }

    /// Sends one frame with these descriptors.
    pub fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<Vec<_>>>()?;
        let mut writer = FrameWriter::new();
        writer.push(message, fds)?;
        if writer.write_to(self.socket.as_fd())? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    /// Waits for the next frame; `None` at the end of the stream. An end within a frame is `UnexpectedEof`.
    pub fn recv(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.reader.next()? {
                return Ok(Some(frame));
            }
            if self.reader.receive_from(self.socket.as_fd())? == 0 {
                let within = self.reader.is_within_frame();
                return if within { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(None) };
            }
        }
    }

    /// The socket and what was received of it so far.
    pub fn into_parts(self) -> (OwnedFd, FrameReader) {
        (self.socket, self.reader)
    }
}

impl AsFd for BlockingConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
