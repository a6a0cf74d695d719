//! What the agent knows of one container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_sys::process::Ended;

use super::Server;
use super::attach::AttachedInput;
use super::failure::CallError;
use super::report;
use crate::cgroup::{Leaf, OomWatch};
use crate::guest::slots::Holdings;
use crate::protocol::is_valid_id;
use crate::protocol::messages::{ContainerStarted, ContainerState, Event, ExitRecord, Process, event};
use crate::stdio::{Buffers, LogFile, OutputStream, Progress, Stream};

/// v1 tells that memory ran out a moment before the kill is counted: looks after that, and the time between them.
const OOM_LOOKS: u32 = 5;
const OOM_LOOK_AFTER: Duration = Duration::from_millis(50);

/// Most groups of one container in a report: with [`MAX_CONTAINERS`] of them it stays below the 1 MiB that hulld reads,
/// whatever an image's /etc/group says.
const MAX_STATE_GROUPS: usize = 128;
/// Most containers that are known at a time.
const MAX_CONTAINERS: usize = 1000;

/// A container from its start until it is forgotten.
pub(super) struct Container {
    pub(super) serial: u32,
    pub(super) id: String,
    pub(super) leaf: Leaf,
    pub(super) leaf_name: String,
    /// The first process died with everything in its own PID namespace; in a shared one others may go on.
    pub(super) own_pid_namespace: bool,
    pub(super) private_cgroup_namespace: bool,
    /// Takes its processes into their class of cache and memory bandwidth.
    pub(super) rdt_tasks: Option<OwnedFd>,
    /// What the caller was told at the start.
    pub(super) started: ContainerStarted,
    pub(super) log: LogFile,
    pub(super) stdout: Option<OutputStream>,
    pub(super) stderr: Option<OutputStream>,
    /// Its standard output is a terminal.
    pub(super) is_terminal: bool,
    /// The writing end of its stdin, held open for whoever attaches.
    pub(super) stdin: Option<OwnedFd>,
    /// The end of the first attached caller's input closes stdin.
    pub(super) stdin_once: bool,
    pub(super) inputs: Vec<AttachedInput>,
    pub(super) oom: Option<OomState>,
    /// The kernel has killed one of its processes for memory.
    pub(super) oom_killed: bool,
    pub(super) phase: Phase,
    /// What it holds of a guest's disks and files.
    pub(super) holdings: Holdings,
}

/// Where a container is in its life.
pub(super) enum Phase {
    /// The first process lives.
    Running {
        pidfd: OwnedFd,
        /// For execs that take over the container's own attributes.
        process: Box<Process>,
    },
    /// It has ended, and output of it may still be on its way.
    Ending { ended: Ended, finished_at: i64, deadline: Instant, give_up: Instant },
    /// The record is written and was reported.
    Ended(ExitRecord),
}

/// The watch for OOM kills.
pub(super) struct OomState {
    pub(super) watch: OomWatch,
    kills: u64,
    look_again: Option<(Instant, u32)>,
}

impl OomState {
    pub(super) const fn new(watch: OomWatch) -> Self {
        Self { watch, kills: 0, look_again: None }
    }

    /// Kills that were told of.
    pub(super) const fn kills(&self) -> u64 {
        self.kills
    }

    /// True if the kernel has killed since the last look.
    fn has_grown(&mut self) -> bool {
        let kills = self.watch.acknowledge().unwrap_or(self.kills);
        let grown = kills > self.kills;
        self.kills = kills.max(self.kills);
        grown
    }
}

impl Container {
    /// The first process, if it lives.
    pub(super) fn running(&self) -> Option<(BorrowedFd<'_>, &Process)> {
        match &self.phase {
            Phase::Running { pidfd, process } => Some((pidfd.as_fd(), process)),
            _ => None,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    pub(super) fn state(&self) -> ContainerState {
        let exit = if let Phase::Ended(record) = &self.phase { Some(record.clone()) } else { None };
        let ContainerStarted { pid, uid, gid, ref groups, started_at, .. } = self.started;
        let groups = groups.iter().copied().take(MAX_STATE_GROUPS).collect();
        ContainerState { id: self.id.clone(), pid, started_at, exit, uid, gid, groups }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let ending = if let Phase::Ending { deadline, .. } = &self.phase { Some(*deadline) } else { None };
        let oom = self.oom.as_ref().and_then(|oom| oom.look_again).map(|(when, _)| when);
        ending
            .into_iter()
            .chain(oom)
            .chain(self.held_until(Stream::Stdout))
            .chain(self.held_until(Stream::Stderr))
            .min()
    }

    /// Until when one of its outputs waits for somebody attached, if it does.
    fn held_until(&self, stream: Stream) -> Option<Instant> {
        let output = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        output.as_ref().and_then(OutputStream::deadline)
    }

    /// Closes what only a container with output or input needs, once it has ended and nobody writes any more.
    pub(super) fn close_idle(&mut self) {
        if self.has_ended() && self.stdout.is_none() && self.stderr.is_none() {
            self.log.close();
            self.stdin = None;
            self.inputs = Vec::new();
        }
    }

    /// Nobody is attached any more.
    pub(super) fn detach_all(&mut self) {
        self.inputs = Vec::new();
        for stream in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            stream.forget_taps();
        }
    }

    /// The terminal's primary end, until its last user has gone.
    pub(super) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.stdout.as_ref().filter(|_| self.is_terminal).map(AsFd::as_fd)
    }

