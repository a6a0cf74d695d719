//! Exec: another process in a running container. The answer comes when it has ended.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_sys::process::{self, Ended};
use rustix::event::epoll::EventFlags;

use super::Server;
use super::container::Container;
use super::ending::is_ending;
use super::failure::CallError;
use super::guest::pipes_for;
use super::poll::{Poll, Source};
use crate::container::{ChildStdio, LaunchError, RunningContainer, Slots, exec};
use crate::protocol::messages::{Exec, ExecEnded, response::Outcome};
use crate::stdio::TerminalRelay;

/// Most execs at a time in a pod.
const MAX_EXECS: usize = 1024;
/// Of so many the agent keeps descriptors for speed alone.
const HELD: usize = 32;

/// How long an answer waits for a terminal that other processes hold open.
const LINGER: Duration = Duration::from_millis(250);
/// How long it waits for a caller who does not read what the terminal showed.
const READER_PATIENCE: Duration = Duration::from_secs(10);

/// A process that somebody waits for.
pub(super) struct ExecProcess {
    serial: u32,
    /// Who waits: connection and number of the request.
    connection: u32,
    request: u64,
    container: u32,
    life: Life,
    timed_out: bool,
    relay: Option<TerminalRelay>,
    /// Copies of the ends that it writes to, which close after it. Its own close while it exits: whoever reads them would
    /// be woken then, on its processor, and it would have to wait before it can be waited for.
    _held: [Option<OwnedFd>; 2],
}

/// Where an exec is in its life.
enum Life {
    Running {
        pid: i32,
        pidfd: OwnedFd,
        kill_at: Option<Instant>,
    },
    /// The process has ended; what its terminal showed is still on its way.
    Showing {
        ended: Ended,
        look_at: Instant,
        give_up: Instant,
    },
}

impl ExecProcess {
    pub(super) const fn deadline(&self) -> Option<Instant> {
        match self.life {
            Life::Running { kill_at, .. } => kill_at,
            Life::Showing { look_at, .. } => Some(look_at),
        }
    }

    /// The process, while it has not been waited for.
    pub(super) fn running(&self) -> Option<(i32, BorrowedFd<'_>)> {
        match &self.life {
            Life::Running { pid, pidfd, .. } => Some((*pid, pidfd.as_fd())),
            Life::Showing { .. } => None,
        }
    }

    /// Kills the process, and its children as far as they stayed in its group: they may hold the caller's pipes open.
    fn kill(&self) {
        if let Some((pid, pidfd)) = self.running() {
            // Neither can hit another process: the child was not waited for yet.
            let _ = process::kill_group_of(pid);
            let _ = process::pidfd_send_signal(pidfd, super::SIGKILL);
        }
    }
}

impl Server {
    /// Starts the process; the answer comes from [`Self::exec_ended`].
    pub(super) fn start_exec(
        &mut self,
        connection: u32,
        request: u64,
        call: &Exec,
        slots: &Slots<'_>,
    ) -> Result<(), CallError> {
        let context = || format!("cannot run a process in container {}", call.container_id);
        if self.execs.len() >= MAX_EXECS {
            return Err(
                CallError::precondition(format!("{MAX_EXECS} processes run already")).during(context())
            );
        }
        let container = self.container(&call.container_id).map_err(|error| error.during(context()))?;
        let (pidfd, own) =
            container.running().ok_or_else(|| CallError::not_running(&container.id).during(context()))?;
        let wanted = call
            .process
            .as_ref()
            .ok_or_else(|| CallError::invalid("there is no process").during(context()))?;
        let end = |slot: Option<u32>, what| slot.map(|slot| own_end(slots, slot, what)).transpose();
        let stdio = ChildStdio {
            stdin: end(call.stdin, "stdin")?,
            stdout: end(call.stdout, "stdout")?,
            stderr: end(call.stderr, "stderr")?,
        };
        let running = RunningContainer {
            pid: container.started.pid,
            pidfd,
            cgroup: &container.leaf,
            process: own,
            private_cgroup_namespace: container.private_cgroup_namespace,
            rdt_tasks: container.rdt_tasks.as_ref().map(AsFd::as_fd),
            user_namespace: self.pod.facts.user_namespace.as_deref(),
        };
        let serial_of_container = container.serial;
        // With a terminal the process gets that, and the caller's ends are fed through the agent.
        let (given, ends) =
            if wanted.terminal { (ChildStdio::default(), stdio) } else { (stdio, ChildStdio::default()) };
        let (given, ways) = if self.guest.is_some() {
            pipes_for(given).map_err(|error| CallError::system(context(), error))?
        } else {
            (given, Vec::new())
        };
        // In a guest it is the agent itself that reads them.
        let holds = call.output_at_end && self.guest.is_none() && self.execs.len() < HELD;
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().filter(|_| holds).and_then(|fd| fd.try_clone().ok());
        let held = [copy(&given.stdout), copy(&given.stderr)];
        let launched = exec(&running, wanted, call.inherit, given)
            .map_err(|error| refusal(error, container).during(context()))?;
        self.relay(ways);
        let serial = self.take_serial();
        let relay =
            launched.terminal.and_then(|terminal| TerminalRelay::new(terminal, ends.stdin, ends.stdout).ok());
        let timeout = Some(call.timeout_ms).filter(|timeout| *timeout > 0).map(Duration::from_millis);
        self.execs.push(ExecProcess {
            serial,
            connection,
            request,
            container: serial_of_container,
            life: Life::Running {
                pid: launched.pid,
                pidfd: launched.pidfd,
                kill_at: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            },
            timed_out: false,
            relay,
            _held: held,
        });
        self.exec_terminal_ready(serial);
        Ok(())
    }

