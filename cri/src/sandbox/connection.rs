//! The bytes between hulld and an agent, or a VMM: frames with descriptors, out and in, on one non-blocking unix socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hull_agent::protocol::{FrameMessage, FrameOf, FrameReaderOf, FrameWriter};
use tokio::sync::Notify;

use crate::local_stream::LocalStream;

/// The socket, with what is still to be sent.
#[derive(Debug)]
pub(super) struct Connection {
    socket: LocalStream,
    outgoing: Mutex<FrameWriter>,
    more: Notify,
}

impl Connection {
    /// Takes over a connected socket.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self { socket: LocalStream::new(socket)?, outgoing: Mutex::default(), more: Notify::new() })
    }

    fn outgoing(&self) -> MutexGuard<'_, FrameWriter> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a frame, at once if the socket takes it (nearly always); otherwise [`Self::write_rest`] sends it. So a
    /// caller that goes away never leaves half a frame.
    pub(super) fn send(&self, message: &impl FrameMessage, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut outgoing = self.outgoing();
        outgoing.push(message, fds)?;
        if !outgoing.write_to(self.socket.as_fd())? {
            self.more.notify_one();
        }
        Ok(())
    }

    /// Sends what [`Self::send`] could not; runs until the socket breaks.
    pub(super) async fn write_rest(&self) -> io::Error {
        loop {
            self.more.notified().await;
            let written = self.socket.send_with(|| {
                let all = self.outgoing().write_to(self.socket.as_fd())?;
                if all { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
            });
            if let Err(error) = written.await {
                return error;
            }
        }
    }

    /// The next frame from the other end; None at the end of the stream.
    pub(super) async fn receive<M: FrameMessage>(
        &self,
        reader: &mut FrameReaderOf<M>,
    ) -> io::Result<Option<FrameOf<M>>> {
        loop {
            if let Some(frame) = reader.next()? {
                return Ok(Some(frame));
            }
            let receive = || reader.receive_from(self.socket.as_fd());
            if self.socket.receive_with(receive).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Ends both directions; a task in [`Self::receive`] sees the end.
    pub(super) fn shut_down(&self) {
        // A socket that is broken already is as good as one that is shut down.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}
