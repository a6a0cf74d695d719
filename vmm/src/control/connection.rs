use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::protocol::messages::Message;
use crate::protocol::{Frame, FrameReader, FrameWriter, MAX_REQUEST};

/// Most bytes that may wait for a peer that does not read.
const MAX_QUEUED: usize = 1 << 20;

/// One control connection; its socket does not block.
#[derive(Debug)]
pub(super) struct Connection {
    /// The loop's name for it; the newest has the highest.
    pub(super) serial: u32,
    socket: OwnedFd,
    reader: FrameReader,
    writer: FrameWriter,
    /// The loop waits for it to become writable, too.
    pub(super) waits_to_write: bool,
}

impl Connection {
    pub(super) fn new(serial: u32, socket: OwnedFd, reader: FrameReader) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { serial, socket, reader, writer: FrameWriter::new(), waits_to_write: false })
    }

    pub(super) fn accepted(serial: u32, socket: OwnedFd) -> io::Result<Self> {
        Self::new(serial, socket, FrameReader::with_limit(MAX_REQUEST))
    }

    /// Receives once. False if nothing is there now; an end of the stream is an error.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        match self.reader.receive_from(self.socket.as_fd()) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The next whole frame of what was received.
    pub(super) fn next(&mut self) -> io::Result<Option<Frame>> {
        Ok(self.reader.next()?)
    }

    /// Queues a frame and sends what the socket takes.
    pub(super) fn send(&mut self, message: &Message) -> io::Result<()> {
        if self.writer.queued() > MAX_QUEUED {
            return Err(io::Error::other("the peer does not read what is sent to it"));
        }
        self.writer.push(message, Vec::new())?;
        self.flush()
    }

    /// Sends what waits, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.waits_to_write = !self.writer.write_to(self.socket.as_fd())?;
        Ok(())
    }

    /// Sends what waits although the peer is slow, but not for ever: the last act.
    pub(super) fn finish(&mut self) {
        let limit = Some(std::time::Duration::from_secs(1));
        let _ = rustix::net::sockopt::set_socket_timeout(
            &self.socket,
            rustix::net::sockopt::Timeout::Send,
            limit,
        );
        let _ = rustix::io::ioctl_fionbio(&self.socket, false);
        let _ = self.writer.write_to(self.socket.as_fd());
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
