use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_sys::mount::{self, Attributes, MountAttrFlags, Propagation};
use hull_sys::namespace::{self, Namespaces};
use hull_sys::process::{self, Clone3, Cloned};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::process::PidfdFlags;

use crate::cgroup::{CgroupError, Leaf};
use crate::protocol::messages;

use super::failure::{During, Failure, Stage};
use super::inside::Root;
use super::mounts::Part;
use super::own_proc::OwnProc;
use super::plan::{CgroupNamespace, ContainerPlan};
use super::report::{self, Part as Done, Reporter};
use super::stdio::{Streams, agent_null};
use super::users::Resolved;
use super::{
    ChildStdio, LaunchError, Launched, PidNamespace, Slots, devices, execute, guarded, inner, mounts, rootfs,
    scaffold,
};

/// How long a process may take from its clone to its program. The agent waits for it, so something that hangs (a dead
/// network filesystem below a mount) must not hang the whole pod.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts the container's first process in the cgroup `cgroup`, which exists with its limits. Only system calls: every
/// decision is in the plan.
///
/// Blocks until the program runs or it is clear why not, at most a minute; of a launch that fails nothing is left but
/// what it made in the writable directory. The process must have one thread, ignore no signal
/// ([`hull_sys::signal::reset_all`]) and be inside a pod ([`crate::sandbox::enter`]). The trees of the slots are used up:
/// another launch needs new ones.
pub fn launch(
    plan: &ContainerPlan,
    slots: &Slots<'_>,
    stdio: ChildStdio,
    cgroup: &Leaf,
    pid_namespace: PidNamespace<'_>,
) -> Result<Launched, LaunchError> {
    // Inside a user namespace it is the second process that is numbered where it was asked for.
    let first = if plan.user_namespace.is_some() { PidNamespace::Agent } else { pid_namespace };
    start(cgroup, None, Namespaces::MOUNT, first, |reporter| {
        let (root, user, own) = prepare(plan, slots, cgroup, reporter)?;
        let Some(namespace) = &plan.user_namespace else {
            return finish(plan, &root, &user, stdio, &own, reporter);
        };
        inner::check_mapped(namespace, &user.identity)?;
        stdio.give_to(namespace.uids.outside(user.identity.uid));
        inner::go_on_inside(namespace, pid_namespace, reporter)?;
        let own = OwnProc::open().during(Stage::Start, || "cannot prepare the process")?;
        let root = rootfs::unlocked()?;
        if plan.cgroup_namespace == CgroupNamespace::Private {
            unshare_cgroups()?;
        }
        mounts::mount_all(&root, plan, slots, Part::Inside)?;
        guarded::guard(&root, plan, Part::Inside)?;
        finish(plan, &root, &user, stdio, &own, reporter)
    })
}

/// Clones a process into the cgroup and PID namespace, runs `body` in it, and waits until that has become a program.
///
/// No process is ever moved: it is born into the unified hierarchy's cgroup and enters those of v1 by itself, which
/// costs a hundredth of being moved. If the cgroup itself may hold no process because it has others below it, the
/// process goes to where the process `beside` is.
pub(super) fn start(
    cgroup: &Leaf,
    beside: Option<i32>,
    namespaces: Namespaces,
    pid_namespace: PidNamespace<'_>,
    body: impl FnOnce(&Reporter) -> Result<Infallible, Failure>,
) -> Result<Launched, LaunchError> {
    let begun = Instant::now();
    let (agent_end, child_end) = report::channel().during(Stage::Start, || "cannot make a socket pair")?;
    let mut cloned = clone(cgroup.clone_fd(), namespaces, pid_namespace);
    if let (Err(error), Some(pid)) = (&cloned, beside)
        && error.errno() == Errno::BUSY.raw_os_error()
    {
        let there = cgroup
            .clone_fd_beside(pid)
            .during(Stage::Start, || "cannot find the cgroup of the container's first process")?;
        cloned = clone(Some(there.as_fd()), namespaces, pid_namespace);
    }
    match cloned? {
        Cloned::Child => {
            let _guard = EndOfChild;
            drop(agent_end);
            let reporter = Reporter::new(child_end, begun);
            reporter.done(Done::Clone);
            match in_cgroup(cgroup.enter_v1()).and_then(|()| body(&reporter)) {
                Ok(never) => match never {},
                Err(failure) => reporter.failed(&failure),
            }
            process::exit_now(127)
        }
        Cloned::Parent { pid, pidfd } => {
            drop(child_end);
            supervise(pid, pidfd, agent_end.as_fd())
        }
    }
}

