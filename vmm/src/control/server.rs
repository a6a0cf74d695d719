use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::calls;
use super::connection::Connection;
use super::events::{EventReceiver, Message as Told};
use super::machine::Machine;
use crate::jail::{self, Birth, ThreadKind};
use crate::protocol::messages::{self, Message, event::Kind, message::Body};
use crate::protocol::{Descriptors, Frame};

/// Most connections at a time; the oldest gives way.
const MAX_CONNECTIONS: usize = 16;
/// Most receives for one wake-up, so that a talkative peer leaves time for the rest.
const RECEIVES: usize = 64;
/// Pause when a connection cannot be taken for want of descriptors or memory: the peer still waits, so the loop would
/// wake again at once.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(20);

const LISTENER: u64 = 0;
const EVENTS: u64 = 1;
/// Connections are numbered from here.
const FIRST_CONNECTION: u32 = 2;

/// How serving ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// hulld asked for it.
    Stopped,
    /// The machine ended by itself, for this reason.
    Ended(String),
}

/// Answers Boot, then serves control requests until the machine ends or is told to. On the main thread, when every other
/// thread has been started and the vCPUs are about to run: it confines itself first.
///
/// # Errors
/// The thread cannot be confined (hulld has been told), or the loop cannot wait for anything. The process must end.
pub fn serve<M: Machine>(
    machine: &mut M,
    birth: Birth,
    listener: OwnedFd,
    events: EventReceiver,
    begin: impl FnOnce(&mut M) -> io::Result<()>,
) -> io::Result<End> {
    let prepared = Server::new(machine, listener, events).and_then(|server| {
        jail::confine(ThreadKind::Control)?;
        begin(server.machine)?;
        Ok(server)
    });
    let mut server = match prepared {
        Ok(server) => server,
        Err(error) => {
            birth.failed(&format!("cannot begin to run the machine: {error}"));
            return Err(error);
        }
    };
    let (socket, reader, sent) = birth.ready();
    if sent.is_ok() {
        let serial = server.next_serial();
        server.add(Connection::new(serial, socket, reader))?;
        // Requests may have come together with Boot.
        server.frames(serial);
    }
    server.run()
}

pub(super) struct Server<'a, M> {
    machine: &'a mut M,
    epoll: Epoll,
    listener: OwnedFd,
    events: EventReceiver,
    connections: Vec<Connection>,
    last_serial: u32,
    end: Option<End>,
}

impl<'a, M: Machine> Server<'a, M> {
    pub(super) fn new(machine: &'a mut M, listener: OwnedFd, events: EventReceiver) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let epoll = Epoll::new()?;
        let watch = |fd, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data));
        watch(listener.as_raw_fd(), LISTENER)?;
        watch(events.wake.as_raw_fd(), EVENTS)?;
        let (connections, last_serial) = (Vec::new(), FIRST_CONNECTION);
        Ok(Self { machine, epoll, listener, events, connections, last_serial, end: None })
    }

    pub(super) fn run(&mut self) -> io::Result<End> {
        let mut ready = [EpollEvent::default(); 8];
        loop {
            if let Some(end) = self.end.take() {
                self.connections.iter_mut().for_each(Connection::finish);
                return Ok(end);
            }
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in ready.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept(),
                    EVENTS => self.take_events(),
                    serial => self.ready(serial as u32),
                }
            }
        }
    }

    pub(super) fn next_serial(&mut self) -> u32 {
        // Two thousand million connections would take longer than any pod lives.
        self.last_serial = self.last_serial.wrapping_add(1).max(FIRST_CONNECTION);
        self.last_serial
    }

    fn accept(&mut self) {
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                let connection = Connection::accepted(self.next_serial(), socket);
                if let Err(error) = self.add(connection) {
                    report(&error);
                }
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                std::thread::sleep(OUT_OF_DESCRIPTORS);
            }
            // Given up again by the peer.
            Err(_) => {}
        }
    }

    pub(super) fn add(&mut self, connection: io::Result<Connection>) -> io::Result<()> {
        let connection = connection?;
        if self.connections.len() >= MAX_CONNECTIONS {
            // Closing it takes it out of the epoll as well.
            self.connections.remove(0);
        }
        let event = EpollEvent::new(EventSet::IN, u64::from(connection.serial));
        self.epoll.ctl(ControlOperation::Add, connection.as_raw_fd(), event)?;
        self.connections.push(connection);
        Ok(())
    }

    fn get(&mut self, serial: u32) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|connection| connection.serial == serial)
    }

    fn close(&mut self, serial: u32, why: &io::Error) {
        if why.kind() != io::ErrorKind::UnexpectedEof {
            report(why);
        }
        self.connections.retain(|connection| connection.serial != serial);
    }

    /// Reads and answers what came on a connection, and sends what waits.
    fn ready(&mut self, serial: u32) {
        for _ in 0..RECEIVES {
            let Some(connection) = self.get(serial) else { return };
            let received = if connection.waits_to_write { connection.flush() } else { Ok(()) }
                .and_then(|()| connection.receive());
            match received {
                Ok(true) => self.frames(serial),
                Ok(false) => break,
                Err(error) => return self.close(serial, &error),
            }
        }
        self.rearm(serial);
    }

    /// Waits for a slow peer to become writable, or no longer.
    fn rearm(&mut self, serial: u32) {
        let Some(connection) = self.get(serial) else { return };
        let interest = if connection.waits_to_write { EventSet::IN | EventSet::OUT } else { EventSet::IN };
        let (fd, event) = (connection.as_raw_fd(), EpollEvent::new(interest, u64::from(serial)));
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            self.close(serial, &error);
        }
    }

    /// Answers every whole frame of a connection.
    fn frames(&mut self, serial: u32) {
        while self.end.is_none() {
            let Some(connection) = self.get(serial) else { return };
            let answered = match connection.next() {
                Ok(Some(frame)) => self.answer(serial, frame),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = answered {
                return self.close(serial, &error);
            }
        }
    }

    fn answer(&mut self, serial: u32, frame: Frame) -> io::Result<()> {
        let Some(Body::Request(request)) = frame.message.body else {
            return Err(io::Error::other("it sent something that is no request"));
        };
        let answer = calls::call(self.machine, request.call, &mut Descriptors::new(frame.fds));
        if answer.stop {
            self.end = Some(End::Stopped);
        }
        match self.get(serial) {
            Some(connection) => connection.send(&Message::response(frame.message.id, answer.outcome)),
            None => Ok(()),
        }
    }

    fn take_events(&mut self) {
        let _ = self.events.wake.read();
        while let Ok(told) = self.events.queue.try_recv() {
            match told {
                Told::Event(event) => self.send_event(event),
                Told::Ended(reason) => {
                    self.send_event(Kind::ShutDown(messages::ShutDown { reason: reason.clone() }));
                    self.end = Some(End::Ended(reason));
                    return;
                }
            }
        }
    }

    /// To the newest connection.
    fn send_event(&mut self, event: Kind) {
        let Some(newest) = self.connections.last_mut() else { return };
        let serial = newest.serial;
        match newest.send(&Message::event(event)) {
            Ok(()) => self.rearm(serial),
            Err(error) => self.close(serial, &error),
        }
    }
}

/// Standard error is the VMM's log.
fn report(error: &io::Error) {
    eprintln!("a control connection is closed: {error}");
}
