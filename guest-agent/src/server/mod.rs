//! The agent's life: born with a socket, one event loop, no threads.

mod attach;
mod birth;
mod calls;
mod connection;
mod container;
mod end;
mod ending;
mod exec;
mod failure;
mod guest;
mod leaves;
mod limits;
mod output;
mod pod;
mod poll;
mod report;
mod start;
mod stop;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hull_sys::signal::ChildSignal;

use connection::Connections;
use container::Container;
use exec::ExecProcess;
use guest::Machine;
use leaves::Expected;
use pod::Pod;
use poll::{Poll, Source};
use stop::Stopping;

use crate::protocol::FrameReader;
use crate::protocol::messages::Event;
use crate::stdio::Buffers;

/// How long the buffers for output stay after the last output.
const BUFFERS_IDLE: Duration = Duration::from_secs(2);
/// How often an agent that nobody is connected to looks whether its pod still has a record.
const ORPHAN_CHECK: Duration = Duration::from_secs(10);

const SIGKILL: i32 = rustix::process::Signal::KILL.as_raw();

/// The program: `hull-agent` on the host, or as the first process of a guest. Ends with the pod.
pub fn main() -> ExitCode {
    // Nothing comes before: the VMM measures how long the machine took to come here.
    crate::guest::boot::tell_start();
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        use std::io::Write;
        // Whoever asked and does not read the answer has gone.
        let _ = writeln!(io::stdout(), "hull-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if crate::guest::boot::is_first_process() {
        guest::first_process();
    }
    match birth::born() {
        Ok(Some(mut server)) => match server.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                report::line(format_args!("the event loop failed, the pod ends: {error}"));
                server.begin_stop(None);
                ExitCode::FAILURE
            }
        },
        Ok(None) => ExitCode::FAILURE,
        Err(error) => {
            report::line(format_args!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Everything the agent knows.
struct Server {
    poll: Poll,
    children: ChildSignal,
    listener: OwnedFd,
    connections: Connections,
    pod: Pod,
    containers: Vec<Container>,
    execs: Vec<ExecProcess>,
    /// Containers that have been created.
    expected: Vec<Expected>,
    /// The next number of a container or an exec, by which the event loop knows it.
    next_serial: u32,
    buffers: Option<Buffers>,
    buffers_used: Instant,
    orphan_check: Instant,
    stopping: Option<Stopping>,
    /// Kills for memory in the whole pod, as counted when one was last told of.
    oom_kills_told: u64,
    /// What an agent has that is the first process of a guest.
    guest: Option<Box<Machine>>,
}

impl Server {
    /// Runs until the pod has been stopped.
    fn run(&mut self) -> io::Result<()> {
        self.poll.add(&self.children, Source::Children)?;
        self.poll.add(&self.listener, Source::Listener)?;
        self.arm_new_connections();
        // Children may have ended, and requests may have come, before anything was watched.
        self.children_ended();
        self.pending_requests();
        loop {
            if self.stop_is_complete() {
                return Ok(());
            }
            let sources = self.poll.wait(self.next_deadline())?;
            // Requests first: an Attach that came while its container was being started must not miss the first output.
            let (requests, rest): (Vec<_>, Vec<_>) =
                sources.iter().partition(|source| matches!(source, Source::Connection(_)));
            for source in requests.into_iter().chain(rest) {
                self.handle(source);
            }
            self.check_deadlines(Instant::now());
            self.sweep_connections();
        }
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Children => {
                self.children.take();
                self.children_ended();
            }
            Source::Listener => self.accept(),
            Source::Connection(serial) => self.connection_ready(serial),
            Source::Output(serial, stream) => self.output_ready(serial, stream),
            Source::Oom(serial) => self.oom_event(serial),
            Source::Exec(serial) => self.exec_terminal_ready(serial),
            Source::Input(serial) => self.input_ready(serial),
            Source::Greeting(serial) => self.greeting_ready(serial),
            Source::Relay(serial) => self.relay_ready(serial),
        }
    }

    /// When the loop must wake although nothing happens.
    fn next_deadline(&self) -> Option<Instant> {
        let containers = self.containers.iter().filter_map(Container::deadline);
        let execs = self.execs.iter().filter_map(ExecProcess::deadline);
        let buffers = self.buffers.as_ref().map(|_| self.buffers_used + BUFFERS_IDLE);
        let orphan = self.connections.is_empty().then_some(self.orphan_check);
        let stopping = self.stopping.as_ref().map(Stopping::deadline);
        let guest = self.guest.as_ref().and_then(|machine| machine.deadline());
        containers.chain(execs).chain(buffers).chain(orphan).chain(stopping).chain(guest).min()
    }

    fn check_deadlines(&mut self, now: Instant) {
        self.check_execs(now);
        self.release_held_outputs(now);
        self.report_overdue_ends(now);
        self.look_again_for_oom(now);
        self.check_guest(now);
        if self.buffers.is_some() && now >= self.buffers_used + BUFFERS_IDLE {
            self.buffers = None;
            hull_sys::memory::give_back();
        }
        if !self.connections.is_empty() {
            self.orphan_check = now + ORPHAN_CHECK;
        } else if now >= self.orphan_check {
            self.orphan_check = now + ORPHAN_CHECK;
            if self.pod.is_forgotten() && self.stopping.is_none() {
                report::line(format_args!("the pod's state directory is gone, so the pod ends"));
                self.begin_stop(None);
            }
        }
        self.continue_stop(now);
    }

    /// Sends an event to the newest connection; the records and `State` tell those who are not connected.
    fn send_event(&mut self, event: Event) {
        self.connections.send_event(event, &self.poll);
    }

    fn accept(&mut self) {
        let Some(socket) = connection::accept(self.listener.as_fd()) else { return };
        if self.guest.is_some() {
            return self.greet(socket);
        }
        self.connections.add(socket, FrameReader::new());
        self.arm_new_connections();
    }

    fn arm_new_connections(&mut self) {
        self.connections.arm(&self.poll);
    }

    fn sweep_connections(&mut self) {
        self.connections.sweep();
    }

    const fn take_serial(&mut self) -> u32 {
        self.next_serial = self.next_serial.wrapping_add(1);
        self.next_serial
    }
}
