//! The agent's birth: a socket as standard input, CreateSandbox as the first request, or after Prepare.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use hull_sys::process::{Clone3, Cloned, clone3, exit_now};
use hull_sys::signal::{self, ChildSignal};
use rustix::fs::{Mode, OFlags};

use super::calls::check_slots;
use super::connection::Connections;
use super::failure::CallError;
use super::pod::{Pod, Reaper};
use super::poll::Poll;
use super::{ORPHAN_CHECK, Server, report};
use crate::cgroup::{Hierarchies, Leaf, PodCgroup};
use crate::container::{Slots, start_reaper};
use crate::protocol::messages::{
    CgroupLayout, CreateSandbox, Message, Request, Response, SandboxCreated, message::Body, request::Call,
    response::Outcome,
};
use crate::protocol::{BlockingConnection, Frame, is_valid_id};
use crate::sandbox::{self, SandboxError, Spare};
use crate::steps::Steps;

/// Takes the first request from standard input and becomes the pod's agent.
///
/// `None` if there will be no pod, which the caller has been told, or if it has gone away. With a unified cgroup
/// hierarchy the process that started ends in here, and its clone returns.
pub(super) fn born() -> io::Result<Option<Server>> {
    hull_sys::memory::prefer_small();
    signal::reset_all();
    // SIGTERM and the like must not end a pod; a child gives its program an empty mask again.
    signal::block_all()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let mut connection = BlockingConnection::new(take_stdin()?);
    let Some(mut frame) = connection.recv()? else { return Ok(None) };
    let prepared = match &frame.message.body {
        Some(Body::Request(Request { call: Some(Call::Prepare(prepare)), .. })) => {
            let prepared = Prepared::new(prepare.cgroups.clone().unwrap_or_default())?;
            match connection.recv()? {
                Some(next) => frame = next,
                None => return Ok(None),
            }
            Some(prepared)
        }
        _ => None,
    };
    let has_left_host = prepared.is_some();
    let Frame { message, fds } = frame;
    let id = message.id;
    let outcome = match message.body {
        Some(Body::Request(request)) => match &request.call {
            Some(Call::CreateSandbox(spec)) => {
                let slots = Slots::new(&request.slots, &fds);
                check_slots(&request.slots).and_then(|()| create(spec, &slots, prepared))
            }
            _ => Err(CallError::precondition("the first request must be CreateSandbox")),
        },
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "the first message is no request")),
    };
    // What the slots hold has been taken over; the agent keeps no other way to the host.
    drop(fds);
    match outcome {
        Ok((mut server, created)) => {
            let has_left_host = has_left_host || server.pod.reaper.is_some();
            respond(&mut connection, id, Outcome::SandboxCreated(created))?;
            if !has_left_host {
                // Nobody needs to wait for it but the first container.
                sandbox::leave_host().map_err(io::Error::other)?;
            }
            let (socket, reader) = connection.into_parts();
            rustix::io::ioctl_fionbio(&socket, true)?;
            server.connections.add(socket, reader);
            Ok(Some(server))
        }
        Err(error) => {
            report::line(format_args!("{}", error.message()));
            respond(&mut connection, id, error.into_outcome())?;
            Ok(None)
        }
    }
}

fn respond(connection: &mut BlockingConnection, id: u64, outcome: Outcome) -> io::Result<()> {
    connection.send(&Message { id, body: Some(Body::Response(Response { outcome: Some(outcome) })) }, &[])
}

/// The socket on standard input, which becomes /dev/null.
fn take_stdin() -> io::Result<OwnedFd> {
    let stdin = rustix::stdio::stdin();
    if rustix::net::sockopt::socket_type(stdin).is_err() {
        return Err(io::Error::other(
            "standard input is not a socket: hulld starts this program, for each pod one",
        ));
    }
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(socket)
}

/// What an agent did before it knew its pod.
struct Prepared {
    layout: CgroupLayout,
    hierarchies: Arc<Hierarchies>,
    spare: Option<Spare>,
}

impl Prepared {
    /// Takes of the host what an agent needs, and leaves it.
    fn new(layout: CgroupLayout) -> io::Result<Self> {
        let hierarchies = Arc::new(Hierarchies::open(&layout).map_err(io::Error::other)?);
        sandbox::withdraw(&layout, "").map_err(io::Error::other)?;
        sandbox::leave_host().map_err(io::Error::other)?;
        let spare = Spare::make().map_err(io::Error::other)?;
        Ok(Self { layout, hierarchies, spare })
    }
}

/// From the request to an agent inside its pod.
fn create(
    spec: &CreateSandbox,
    slots: &Slots<'_>,
    prepared: Option<Prepared>,
) -> Result<(Server, SandboxCreated), CallError> {
    if !is_valid_id(&spec.id) {
        return Err(CallError::invalid(
            "cannot create the sandbox: its id is not 1 to 128 letters, digits, -_.",
        ));
    }
    let context = format!("cannot create sandbox {}", spec.id);
    if spec.guest.is_some() {
        return Err(CallError::only_in_a_guest("what the request says of a machine").during(context));
    }
    create_inside(spec, slots, prepared).map_err(|error| error.during(context))
}

