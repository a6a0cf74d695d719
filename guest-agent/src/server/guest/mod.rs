//! The server's part in a guest: connections that say what they are, requests that wait for their streams, and the
//! calls that only a guest knows.

mod archive;
mod birth;
mod calls;
mod relays;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::Server;
use super::failure::CallError;
use super::poll::Source;
use super::report;
use crate::guest::clock::Clock;
use crate::guest::hello::{Greeted, Greeting};
use crate::guest::ranges::Ranges;
use crate::guest::streams::{self, Streams};
use crate::guest::volumes::Volumes;
use crate::guest::{MAX_FRAME, boot};
use crate::protocol::FrameReader;
use crate::protocol::messages::{Request, ResizeTerminal, request::Call};
use archive::Archiving;
use relays::Relay;
pub(super) use relays::pipes_for;

/// Most connections that have not said yet what they are; the oldest gives way.
const MAX_GREETINGS: usize = 64;
/// Most requests that wait for their streams.
const MAX_PARKED: usize = 256;
/// How long the last answer may take to reach its reader before the machine goes.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the agent knows of its machine.
pub(super) struct Machine {
    pub(super) ranges: Ranges,
    volumes: Volumes,
    streams: Streams,
    clock: Clock,
    greetings: Vec<Greeting>,
    parked: Vec<Parked>,
    relays: Vec<Relay>,
    archives: Vec<Archiving>,
}

/// A request that names a stream which has not come yet.
struct Parked {
    connection: u32,
    id: u64,
    request: Request,
    until: Instant,
}

/// The whole life of a machine's first process.
pub(super) fn first_process() -> ! {
    if let Err(error) = live() {
        report::line(format_args!("hull-agent: {error}"));
    }
    boot::end()
}

fn live() -> Result<(), String> {
    let listener = boot::start().map_err(|error| error.to_string())?;
    let born = birth::born(listener).map_err(|error| format!("cannot become a pod: {error}"))?;
    let Some(mut server) = born else { return Ok(()) };
    server.run().map_err(|error| format!("the event loop failed: {error}"))?;
    server.connections.wait_for_peers(LAST_WORDS);
    Ok(())
}

impl Machine {
    fn new(clock: Clock, streams: Streams) -> Self {
        Self {
            ranges: Ranges::default(),
            volumes: Volumes::default(),
            streams,
            clock,
            greetings: Vec::new(),
            parked: Vec::new(),
            relays: Vec::new(),
            archives: Vec::new(),
        }
    }

    /// When something of the machine is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let greetings = self.greetings.iter().map(Greeting::deadline);
        let parked = self.parked.iter().map(|parked| parked.until);
        let others = [self.streams.deadline(), self.clock.deadline(), self.ranges.deadline()];
        greetings.chain(parked).chain(others.into_iter().flatten()).min()
    }
}

impl Server {
    /// A connection has come, and is to say what it is.
    pub(super) fn greet(&mut self, socket: OwnedFd) {
        let serial = self.take_serial();
        let Some(machine) = &mut self.guest else { return };
        if machine.greetings.len() >= MAX_GREETINGS {
            let oldest = machine.greetings.remove(0);
            self.poll.remove(&oldest);
        }
        let greeting = Greeting::new(serial, socket, Instant::now());
        // Without a watch it would stay silent: better closed.
        if self.poll.add(&greeting, Source::Greeting(serial)).is_ok() {
            machine.greetings.push(greeting);
        }
    }

    pub(super) fn greeting_ready(&mut self, serial: u32) {
        let Some(machine) = &mut self.guest else { return };
        let Some(index) = machine.greetings.iter().position(|greeting| greeting.serial == serial) else {
            return;
        };
        let greeted = machine.greetings[index].step();
        if greeted == Greeted::NotYet {
            return;
        }
        let greeting = machine.greetings.swap_remove(index);
        self.poll.remove(&greeting);
        match greeted {
            Greeted::Control => {
                self.connections.add(greeting.into_socket(), FrameReader::with_limit(MAX_FRAME));
                self.arm_new_connections();
            }
            Greeted::Stream(number) => {
                machine.streams.add(number, greeting.into_socket(), Instant::now());
                self.answer_parked();
            }
            Greeted::Gone | Greeted::NotYet => {}
        }
    }

    /// Keeps a request until its streams have come; true if it has to wait.
    fn park(&mut self, connection: u32, id: u64, request: &mut Request) -> bool {
        let Some(machine) = &mut self.guest else { return false };
        if streams_of(request).all(|number| machine.streams.has(number)) {
            return false;
        }
        if machine.parked.len() >= MAX_PARKED {
            let error =
                CallError::precondition(format!("{MAX_PARKED} requests wait for their streams already"));
            self.connections.respond(connection, id, error.into_outcome(), &self.poll);
            return true;
        }
        let request = std::mem::take(request);
        let until = Instant::now() + streams::PATIENCE;
        machine.parked.push(Parked { connection, id, request, until });
        true
    }

    /// Goes on with requests whose streams have come.
    fn answer_parked(&mut self) {
        loop {
            let Some(machine) = &mut self.guest else { return };
            let ready =
                |parked: &Parked| streams_of(&parked.request).all(|number| machine.streams.has(number));
            let Some(index) = machine.parked.iter().position(ready) else { return };
            let Parked { connection, id, request, .. } = machine.parked.remove(index);
            self.call_in_guest(connection, id, request);
        }
    }

    /// Takes back a command that still waits for its streams; false if there is none.
    pub(super) fn stop_parked(&mut self, connection: u32, exec: u64) -> bool {
        let Some(machine) = &mut self.guest else { return false };
        let is_it = |parked: &Parked| {
            parked.connection == connection
                && parked.id == exec
                && matches!(parked.request.call, Some(Call::Exec(_)))
        };
        let Some(index) = machine.parked.iter().position(is_it) else { return false };
        machine.parked.remove(index);
        let error = CallError::precondition("the command was stopped before its streams had come");
        self.connections.respond(connection, exec, error.into_outcome(), &self.poll);
        true
    }

    /// Gives the terminal of a command that still waits for its streams the size that it begins with; false if there is
    /// no such command.
    pub(super) fn resize_parked(&mut self, connection: u32, call: &ResizeTerminal) -> bool {
        let parked = self.guest.iter_mut().flat_map(|machine| machine.parked.iter_mut());
        let mut parked = parked.filter(|one| one.connection == connection && one.id == call.exec_request);
        let exec = parked.next().and_then(|one| match &mut one.request.call {
            Some(Call::Exec(exec)) if exec.container_id == call.container_id => exec.process.as_mut(),
            _ => None,
        });
        let Some(process) = exec.filter(|process| process.terminal) else { return false };
        (process.terminal_rows, process.terminal_columns) = (call.rows, call.columns);
        true
    }

    pub(super) fn check_guest(&mut self, now: Instant) {
        let Some(machine) = &mut self.guest else { return };
        machine.clock.keep(now);
        machine.streams.sweep(now);
        machine.ranges.sweep_at(now);
        for greeting in machine.greetings.extract_if(.., |greeting| greeting.deadline() <= now) {
            self.poll.remove(&greeting);
        }
        for parked in machine.parked.extract_if(.., |parked| parked.until <= now) {
            let error = CallError::precondition("a stream that the request names has not come");
            self.connections.respond(parked.connection, parked.id, error.into_outcome(), &self.poll);
        }
    }
}

fn streams_of(request: &Request) -> impl Iterator<Item = u64> {
    crate::guest::slots::streams(&request.slots)
}
