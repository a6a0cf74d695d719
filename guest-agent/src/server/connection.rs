//! Control connections: hulld's requests come in, responses and events go out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message as _;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::Server;
use super::failure::CallError;
use super::poll::{Poll, Source};
use super::report;
use crate::protocol::messages::{Event, Message, Response, message::Body, response::Outcome};
use crate::protocol::{Frame, FrameError, FrameReader, FrameWriter, MAX_FRAME};

/// Most connections at a time; the oldest gives way.
const MAX_CONNECTIONS: usize = 16;
/// Most bytes that may wait for a peer that does not read.
const MAX_QUEUED: usize = 1 << 20;
/// Most receives for one wake-up, so that a talkative peer leaves time for the rest.
const RECEIVES: usize = 64;

/// Pause when a connection cannot be taken for want of descriptors or memory.
const OUT_OF_DESCRIPTORS: std::time::Duration = std::time::Duration::from_millis(20);

/// One control connection.
#[derive(Debug)]
struct Connection {
    serial: u32,
    socket: OwnedFd,
    reader: FrameReader,
    writer: FrameWriter,
    armed: bool,
    /// The event loop waits for it to become writable.
    waits_to_write: bool,
    closed: bool,
    /// A newer connection has been told what there is: what this one still asks for must not change it.
    superseded: bool,
}

impl Connection {
    /// Sends what waits, as far as the socket takes it.
    fn flush(&mut self, poll: &Poll) {
        let Ok(all) = self.writer.write_to(self.socket.as_fd()) else {
            self.closed = true;
            return;
        };
        if all == self.waits_to_write && self.armed {
            let interest = if all { EventFlags::IN } else { EventFlags::IN | EventFlags::OUT };
            self.waits_to_write = !all;
            self.closed |= poll.change(&self.socket, Source::Connection(self.serial), interest).is_err();
        }
    }

    fn send(&mut self, message: &Message, poll: &Poll) {
        let queued = self.writer.queued();
        let pushed = if queued > MAX_QUEUED {
            Err(FrameError::QueueFull(queued))
        } else {
            self.writer.push(message, Vec::new())
        };
        match pushed {
            Ok(()) => self.flush(poll),
            Err(error) => {
                report::line(format_args!("a control connection is closed: {error}"));
                self.closed = true;
            }
        }
    }
}

/// All control connections, the newest last.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: Vec<Connection>,
    next_serial: u32,
    /// Longest message that may be sent, if that is less than the protocol's own bound.
    pub(super) longest: Option<usize>,
}

impl Connections {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes over a non-blocking socket and what was received from it already.
    pub(super) fn add(&mut self, socket: OwnedFd, reader: FrameReader) -> u32 {
        if self.open.len() >= MAX_CONNECTIONS {
            self.open.remove(0);
        }
        self.next_serial = self.next_serial.wrapping_add(1);
        let serial = self.next_serial;
        self.open.push(Connection {
            serial,
            socket,
            reader,
            writer: FrameWriter::new(),
            armed: false,
            waits_to_write: false,
            closed: false,
            superseded: false,
        });
        serial
    }

    /// Lets the event loop watch connections that it does not watch yet.
    pub(super) fn arm(&mut self, poll: &Poll) {
        for connection in self.open.iter_mut().filter(|connection| !connection.armed) {
            connection.closed |= poll.add(&connection.socket, Source::Connection(connection.serial)).is_err();
            connection.armed = true;
            connection.flush(poll);
        }
    }

    /// Forgets connections that have ended.
    pub(super) fn sweep(&mut self) {
        self.open.retain(|connection| !connection.closed);
    }

    fn get(&mut self, serial: u32) -> Option<&mut Connection> {
        self.open.iter_mut().find(|connection| connection.serial == serial && !connection.closed)
    }

    /// The peer of this connection is about to be told what there is, and goes by that: older connections start
    /// nothing any more. What a hulld that was killed still had in its socket would otherwise come after the answer.
    pub(super) fn supersede_older(&mut self, serial: u32) {
        let older = self.open.iter_mut().take_while(|connection| connection.serial != serial);
        older.for_each(|connection| connection.superseded = true);
    }

    /// Whether a newer connection has been told what there is.
    pub(super) fn is_superseded(&self, serial: u32) -> bool {
        self.open.iter().any(|connection| connection.serial == serial && connection.superseded)
    }