fn create_inside(
    spec: &CreateSandbox,
    slots: &Slots<'_>,
    prepared: Option<Prepared>,
) -> Result<(Server, SandboxCreated), CallError> {
    let mut steps = Steps::begin();
    let listener = keep(slots, spec.listener, "the listener")?;
    let state_directory = keep(slots, spec.state_directory, "the state directory")?;
    rustix::io::ioctl_fionbio(&listener, true)
        .map_err(|error| CallError::system("cannot use the listener", error))?;
    let layout = spec.cgroups.as_ref().ok_or_else(|| CallError::invalid("there is no cgroup layout"))?;
    let hierarchies = match &prepared {
        Some(prepared) if prepared.layout == *layout && spec.mount_label.is_empty() => {
            Arc::clone(&prepared.hierarchies)
        }
        Some(_) => return Err(CallError::invalid("it was prepared for a pod of another kind")),
        None => Arc::new(Hierarchies::open(layout)?),
    };
    let cgroup = PodCgroup::open(hierarchies, &spec.cgroup_parent)?;
    let created_levels = cgroup.created_levels();
    if let Some(resources) = spec.pod_resources.as_ref().filter(|_| cgroup.is_own()) {
        cgroup.apply(resources)?;
    }
    let leaf = match spec.cgroup_leaf_in_v1 {
        true => cgroup.leaf(&spec.cgroup_leaf)?,
        false => cgroup.own_leaf(&spec.cgroup_leaf)?,
    };
    leaf.create()?;
    steps.done("make the cgroup");
    enter_cgroup(&leaf).map_err(|error| error.during("cannot enter the agent's cgroup"))?;
    steps.done("enter the cgroup");
    // A session of its own: what is typed at hulld's terminal is not for the pod. Only a group's leader cannot.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| CallError::system("cannot become the subreaper of the pod", error))?;
    let invalid = |error: SandboxError| CallError::invalid(error.to_string());
    let has_left_host = prepared.is_some();
    if !has_left_host {
        sandbox::withdraw(layout, &spec.mount_label).map_err(invalid)?;
    }
    let facts = sandbox::enter(spec, slots, prepared.and_then(|prepared| prepared.spare)).map_err(invalid)?;
    steps.done("namespaces, mounts");
    let reaper = if spec.shared_pid_namespace {
        if !has_left_host {
            sandbox::leave_host().map_err(invalid)?;
        }
        let launched = start_reaper(&leaf, facts.user_namespace.as_deref())?;
        Some(Reaper { pid: launched.pid, pidfd: launched.pidfd })
    } else {
        None
    };
    steps.done("reaper of a shared PID namespace");
    let created = SandboxCreated {
        agent_pid: rustix::process::getpid().as_raw_nonzero().get(),
        reaper_pid: reaper.as_ref().map_or(0, |reaper| reaper.pid),
        cgroup_created_levels: created_levels,
        steps: steps.into_messages(),
    };
    let pod = Pod {
        id: spec.id.clone(),
        state_directory,
        cgroup,
        own_leaf: spec.cgroup_leaf.clone(),
        facts,
        reaper,
    };
    let server =
        Server::new(listener, pod).map_err(|error| CallError::system("cannot make the event loop", error))?;
    Ok((server, created))
}

fn keep(slots: &Slots<'_>, slot: u32, what: &str) -> Result<OwnedFd, CallError> {
    let fd = slots.get(slot).ok_or_else(|| CallError::no_slot(what, slot))?;
    fd.try_clone_to_owned().map_err(|error| CallError::system(format_args!("cannot keep {what}"), error))
}

/// Takes the agent into its leaf. In the unified hierarchy by cloning itself there, which costs a fifteenth of moving;
/// the first process ends, and its parent learns the agent's number from the answer.
fn enter_cgroup(leaf: &Leaf) -> Result<(), CallError> {
    if let Some(cgroup) = leaf.clone_fd() {
        let options = Clone3 { cgroup: Some(cgroup.as_fd()), ..Clone3::default() };
        match clone3(&options).map_err(|error| CallError::system("cannot clone", error))? {
            Cloned::Child => {}
            Cloned::Parent { .. } => exit_now(0),
        }
    }
    leaf.enter_v1()?;
    Ok(leaf.enter_v1_cpu()?)
}

impl Server {
    pub(super) fn new(listener: OwnedFd, pod: Pod) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            poll: Poll::new()?,
            children: ChildSignal::new()?,
            listener,
            connections: Connections::default(),
            pod,
            containers: Vec::new(),
            execs: Vec::new(),
            expected: Vec::new(),
            next_serial: 0,
            buffers: None,
            buffers_used: now,
            orphan_check: now + ORPHAN_CHECK,
            stopping: None,
            oom_kills_told: 0,
            guest: None,
        })
    }
}
