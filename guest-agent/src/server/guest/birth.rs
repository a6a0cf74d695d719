//! A guest's agent before it has a pod: it waits for whoever tells it what to be.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};

use super::super::connection;
use super::super::failure::CallError;
use super::super::pod::{Pod, Reaper};
use super::super::{Server, report};
use super::Machine;
use crate::cgroup::{Hierarchies, PodCgroup};
use crate::container::{Slots, start_reaper};
use crate::guest::clock::Clock;
use crate::guest::hello::{Greeted, Greeting};
use crate::guest::streams::Streams;
use crate::guest::{MAX_FRAME, boot, machine, place};
use crate::protocol::messages::{
    CreateSandbox, Empty, Guest, Message, Request, Response, SandboxCreated, StateReport, message::Body,
    request::Call, response::Outcome,
};
use crate::protocol::{FrameReader, encode, is_valid_id};
use crate::sandbox::{self, IdMap, PodNamespaces};

/// Where the pod's processes are, unless the request says otherwise.
const CGROUP: &str = "/pod";
/// The leaf of the agent's own processes.
const OWN_LEAF: &str = "agent";

/// A control connection before there is a pod.
struct Early {
    socket: OwnedFd,
    reader: FrameReader,
}

/// Waits for CreateSandbox; the newest connection counts, for the one before belongs to a hulld that has gone. `None`
/// if there will be no pod, which the caller has been told.
pub(super) fn born(listener: OwnedFd) -> io::Result<Option<Server>> {
    let (mut greeting, mut early) = (None::<Greeting>, None::<Early>);
    let mut streams = Streams::default();
    loop {
        let (connects, greets, asks) = wait(&listener, greeting.as_ref(), early.as_ref())?;
        if connects && let Some(socket) = connection::accept(listener.as_fd()) {
            greeting = Some(Greeting::new(0, socket, Instant::now()));
        } else if greets && let Some(mut greeted) = greeting.take() {
            match greeted.step() {
                Greeted::NotYet => greeting = Some(greeted),
                Greeted::Control => {
                    let reader = FrameReader::with_limit(MAX_FRAME);
                    early = Some(Early { socket: greeted.into_socket(), reader });
                }
                Greeted::Stream(number) => streams.add(number, greeted.into_socket(), Instant::now()),
                Greeted::Gone => {}
            }
        } else if asks && let Some(mut one) = early.take() {
            match one.step() {
                Step::Goes => {}
                Step::Stays => early = Some(one),
                Step::Create(id, spec, guest) => {
                    let outcome = create(&spec, &guest, listener, streams);
                    return one.answer_creation(id, outcome);
                }
            }
        }
    }
}

/// Which of the three has something to say.
fn wait(
    listener: &OwnedFd,
    greeting: Option<&Greeting>,
    early: Option<&Early>,
) -> io::Result<(bool, bool, bool)> {
    let listener = listener.as_fd();
    let greeting = greeting.map_or(listener, AsFd::as_fd);
    let early = early.map_or(listener, |early| early.socket.as_fd());
    let mut fds = [listener, greeting, early].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
    Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty(), !fds[2].revents().is_empty()))
}

/// What became of a look at a connection.
enum Step {
    Goes,
    Stays,
    Create(u64, Box<CreateSandbox>, Box<Guest>),
}

impl Early {
    fn step(&mut self) -> Step {
        match self.reader.receive_from(self.socket.as_fd()) {
            Ok(0) => return Step::Goes,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Step::Goes,
            _ => {}
        }
        loop {
            let message = match self.reader.next() {
                Ok(Some(frame)) => frame.message,
                Ok(None) => return Step::Stays,
                Err(error) => {
                    report::line(format_args!("a control connection is closed: {error}"));
                    return Step::Goes;
                }
            };
            let Some(Body::Request(Request { call, .. })) = message.body else { return Step::Goes };
            let outcome = match call {
                Some(Call::CreateSandbox(mut spec)) => match spec.guest.take() {
                    Some(guest) => return Step::Create(message.id, Box::new(spec), Box::new(guest)),
                    None => CallError::invalid("the request does not say what the machine is to be")
                        .into_outcome(),
                },
                Some(Call::Ping(_)) => Outcome::Done(Empty {}),
                Some(Call::State(_)) => Outcome::State(state()),
                Some(_) => CallError::precondition("the first request must be CreateSandbox").into_outcome(),
                None => CallError::unknown_call().into_outcome(),
            };
            if self.respond(message.id, outcome).is_err() {
                return Step::Goes;
            }
        }
    }

    fn respond(&mut self, id: u64, outcome: Outcome) -> io::Result<()> {
        let body = Some(Body::Response(Response { outcome: Some(outcome) }));
        let bytes = encode(&Message { id, body })?;
        rustix::io::ioctl_fionbio(&self.socket, false)?;
        let mut rest = &*bytes;
        while !rest.is_empty() {
            let sent = rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, rest))?;
            rest = &rest[sent.min(rest.len())..];
        }
        Ok(rustix::io::ioctl_fionbio(&self.socket, true)?)
    }

    fn answer_creation(
        mut self,
        id: u64,
        outcome: Result<(Server, SandboxCreated), CallError>,
    ) -> io::Result<Option<Server>> {
        match outcome {
            Ok((mut server, created)) => {
                // Gone meanwhile: whoever comes next finds the pod by State.
                if self.respond(id, Outcome::SandboxCreated(created)).is_ok() {
                    server.connections.add(self.socket, self.reader);
                }
                Ok(Some(server))
            }
            Err(error) => {
                report::line(format_args!("{}", error.message()));
                self.respond(id, error.into_outcome())?;
                let mut last = connection::Connections::default();
                last.add(self.socket, self.reader);
                last.wait_for_peers(super::LAST_WORDS);
                Ok(None)
            }
        }
    }
}

