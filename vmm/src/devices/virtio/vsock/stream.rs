//! One stream between a unix socket of the host and a port of the guest: what it is at, and what its socket does.
//!
//! Data towards the guest stays in the socket until the guest has credit and a buffer for it, and is read straight into
//! that. Data from the guest is written straight from guest memory; only what the socket does not take waits here.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::net::Shutdown;
use vm_memory::VolatileSlice;

use super::credit::{Incoming, Outgoing, Pool};
use super::packet::{NEITHER, NO_RECEIVE, NO_SEND, Op, Ports};
use super::waiting::Waiting;
use crate::devices::virtio::vectored;

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest was asked, or is about to be, and has not answered.
    Connecting,
    /// Data goes both ways, as far as each way is not ended.
    Open,
    /// The host has gone and the guest was told; its reset is awaited, so that nothing of this stream is taken for
    /// another's.
    Closing,
    /// The guest has gone; the host still has to take what the guest had sent.
    Draining,
}

/// Packets without data that the guest must get, each at most once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) request: bool,
    pub(super) response: bool,
    /// New flags, of those in [`Stream::told`].
    pub(super) shutdown: bool,
    pub(super) credit: bool,
    pub(super) ask_credit: bool,
}

impl Due {
    /// Takes the next one, in the order in which they make sense.
    pub(super) fn take(&mut self) -> Option<Op> {
        let all = [
            (&mut self.request, Op::Request),
            (&mut self.response, Op::Response),
            (&mut self.shutdown, Op::Shutdown),
            (&mut self.credit, Op::CreditUpdate),
            (&mut self.ask_credit, Op::CreditRequest),
        ];
        let (flag, op) = all.into_iter().find(|(flag, _)| **flag)?;
        *flag = false;
        // These tell the guest of its credit as well as an update does.
        self.credit = false;
        Some(op)
    }

    pub(super) fn any(self) -> bool {
        self != Self::default()
    }
}

/// What reading the host's side has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    /// So many bytes are in the guest's buffers.
    Bytes(u32),
    /// Nothing now.
    Nothing,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    socket: OwnedFd,
    /// The socket may have something to read, or its end.
    readable: bool,
    /// The host has closed its end altogether.
    hung_up: bool,
    /// Nothing more goes to the guest: the host has ended its side, or the guest will not receive.
    input_ended: bool,
    /// The guest sends no more.
    output_ended: bool,
    /// The host takes no more.
    output_dead: bool,
    waiting: Waiting,
    pub(super) incoming: Incoming,
    pub(super) outgoing: Outgoing,
    pub(super) due: Due,
    /// SHUTDOWN flags that the guest was told, or need not be told any more.
    pub(super) told: u32,
    /// The guest was asked for credit and has not said anything since.
    asked: bool,
    /// It has a place in the round.
    pub(super) queued: bool,
    /// In `Connecting` and `Closing`: when the guest's answer is given up.
    pub(super) deadline: Option<Instant>,
}

impl Stream {
    pub(super) fn new(ports: Ports, phase: Phase, socket: OwnedFd, pool: &mut Pool) -> Self {
        Self {
            ports,
            phase,
            socket,
            readable: true,
            hung_up: false,
            input_ended: false,
            output_ended: false,
            output_dead: false,
            waiting: Waiting::default(),
            incoming: Incoming::open(pool),
            outgoing: Outgoing::default(),
            due: Due::default(),
            told: 0,
            asked: false,
            queued: false,
            deadline: None,
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether the guest knows this stream.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase != Phase::Draining
    }

    /// Nothing more goes either way; what is left of it can go.
    pub(super) fn is_over(&self) -> bool {
        let flushed = self.waiting.is_empty() || self.output_dead;
        match self.phase {
            Phase::Draining => flushed,
            Phase::Open => {
                !self.due.shutdown
                    && self.input_ended
                    && self.told & NO_SEND != 0
                    && self.output_ended
                    && flushed
            }
            Phase::Connecting | Phase::Closing => false,
        }
    }

    /// What may be read for the guest now.
    pub(super) fn readable(&self) -> u32 {
        if self.wants_to_read() { self.outgoing.available() } else { 0 }
    }

    fn wants_to_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.input_ended
    }

    /// Asks the guest for credit if that is what is missing; the guest also tells by itself, so once is enough.
    pub(super) fn ask_if_stuck(&mut self) {
        if self.wants_to_read() && self.outgoing.available() == 0 && !self.asked {
            self.asked = true;
            self.due.ask_credit = true;
        }
    }

    /// A header of the guest's says what it has room for.
    pub(super) fn take_credit(&mut self, buffer: u32, forwarded: u32) {
        self.outgoing.update(buffer, forwarded);
        if self.outgoing.available() > 0 {
            self.asked = false;
        }
    }