/// The error of a step into the cgroup, as a child reports it.
pub(super) fn in_cgroup(entered: Result<(), CgroupError>) -> Result<(), Failure> {
    entered.map_err(|error| Failure::new(Stage::Start, error.to_string()))
}

/// A copy of the agent must never run on as a second agent, not even by a panic that unwinds.
struct EndOfChild;

impl Drop for EndOfChild {
    fn drop(&mut self) {
        process::exit_now(127)
    }
}

/// Follows a child until it has become its program; kills and reaps it if that fails.
fn supervise(pid: i32, pidfd: OwnedFd, socket: BorrowedFd<'_>) -> Result<Launched, LaunchError> {
    let follow = || -> Result<report::Report, LaunchError> {
        let mut report = report::collect(socket, Instant::now() + DEADLINE)
            .during(Stage::Start, || "cannot follow the start of the process")?;
        let child = report.child.take();
        match report.into_result() {
            Ok(mut report) => {
                report.child = child;
                Ok(report)
            }
            Err(failure) => {
                if let Some((_, child)) = child {
                    end(child.as_fd());
                }
                Err(failure.into())
            }
        }
    };
    match follow() {
        Ok(report) => {
            let identity = report.identity;
            let (uid, gid, groups) = (identity.uid, identity.gid, identity.groups);
            let (pid, pidfd) = match report.child {
                None => (pid, pidfd),
                Some(child) => {
                    // Its last word was that of the child; it has ended, or is about to.
                    let _ = process::wait(pidfd.as_fd());
                    child
                }
            };
            Ok(Launched { pid, pidfd, uid, gid, groups, terminal: report.terminal, parts: report.parts })
        }
        Err(error) => {
            end(pidfd.as_fd());
            Err(error)
        }
    }
}

/// Kills a child that may be dead already, and reaps it.
fn end(child: BorrowedFd<'_>) {
    let _ = process::pidfd_send_signal(child, rustix::process::Signal::KILL.as_raw());
    let _ = process::wait(child);
}

/// Clones with the children's PID namespace set as asked, and set back afterwards.
fn clone(
    cgroup: Option<BorrowedFd<'_>>,
    mut namespaces: Namespaces,
    pid_namespace: PidNamespace<'_>,
) -> Result<Cloned, LaunchError> {
    let PidNamespace::Join(target) = pid_namespace else {
        if matches!(pid_namespace, PidNamespace::New) {
            namespaces |= Namespaces::PID;
        }
        return Ok(clone3(cgroup, namespaces)?);
    };
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .during(Stage::Start, || "cannot open the agent's own process")?;
    namespace::enter_of_process(target, Namespaces::PID)
        .during(Stage::Start, || "cannot join the PID namespace (has its first process ended?)")?;
    let cloned = clone3(cgroup, namespaces);
    if let Ok(Cloned::Child) = cloned {
        return Ok(Cloned::Child);
    }
    let restored = namespace::enter_of_process(own.as_fd(), Namespaces::PID);
    if let Err(error) = restored {
        // Cannot happen (setns to the own namespace); if it did, the next container would be in the wrong one.
        let failure = Failure::system(Stage::Start, "cannot return to the agent's PID namespace", error);
        return Err(failure.into());
    }
    Ok(cloned?)
}

fn clone3(cgroup: Option<BorrowedFd<'_>>, namespaces: Namespaces) -> Result<Cloned, Failure> {
    process::clone3(&Clone3 { namespaces, cgroup, sibling: false })
        .during(Stage::Start, || "cannot clone the process")
}

