//! Streams that the agent joins with pipes of an exec or with a port of the pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::Server;
use super::super::poll::{Poll, Source};
use crate::container::ChildStdio;
use crate::stdio::{Flow, OneWay};

/// How long a connection within the machine may take: one that does not come at once waits for a listener that does
/// not accept.
const CONNECT: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Directions that come and go together for the event loop.
#[derive(Debug)]
pub(super) struct Relay {
    serial: u32,
    ways: Vec<OneWay>,
    /// Both directions of one conversation: when one side is gone for good the other direction has no sense either.
    is_conversation: bool,
}

impl Relay {
    /// Moves what can be moved and asks to be woken for what can happen next. True once nothing can.
    fn step(&mut self, poll: &Poll, chunk: &mut [u8]) -> bool {
        let source = Source::Relay(self.serial);
        let arm = |fd: &dyn std::os::fd::AsFd, flags: EventFlags| {
            let (fd, flags) = (fd.as_fd(), flags | EventFlags::ONESHOT);
            if poll.change(&fd, source, flags).is_err() {
                // Not in the set yet.
                let _ = poll.add_for(&fd, source, flags);
            }
        };
        self.ways.retain_mut(|way| match way.step(chunk) {
            Flow::Wanted => {
                arm(&way.from(), EventFlags::IN);
                true
            }
            Flow::Stuck => {
                arm(&way.to(), EventFlags::OUT);
                true
            }
            Flow::Ended => false,
        });
        if self.is_conversation && self.ways.len() == 1 && self.ways.iter().any(has_gone) {
            self.ways.clear();
        }
        self.ways.is_empty()
    }
}

/// Whether the receiver has hung up both ways, although nothing was sent to it that would have told.
fn has_gone(way: &OneWay) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let to = way.to();
    let mut look = [PollFd::new(&to, PollFlags::empty())];
    rustix::event::poll(&mut look, Some(&now)).is_ok()
        && look[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

impl Server {
    /// Joins the two ends of a conversation, each direction until its end.
    pub(super) fn join(&mut self, connection: OwnedFd, stream: OwnedFd) -> io::Result<()> {
        let (other, back) = (connection.try_clone()?, stream.try_clone()?);
        self.keep(vec![OneWay::new(stream, connection)?, OneWay::new(other, back)?], true);
        Ok(())
    }

    /// Moves bytes for a process in a container, each direction until its end.
    pub(in super::super) fn relay(&mut self, ways: Vec<OneWay>) {
        if !ways.is_empty() {
            self.keep(ways, false);
        }
    }

    fn keep(&mut self, ways: Vec<OneWay>, is_conversation: bool) {
        let serial = self.take_serial();
        let Some(machine) = &mut self.guest else { return };
        machine.relays.push(Relay { serial, ways, is_conversation });
        self.relay_ready(serial);
    }

    pub(in super::super) fn relay_ready(&mut self, serial: u32) {
        let Some(machine) = &mut self.guest else { return };
        let Some(index) = machine.relays.iter().position(|relay| relay.serial == serial) else { return };
        let buffers = self.buffers.get_or_insert_default();
        self.buffers_used = Instant::now();
        if machine.relays[index].step(&self.poll, buffers.chunk()) {
            machine.relays.swap_remove(index);
        }
    }
}

/// Pipes for a process in the place of the streams that its caller gave (a program may open /dev/stdout again, which
/// no socket allows), and what moves the bytes between them.
pub(in super::super) fn pipes_for(streams: ChildStdio) -> io::Result<(ChildStdio, Vec<OneWay>)> {
    let mut child = ChildStdio::default();
    let mut ways = Vec::new();
    if let Some(stream) = streams.stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        ways.push(OneWay::new(stream, write)?);
        child.stdin = Some(read);
    }
    for (stream, end) in [(streams.stdout, &mut child.stdout), (streams.stderr, &mut child.stderr)] {
        let Some(stream) = stream else { continue };
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        ways.push(OneWay::new(read, stream)?);
        *end = Some(write);
    }
    Ok((child, ways))
}

/// A connection to a port of this machine's loopback.
pub(super) fn connect(port: u16) -> io::Result<OwnedFd> {
    match connect_to(IpAddr::V4(Ipv4Addr::LOCALHOST), port) {
        // A server that listens on IPv6 only.
        Err(first) => connect_to(IpAddr::V6(Ipv6Addr::LOCALHOST), port).map_err(|_| first),
        connected => connected,
    }
}

fn connect_to(address: IpAddr, port: u16) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddr::new(address, port)) {
        Err(Errno::INPROGRESS) => {
            let mut look = [PollFd::new(&socket, PollFlags::OUT)];
            if rustix::event::poll(&mut look, Some(&CONNECT))? == 0 {
                return Err(Errno::TIMEDOUT.into());
            }
            sockopt::socket_error(&socket)??;
        }
        other => other?,
    }
    // Whoever forwards a port types or asks and waits for the answer.
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}
