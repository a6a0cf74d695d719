use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};

use hull_sys::namespace::{self, Namespaces};

use crate::cgroup::Leaf;
use crate::protocol::messages;
use crate::sandbox::UserNamespace;

use super::failure::{During, Failure, Stage};
use super::process_plan::ProcessPlan;
use super::report::Reporter;
use super::stdio::{Streams, agent_null};
use super::{ChildStdio, LaunchError, Launched, PidNamespace, execute, inner, launch, plan, rootfs};

/// A container that another process is started in.
#[derive(Debug)]
pub struct RunningContainer<'a> {
    /// Its first process, which has not been waited for.
    pub pid: i32,
    /// The same.
    pub pidfd: BorrowedFd<'a>,
    /// Its cgroup.
    pub cgroup: &'a Leaf,
    /// What [`super::ContainerPlan::process_of`] gave when it was launched.
    pub process: &'a messages::Process,
    /// It has a cgroup namespace of its own.
    pub private_cgroup_namespace: bool,
    /// Takes its processes into their class of cache and memory bandwidth.
    pub rdt_tasks: Option<BorrowedFd<'a>>,
    /// Where it lives; `None`: where the agent does.
    pub user_namespace: Option<&'a UserNamespace>,
}

/// Starts another process inside a running container: in its cgroup and its mount, PID and cgroup namespaces. With
/// `inherit`, environment, user, working directory, capabilities, no_new_privs, seccomp, labels and limits are the
/// container's and only command and terminal are the request's.
///
/// Blocks like [`super::launch`].
pub fn exec(
    container: &RunningContainer<'_>,
    request: &messages::Process,
    inherit: bool,
    stdio: ChildStdio,
) -> Result<Launched, LaunchError> {
    let process = plan::exec_process(container.process, request, inherit)?;
    let join = PidNamespace::Join(container.pidfd);
    launch::start(container.cgroup, Some(container.pid), Namespaces::NONE, join, |reporter| {
        exec_process(&process, container, stdio, reporter)
    })
}

fn exec_process(
    process: &ProcessPlan,
    container: &RunningContainer<'_>,
    stdio: ChildStdio,
    reporter: &Reporter,
) -> Result<Infallible, Failure> {
    let own = execute::begin(process)?;
    container.rdt_tasks.map_or(Ok(()), execute::follow_into_class)?;
    let null = agent_null()?;
    let mut namespaces = Namespaces::MOUNT;
    if container.private_cgroup_namespace {
        namespaces |= Namespaces::CGROUP;
    }
    namespace::enter_of_process(container.pidfd, namespaces)
        .during(Stage::Start, || "cannot join the container's namespaces (has it ended?)")?;
    // Joining a mount namespace makes its root the process's own.
    let root = rootfs::current().during(Stage::Start, || "cannot open the container's root")?;
    let user = execute::resolve_user(process, &root, &own)?;
    let cwd = execute::working_directory(process, &root, false)?;
    let streams = Streams::open(stdio, process.terminal, &root, &own, null.as_fd(), reporter)?;
    launch::in_cgroup(container.cgroup.enter_v1_cpu())?;
    if let Some(namespace) = container.user_namespace {
        inner::check_mapped(namespace, &user.identity)?;
        streams.give_to(namespace.uids.outside(user.identity.uid));
        inner::enter(namespace)?;
    }
    execute::become_program(process, &user, &streams, cwd, &own, reporter)
}
