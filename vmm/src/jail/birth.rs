//! The socket that a process is born with, and the one request that it begins with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::error::{Doing, JailError};
use crate::protocol::messages::{
    self, Message, error::Code, message::Body, request::Call, response::Outcome,
};
use crate::protocol::{BlockingConnection, Descriptors, FrameReader};

/// The connection on which the first request came, until it is answered.
#[derive(Debug)]
pub struct Birth {
    connection: BlockingConnection,
    id: u64,
    pid: i32,
}

impl Birth {
    /// Waits for the first request on standard input, which becomes /dev/null.
    pub(super) fn receive() -> Result<(Self, Call, Descriptors), JailError> {
        hull_sys::memory::prefer_small();
        let mut connection = BlockingConnection::new(take_stdin()?);
        let frame = connection.recv().map_err(JailError::Connection)?;
        let frame = frame.ok_or_else(|| JailError::Connection(io::ErrorKind::UnexpectedEof.into()))?;
        let birth = Self { connection, id: frame.message.id, pid: 0 };
        match frame.message.body {
            Some(Body::Request(messages::Request { call: Some(call) })) => {
                Ok((birth, call, Descriptors::new(frame.fds)))
            }
            _ => Err(birth.refused(JailError::NotBoot)),
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    pub(super) fn known_as(mut self, pid: i32) -> Self {
        self.pid = pid;
        self
    }

    /// Tells hulld why there will be no such process; the error comes back.
    pub(super) fn refused(self, error: JailError) -> JailError {
        let code = match error {
            JailError::Request(_) | JailError::Descriptor(_) | JailError::NotBoot => Code::Invalid,
            _ => Code::Internal,
        };
        let errno = match &error {
            JailError::Step { source, .. } => source.raw_os_error().unwrap_or(0),
            _ => 0,
        };
        self.answer(Outcome::Error(messages::Error { code: code.into(), message: error.to_string(), errno }));
        error
    }

    /// Tells hulld that the machine could not be made: `reason` is a whole sentence for people. The process must end.
    pub fn failed(self, reason: &str) {
        let error = messages::Error { code: Code::Internal.into(), message: reason.to_owned(), errno: 0 };
        self.answer(Outcome::Error(error));
    }

    /// Tells hulld that the process is ready, and gives the connection with what was received from it already.
    ///
    /// # Errors
    /// hulld has gone: the process may go on, it is still on record.
    pub(crate) fn ready(mut self) -> (OwnedFd, FrameReader, io::Result<()>) {
        let booted = Outcome::Booted(messages::Booted { pid: self.pid });
        let sent = self.connection.send(&Message::response(self.id, booted), &[]);
        let (socket, reader) = self.connection.into_parts();
        (socket, reader, sent)
    }

    fn answer(mut self, outcome: Outcome) {
        // If nobody listens any more, nobody needs to know.
        let _ = self.connection.send(&Message::response(self.id, outcome), &[]);
    }
}

/// The socket on standard input, which becomes /dev/null.
fn take_stdin() -> Result<OwnedFd, JailError> {
    let stdin = rustix::stdio::stdin();
    if rustix::net::sockopt::socket_type(stdin).is_err() {
        return Err(JailError::NotStarted);
    }
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin, 3).doing("keep the connection to hulld")?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let null = null.doing("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).doing("replace standard input")?;
    Ok(socket)
}