/// The root filesystem with its mounts: all, or those that a process in the pod's user namespace cannot make.
fn prepare(
    plan: &ContainerPlan,
    slots: &Slots<'_>,
    cgroup: &Leaf,
    reporter: &Reporter,
) -> Result<(Root, Resolved, OwnProc), Failure> {
    in_cgroup(cgroup.enter_v1_cpu())?;
    reporter.done(Done::Cgroup);
    let own = execute::begin(&plan.process)?;
    if let Some(slot) = plan.rdt_tasks {
        let tasks = slots.get(slot);
        execute::join_class(tasks.ok_or_else(|| {
            Failure::new(Stage::Start, format!("the request brought no slot {slot}, the RDT class's"))
        })?)?;
    }
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    mount::set_attributes_at(CWD, c"/", true, &private)
        .during(Stage::Mount, || "cannot make the container's mounts private")?;
    let user_namespace = plan.user_namespace.as_deref();
    if let Some(user) = user_namespace {
        inner::act_as_root_of(user)?;
    }
    let lowest = scaffold::layer(plan, slots);
    let root = rootfs::assemble(&plan.rootfs, lowest, &plan.mount_label, slots, user_namespace)?;
    let user = execute::resolve_user(&plan.process, &root, &own)?;
    reporter.done(Done::Rootfs);
    devices::make_elsewhere(&root, &plan.devices)?;
    let part = if user_namespace.is_some() { Part::Outside } else { Part::All };
    in_cgroup_namespace(plan.cgroup_namespace, &own, || mounts::mount_all(&root, plan, slots, part))?;
    reporter.done(Done::Mounts);
    guarded::guard(&root, plan, part)?;
    reporter.done(Done::Guard);
    Ok((root, user, own))
}

/// The rest, up to the program.
fn finish(
    plan: &ContainerPlan,
    root: &Root,
    user: &Resolved,
    stdio: ChildStdio,
    own: &OwnProc,
    reporter: &Reporter,
) -> Result<Infallible, Failure> {
    let cwd = execute::working_directory(&plan.process, root, true)?;
    let null = agent_null()?;
    let streams = Streams::open(stdio, plan.process.terminal, root, own, null.as_fd(), reporter)?;
    if plan.own_dev {
        streams.bind_console(root)?;
    }
    rootfs::pivot(root)?;
    finish_root(plan, root)?;
    reporter.done(Done::Pivot);
    execute::become_program(&plan.process, user, &streams, cwd, own, reporter)
}

fn unshare_cgroups() -> Result<(), Failure> {
    namespace::unshare(Namespaces::CGROUP)
        .during(Stage::Start, || "cannot make the container's cgroup namespace")
}

/// Mounts of cgroup filesystems show what the namespace that they are made in shows.
fn in_cgroup_namespace(
    wanted: CgroupNamespace,
    own: &OwnProc,
    mount: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let doing = || "cannot make the container's cgroup namespace";
    match wanted {
        CgroupNamespace::Agent => mount(),
        CgroupNamespace::Private => {
            unshare_cgroups()?;
            mount()
        }
        CgroupNamespace::PrivateWhileMounting => {
            let agents = own.cgroup_namespace().during(Stage::Start, doing)?;
            unshare_cgroups()?;
            mount()?;
            namespace::enter(agents.as_fd(), Namespaces::CGROUP)
                .during(Stage::Start, || "cannot return to the host's cgroup namespace")
        }
    }
}

/// Propagation and read-only of the root mount itself, last: until now things were made in it and mounted on it.
fn finish_root(plan: &ContainerPlan, root: &Root) -> Result<(), Failure> {
    let propagation = match plan.rootfs.propagation {
        messages::Propagation::Private => None,
        messages::Propagation::HostToContainer => Some(Propagation::Slave),
        messages::Propagation::Bidirectional => Some(Propagation::Shared),
    };
    if propagation.is_none() && !plan.rootfs.readonly {
        return Ok(());
    }
    let readonly =
        if plan.rootfs.readonly { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
    let attributes = Attributes { set: readonly, propagation, ..Attributes::default() };
    let set = || -> io::Result<()> { mount::set_attributes(root.as_fd(), false, &attributes) };
    set().during(Stage::Rootfs, || "cannot set attributes of the root filesystem")
}