    /// Passes on what a terminal shows and what its user typed.
    pub(super) fn exec_terminal_ready(&mut self, serial: u32) {
        let Some(index) = self.execs.iter().position(|exec| exec.serial == serial) else { return };
        let exec = &mut self.execs[index];
        let Some(relay) = &mut exec.relay else { return };
        step(relay, &self.poll, Source::Exec(serial));
        if relay.is_finished() && matches!(exec.life, Life::Showing { .. }) {
            self.answer_exec(index);
        }
    }

    /// Kills what has run longer than it was given, and answers where a terminal is not going to end.
    pub(super) fn check_execs(&mut self, now: Instant) {
        for index in (0..self.execs.len()).rev() {
            let exec = &mut self.execs[index];
            if exec.deadline().is_none_or(|when| when > now) {
                continue;
            }
            match &mut exec.life {
                Life::Running { kill_at, .. } => {
                    *kill_at = None;
                    exec.timed_out = true;
                    exec.kill();
                }
                Life::Showing { look_at, give_up, .. } => {
                    let slow = exec.relay.as_ref().is_some_and(TerminalRelay::waits_for_reader);
                    if slow && now < *give_up {
                        *look_at = now + LINGER;
                    } else {
                        self.answer_exec(index);
                    }
                }
            }
        }
    }

    /// Kills the exec that this request started; one that has ended needs nothing.
    pub(super) fn stop_exec(&self, connection: u32, request: u64) {
        let is_it = |exec: &&ExecProcess| exec.connection == connection && exec.request == request;
        if let Some(exec) = self.execs.iter().find(is_it) {
            exec.kill();
        }
    }

    /// An exec's process has ended: answers, once all that its terminal showed is passed on.
    pub(super) fn exec_ended(&mut self, index: usize, ended: Ended) {
        let now = Instant::now();
        let exec = &mut self.execs[index];
        exec.life = Life::Showing { ended, look_at: now + LINGER, give_up: now + READER_PATIENCE };
        let serial = exec.serial;
        if exec.relay.is_some() { self.exec_terminal_ready(serial) } else { self.answer_exec(index) }
    }

    fn answer_exec(&mut self, index: usize) {
        // The caller's ends are closed before it hears of the end.
        let ExecProcess { connection, request, life, timed_out, .. } = self.execs.swap_remove(index);
        if let Life::Showing { ended, .. } = life {
            let answer = ExecEnded { exit_code: ended.exit_code(), timed_out };
            self.connections.respond(connection, request, Outcome::ExecEnded(answer), &self.poll);
        }
    }

    /// The terminal of the exec that this request of this container started.
    pub(super) fn exec_terminal(
        &self,
        container: u32,
        connection: u32,
        request: u64,
    ) -> Option<&TerminalRelay> {
        let exec = self.execs.iter().find(|exec| {
            exec.container == container && exec.connection == connection && exec.request == request
        })?;
        exec.relay.as_ref()
    }
}

/// Why no process could be started in the container. One that ends meanwhile fails a step or another of it, whichever
/// comes first; what the request itself does wrong is told in any case.
fn refusal(error: LaunchError, container: &Container) -> CallError {
    if !error.is_invalid_request() && is_ending(container.started.pid) {
        return CallError::not_running(&container.id);
    }
    error.into()
}

/// The caller's end in a slot, to keep.
pub(super) fn own_end(slots: &Slots<'_>, slot: u32, what: &str) -> Result<OwnedFd, CallError> {
    let fd = slots.get(slot).ok_or_else(|| CallError::no_slot(what, slot))?;
    fd.try_clone_to_owned()
        .map_err(|error| CallError::system(format_args!("cannot keep the process's {what}"), error))
}

/// Moves bytes and asks to be woken, once, for what can happen next. Descriptors that nothing is expected of stay
/// disarmed, so that a hang-up on one of them does not wake the loop over and over.
fn step(relay: &mut TerminalRelay, poll: &Poll, source: Source) {
    let interest = relay.step();
    let mut terminal = EventFlags::empty();
    terminal.set(EventFlags::IN, interest.terminal_read);
    terminal.set(EventFlags::OUT, interest.terminal_write);
    let input = if interest.input_read { EventFlags::IN } else { EventFlags::empty() };
    let output = if interest.output_write { EventFlags::OUT } else { EventFlags::empty() };
    let ends = [(Some(relay.terminal()), terminal), (relay.input(), input), (relay.output(), output)];
    for (fd, flags) in ends {
        let Some(fd) = fd.filter(|_| !flags.is_empty()) else { continue };
        let flags = flags | EventFlags::ONESHOT;
        if poll.change(&fd, source, flags).is_err() {
            // Not in the set yet. A regular file cannot be, and need not: it is always ready.
            let _ = poll.add_for(&fd, source, flags);
        }
    }
}