    pub(super) fn stream(&mut self, stream: Stream) -> &mut Option<OutputStream> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// Logs all output there is now. True if no more can come.
    pub(super) fn drain(&mut self, buffers: &mut Buffers) -> bool {
        for output in [&mut self.stdout, &mut self.stderr] {
            if let Some(stream) = output
                && stream.drain(&mut self.log, buffers) == Progress::Ended
            {
                *output = None;
            }
        }
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Logs the beginnings of lines that are under way, as they are.
    pub(super) fn flush(&mut self, buffers: &mut Buffers) {
        for stream in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            stream.flush(&mut self.log, buffers);
        }
    }
}

impl Server {
    /// The container with this id.
    pub(super) fn container(&self, id: &str) -> Result<&Container, CallError> {
        self.containers.iter().find(|container| container.id == id).ok_or_else(|| CallError::no_container(id))
    }

    /// The container with this id, to change it.
    pub(super) fn container_mut(&mut self, id: &str) -> Result<&mut Container, CallError> {
        self.containers
            .iter_mut()
            .find(|container| container.id == id)
            .ok_or_else(|| CallError::no_container(id))
    }

    /// Refuses an id that is none, or is taken, and a cgroup that belongs to somebody else in the pod.
    pub(super) fn check_new(&self, id: &str, leaf: &str) -> Result<(), CallError> {
        if !is_valid_id(id) {
            return Err(CallError::invalid(
                "cannot start the container: its id is not 1 to 128 letters, digits, -_.",
            ));
        }
        if self.container(id).is_ok() {
            return Err(CallError::precondition(format!("container {id} has been started already")));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(CallError::precondition(format!(
                "cannot start container {id}: the pod has {MAX_CONTAINERS} that are not forgotten"
            )));
        }
        if leaf == self.pod.own_leaf || self.containers.iter().any(|other| other.leaf_name == leaf) {
            return Err(CallError::invalid(format!("cannot start container {id}: its cgroup is another's")));
        }
        Ok(())
    }

    /// Logs what a container wrote.
    pub(super) fn output_ready(&mut self, serial: u32, stream: Stream) {
        let Some(container) = self.containers.iter_mut().find(|container| container.serial == serial) else {
            return;
        };
        let buffers = self.buffers.get_or_insert_default();
        self.buffers_used = Instant::now();
        let mut taken = container.stream(stream).take();
        let ended =
            taken.as_mut().is_some_and(|output| output.pump(&mut container.log, buffers) == Progress::Ended);
        let late = taken.as_mut().map_or_else(Vec::new, OutputStream::take_late);
        *container.stream(stream) = taken.filter(|_| !ended);
        if let Err(error) = super::output::watch(container, stream, &self.poll) {
            report::line(format_args!("output of container {} is not watched: {error}", container.id));
        }
        for number in late {
            // Without one of its streams the other would only seem whole.
            for stream in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                stream.forget_tap(number);
            }
        }
        if ended && container.stdout.is_none() && container.stderr.is_none() {
            self.output_ended(serial);
        }
    }

    /// Lets go of attached callers for whom an output was held up long enough.
    pub(super) fn release_held_outputs(&mut self, now: Instant) {
        for index in 0..self.containers.len() {
            for stream in [Stream::Stdout, Stream::Stderr] {
                let container = &self.containers[index];
                if container.held_until(stream).is_some_and(|until| until <= now) {
                    self.output_ready(container.serial, stream);
                }
            }
        }
    }

    /// Tells of OOM kills that have happened.
    pub(super) fn oom_event(&mut self, serial: u32) {
        let Some(container) = self.containers.iter_mut().find(|container| container.serial == serial) else {
            return;
        };
        let Some(oom) = &mut container.oom else { return };
        if oom.has_grown() {
            oom.look_again = None;
            self.oom_kills_told = self.pod.cgroup.oom_kills().unwrap_or(0);
            let id = container.id.clone();
            self.send_event(Event { event: Some(event::Event::Oom(id)) });
        } else if oom.look_again.is_none() {
            oom.look_again = Some((Instant::now() + OOM_LOOK_AFTER, OOM_LOOKS));
        }
    }

    pub(super) fn look_again_for_oom(&mut self, now: Instant) {
        let mut serials = Vec::new();
        for container in &mut self.containers {
            let Some(oom) = &mut container.oom else { continue };
            if let Some((when, looks)) = oom.look_again.filter(|(when, _)| *when <= now) {
                oom.look_again = (looks > 1).then(|| (when.max(now) + OOM_LOOK_AFTER, looks - 1));
                serials.push(container.serial);
            }
        }
        for serial in serials {
            self.oom_event(serial);
        }
    }
}