    /// Answers a request; if its connection has gone, nobody waits for the answer.
    pub(super) fn respond(&mut self, serial: u32, id: u64, outcome: Outcome, poll: &Poll) {
        let longest = self.longest.unwrap_or(MAX_FRAME);
        if let Some(connection) = self.get(serial) {
            let mut message = Message { id, body: Some(Body::Response(Response { outcome: Some(outcome) })) };
            if message.encoded_len() > longest {
                let error = CallError::precondition("the answer is longer than a message can be");
                message.body = Some(Body::Response(Response { outcome: Some(error.into_outcome()) }));
            }
            connection.send(&message, poll);
        }
    }

    /// Sends an event to the newest connection.
    pub(super) fn send_event(&mut self, event: Event, poll: &Poll) {
        if let Some(newest) = self.open.iter_mut().rev().find(|connection| !connection.closed) {
            newest.send(&Message { id: 0, body: Some(Body::Event(event)) }, poll);
        }
    }

    /// Makes the sockets blocking and sends what waits: the agent's last act.
    pub(super) fn finish(&mut self) {
        for connection in &mut self.open {
            let limit = Some(std::time::Duration::from_secs(1));
            // A peer that does not read must not keep the agent alive for more than a second.
            let _ = rustix::net::sockopt::set_socket_timeout(
                &connection.socket,
                rustix::net::sockopt::Timeout::Send,
                limit,
            );
            let _ = rustix::io::ioctl_fionbio(&connection.socket, false);
            let _ = connection.writer.write_to(connection.socket.as_fd());
        }
    }

    /// Waits until the peers have closed their connections, or have had `limit` each for it: after that the machine
    /// goes, and with it what is still on its way.
    pub(super) fn wait_for_peers(&mut self, limit: std::time::Duration) {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        for Connection { socket, .. } in self.open.drain(..) {
            let told = rustix::net::shutdown(&socket, rustix::net::Shutdown::Write);
            if told.is_ok() && set_socket_timeout(&socket, Timeout::Recv, Some(limit)).is_ok() {
                // The end, an error or what the peer still wanted to say: all are an end of waiting.
                let _ = rustix::io::read(&socket, &mut [0; 64]);
            }
        }
    }
}

/// Takes one waiting connection from the listener, if there is one. It does not block.
pub(super) fn accept(listener: BorrowedFd<'_>) -> Option<OwnedFd> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => Some(socket),
        Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
            // The peer still waits, so the loop wakes again at once: not as fast as it can.
            std::thread::sleep(OUT_OF_DESCRIPTORS);
            None
        }
        // Given up again by the peer.
        Err(_) => None,
    }
}

impl Server {
    /// Reads and answers what came on a connection, and sends what waits.
    pub(super) fn connection_ready(&mut self, serial: u32) {
        let Some(connection) = self.connections.get(serial) else { return };
        if connection.waits_to_write {
            connection.flush(&self.poll);
        }
        for _ in 0..RECEIVES {
            let Some(connection) = self.connections.get(serial) else { return };
            match connection.reader.receive_from(connection.socket.as_fd()) {
                Ok(0) => connection.closed = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => connection.closed = true,
            }
            if !self.answer_frames(serial) {
                // Between frames: most often there is nothing more, and the event loop would tell.
                return;
            }
        }
    }

    /// Requests that came together with CreateSandbox.
    pub(super) fn pending_requests(&mut self) {
        let serials: Vec<u32> = self.connections.open.iter().map(|connection| connection.serial).collect();
        for serial in serials {
            self.answer_frames(serial);
        }
    }

    /// Answers every complete frame. True if the connection is in the middle of one.
    fn answer_frames(&mut self, serial: u32) -> bool {
        loop {
            let Some(connection) = self.connections.get(serial) else { return false };
            match connection.reader.next() {
                Ok(Some(frame)) => self.answer(serial, frame),
                Ok(None) => return connection.reader.is_within_frame(),
                Err(error) => {
                    report::line(format_args!("a control connection is closed: {error}"));
                    connection.closed = true;
                    return false;
                }
            }
        }
    }

    fn answer(&mut self, serial: u32, frame: Frame) {
        let Some(Body::Request(request)) = frame.message.body else {
            report::line(format_args!(
                "a control connection is closed: it sent something that is no request"
            ));
            if let Some(connection) = self.connections.get(serial) {
                connection.closed = true;
            }
            return;
        };
        self.call(serial, frame.message.id, request, &frame.fds);
    }
}
