//! A connection for code that may wait: tests, and the agent's birth.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::FrameWriter;
use super::frame::{FrameMessage, FrameOf, FrameReaderOf};

/// Sends and receives whole frames on a blocking unix stream socket.
#[derive(Debug)]
pub struct BlockingConnectionOf<M> {
    socket: OwnedFd,
    reader: FrameReaderOf<M>,
}

impl<M: FrameMessage> BlockingConnectionOf<M> {
    /// Takes over a connected, blocking unix stream socket.
    pub const fn new(socket: OwnedFd) -> Self {
        Self { socket, reader: FrameReaderOf::new() }
    }

    /// Sends one frame with these descriptors.
    pub fn send(&mut self, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<Vec<_>>>()?;
        let mut writer = FrameWriter::new();
        writer.push(message, fds)?;
        if writer.write_to(self.socket.as_fd())? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    /// Waits for the next frame; `None` at the end of the stream. An end within a frame is `UnexpectedEof`.
    pub fn recv(&mut self) -> io::Result<Option<FrameOf<M>>> {
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
    pub fn into_parts(self) -> (OwnedFd, FrameReaderOf<M>) {
        (self.socket, self.reader)
    }
}

impl<M> AsFd for BlockingConnectionOf<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