    /// Something happened to the socket.
    pub(super) fn wake(&mut self, can_read: bool, can_write: bool, hung_up: bool, pool: &mut Pool) {
        self.readable |= can_read || hung_up;
        self.hung_up |= hung_up;
        if self.hung_up && (self.input_ended || self.phase == Phase::Draining) {
            self.kill_output(pool);
        } else if can_write || hung_up {
            self.flush(pool);
        }
    }

    /// Reads at most `credit` bytes, as [`Stream::readable`] told, into the pieces.
    pub(super) fn read(&mut self, pieces: &[VolatileSlice<'_>], pool: &mut Pool) -> ReadOutcome {
        match vectored::read(self.socket.as_fd(), pieces, &mut []) {
            Ok(count) if count > 0 => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.outgoing.send(count);
                return ReadOutcome::Bytes(count);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => self.readable = false,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted) => {}
            // The end, also by a peer that has gone with data unread.
            _ => self.end_input(pool),
        }
        ReadOutcome::Nothing
    }

    fn end_input(&mut self, pool: &mut Pool) {
        self.input_ended = true;
        if self.hung_up {
            self.kill_output(pool);
        }
        self.tell(NO_SEND);
    }

    /// Data came from the guest, and it had credit for it.
    pub(super) fn write(&mut self, pieces: &[VolatileSlice<'_>], length: u32, pool: &mut Pool) {
        if self.output_dead {
            self.forward(length as usize, pool);
            return;
        }
        let mut written = 0;
        if self.waiting.is_empty() {
            match vectored::send(self.socket.as_fd(), pieces) {
                Ok(count) => written = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.kill_output(pool);
                    self.forward(length as usize, pool);
                    return;
                }
            }
        }
        self.forward(written, pool);
        if written < length as usize {
            let mut rest = pieces.to_vec();
            vectored::skip(&mut rest, written);
            self.waiting.push(&rest, self.incoming.buffer() as usize);
            pool.waiting += length as usize - written;
        }
    }

    /// Writes what waits, as far as the socket takes it.
    fn flush(&mut self, pool: &mut Pool) {
        while !self.waiting.is_empty() {
            match self.waiting.write_to(self.socket.as_fd()) {
                Ok(count) => {
                    pool.waiting -= count;
                    self.forward(count, pool);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.kill_output(pool),
            }
        }
        if self.output_ended {
            self.pass_end_on();
        }
    }

    fn forward(&mut self, count: usize, pool: &mut Pool) {
        // Never more than what was received, which is a u32.
        if count > 0 && self.incoming.forward(count as u32, pool) {
            self.due.credit = true;
        }
    }

    /// The host takes no more: the guest is told, and what waits is as good as taken.
    fn kill_output(&mut self, pool: &mut Pool) {
        self.output_dead = true;
        let dropped = self.waiting.clear();
        pool.waiting -= dropped;
        self.forward(dropped, pool);
        self.tell(NO_RECEIVE);
    }

    /// The guest said with SHUTDOWN which ways have ended for it.
    pub(super) fn guest_ends(&mut self, flags: u32) {
        if flags & NO_RECEIVE != 0 && !self.input_ended {
            self.input_ended = true;
            self.told |= NO_SEND;
            self.due.ask_credit = false;
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
        if flags & NO_SEND != 0 && !self.output_ended {
            self.output_ended = true;
            self.told |= NO_RECEIVE;
            if self.waiting.is_empty() {
                self.pass_end_on();
            }
        }
    }

    /// Whether the guest has ended both ways.
    pub(super) fn has_guest_gone(&self, flags: u32) -> bool {
        flags & NEITHER == NEITHER || (self.output_ended && flags & NO_RECEIVE != 0)
    }

    /// The guest has forgotten the stream.
    pub(super) fn guest_is_gone(&mut self) {
        self.guest_ends(NEITHER);
        self.phase = Phase::Draining;
        self.due = Due::default();
        self.deadline = None;
    }

    /// Whether the guest may still send data.
    pub(super) fn may_send(&self) -> bool {
        !self.output_ended
    }

    /// Whether both ways have ended on the host's side and the guest was told.
    pub(super) fn has_host_gone(&self) -> bool {
        self.phase == Phase::Open && self.input_ended && self.output_dead && self.told & NEITHER == NEITHER
    }

    fn pass_end_on(&mut self) {
        // Fails only if the host has gone before.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    fn tell(&mut self, flag: u32) {
        if self.told & flag == 0 {
            self.told |= flag;
            self.due.shutdown = true;
        }
    }

    /// What the stream held of the pool goes back.
    pub(super) fn close(&mut self, pool: &mut Pool) {
        pool.waiting -= self.waiting.clear();
        self.incoming.close(pool);
    }
}