/// Of an agent that has no pod yet.
fn state() -> StateReport {
    StateReport {
        agent_pid: rustix::process::getpid().as_raw_nonzero().get(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        ..StateReport::default()
    }
}

fn create(
    spec: &CreateSandbox,
    guest: &Guest,
    listener: OwnedFd,
    streams: Streams,
) -> Result<(Server, SandboxCreated), CallError> {
    if !is_valid_id(&spec.id) {
        return Err(CallError::invalid(
            "cannot create the sandbox: its id is not 1 to 128 letters, digits, -_.",
        ));
    }
    let context = format!("cannot create sandbox {}", spec.id);
    create_inside(spec, guest, listener, streams).map_err(|error| error.during(context))
}

fn create_inside(
    spec: &CreateSandbox,
    guest: &Guest,
    listener: OwnedFd,
    streams: Streams,
) -> Result<(Server, SandboxCreated), CallError> {
    let mut spec = in_this_machine(spec);
    let own = machine::become_the_pods(guest, ids(&spec)?)?;
    let slots = own.map(|own| take(own, &mut spec));
    let layout = spec.cgroups.clone().unwrap_or_default();
    let cgroup = PodCgroup::open(Arc::new(Hierarchies::open(&layout)?), &spec.cgroup_parent)?;
    if let Some(resources) = &spec.pod_resources {
        cgroup.apply(resources)?;
    }
    // The agent itself stays in the root cgroup, which has no limits and may hold processes.
    let leaf = cgroup.leaf(&spec.cgroup_leaf)?;
    let slots = Slots::resolved(&[], slots.as_deref().unwrap_or_default());
    let facts = sandbox::withdraw(&layout, &spec.mount_label)
        .and_then(|()| sandbox::enter(&spec, &slots, None))
        .and_then(|facts| sandbox::leave_host().map(|()| facts))
        .map_err(|error| CallError::invalid(error.to_string()))?;
    place::make()?;
    let clock = Clock::start(guest.wall_clock_ns);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let state_directory = rustix::fs::open(place::STATE, flags, Mode::empty())
        .map_err(|error| CallError::system("cannot open the state directory", error))?;
    let reaper = if spec.shared_pid_namespace {
        leaf.create()?;
        let launched = start_reaper(&leaf, facts.user_namespace.as_deref())?;
        Some(Reaper { pid: launched.pid, pidfd: launched.pidfd })
    } else {
        None
    };
    let created = SandboxCreated {
        agent_pid: rustix::process::getpid().as_raw_nonzero().get(),
        reaper_pid: reaper.as_ref().map_or(0, |reaper| reaper.pid),
        cgroup_created_levels: cgroup.created_levels(),
        steps: Vec::new(),
    };
    let own_leaf = spec.cgroup_leaf.clone();
    let pod = Pod { id: spec.id.clone(), state_directory, cgroup, own_leaf, facts, reaper };
    let mut server =
        Server::new(listener, pod).map_err(|error| CallError::system("cannot make the event loop", error))?;
    server.guest = Some(Box::new(Machine::new(clock, streams)));
    server.connections.longest = Some(MAX_FRAME);
    Ok((server, created))
}

/// The user and group ids of the pod's user namespace, if it is to have one.
fn ids(spec: &CreateSandbox) -> Result<Option<(IdMap, IdMap)>, CallError> {
    if spec.uid_mapping.is_none() && spec.gid_mapping.is_none() {
        return Ok(None);
    }
    let both =
        IdMap::from_message(spec.uid_mapping.as_ref()).zip(IdMap::from_message(spec.gid_mapping.as_ref()));
    let wrong = || CallError::invalid("the mapping of the pod's users or groups cannot be");
    both.map(Some).ok_or_else(wrong)
}

/// What the request's slots would be, had these namespaces come with it. The network is entered already.
fn take(own: PodNamespaces, spec: &mut CreateSandbox) -> Vec<Option<OwnedFd>> {
    spec.user_namespace = Some(0);
    spec.ipc_namespace = Some(1);
    spec.uts_namespace = Some(2);
    [own.user, own.ipc, own.uts].map(Some).into()
}

/// The request with what is true in every guest.
fn in_this_machine(spec: &CreateSandbox) -> CreateSandbox {
    let or = |text: &str, default: &str| if text.is_empty() { default } else { text }.to_owned();
    CreateSandbox {
        network_namespace: None,
        user_namespace: None,
        ipc_namespace: None,
        uts_namespace: None,
        shm_source: None,
        cgroups: Some(boot::cgroups()),
        cgroup_parent: or(&spec.cgroup_parent, CGROUP),
        cgroup_leaf: or(&spec.cgroup_leaf, OWN_LEAF),
        // The kernel never kills its first process for memory; a score that protects would be inherited.
        oom_score_adj: 0,
        ..spec.clone()
    }
}
