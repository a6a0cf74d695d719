//! The step into a pod's user namespace.
//!
//! What needs the agent's own privileges (layers with mapped ids, the overlay, device nodes, sysfs of the host's network)
//! is done by a first process, in a mount namespace of the host's privileges. It then joins the user namespace and
//! clones the process that becomes the program: so the PID and mount namespaces of that one belong to the user namespace,
//! and the mounts that were made before are locked, as mount_namespaces(7) has it: even a container with CAP_SYS_ADMIN
//! cannot take a read-only or a mask away.

use std::os::fd::AsFd;

use hull_sys::namespace::{self, Namespaces};
use hull_sys::privilege;
use hull_sys::process::{self, Clone3, Cloned};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::sandbox::UserNamespace;

use super::PidNamespace;
use super::failure::{During, Failure, Stage};
use super::report::{Identity, Reporter};

/// Makes the calling process act on files as the container's root, with the privileges that it has.
pub(super) fn act_as_root_of(user: &UserNamespace) -> Result<(), Failure> {
    let doing = "cannot act as the root of the pod's user namespace";
    let (uid, gid) =
        user.root().ok_or_else(|| Failure::new(Stage::Start, format!("{doing}: it has none")))?;
    privilege::act_on_files_as(uid, gid).during(Stage::Start, || doing)
}

/// Refuses ids that the user namespace does not map, which the kernel would answer with a bare EINVAL.
pub(super) fn check_mapped(user: &UserNamespace, identity: &Identity) -> Result<(), Failure> {
    let refuse = |what: &str, id: u32| {
        let message = format!("cannot become {what} {id}: the pod's user namespace does not map it");
        Err(Failure::new(Stage::User, message))
    };
    if user.uids.outside(identity.uid).is_none() {
        return refuse("user", identity.uid);
    }
    let groups = std::iter::once(&identity.gid).chain(&identity.groups);
    match groups.copied().find(|group| user.gids.outside(*group).is_none()) {
        Some(group) => refuse("a member of group", group),
        None => Ok(()),
    }
}

/// Goes on as another process, a sibling, inside the user namespace: its root, with new mount and, as asked, PID
/// namespaces. The calling process tells the agent of it and ends.
pub(super) fn go_on_inside(
    user: &UserNamespace,
    pid_namespace: PidNamespace<'_>,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let mut namespaces = Namespaces::MOUNT;
    match pid_namespace {
        PidNamespace::New => namespaces |= Namespaces::PID,
        PidNamespace::Agent => {}
        PidNamespace::Join(target) => namespace::enter_of_process(target, Namespaces::PID)
            .during(Stage::Start, || "cannot join the PID namespace (has its first process ended?)")?,
    }
    enter(user)?;
    let doing = || "cannot clone the process inside the pod's user namespace";
    let (told, tell) = pipe_with(PipeFlags::CLOEXEC).during(Stage::Start, doing)?;
    let options = Clone3 { namespaces, sibling: true, ..Clone3::default() };
    match process::clone3(&options).during(Stage::Start, doing)? {
        Cloned::Parent { pid, pidfd } => {
            // If the agent cannot be told, it has gone or does not wait any more.
            let told = reporter.child(pid, pidfd.as_fd());
            process::exit_now(i32::from(told.is_err()))
        }
        Cloned::Child => {
            drop(tell);
            // Until the first one has said its last word.
            rustix::io::read(&told, &mut [0]).during(Stage::Start, doing)?;
            let prepare = || -> std::io::Result<()> {
                privilege::become_user(0, 0, &[])?;
                // Changing the user may have reset it.
                let hidden = rustix::process::DumpableBehavior::NotDumpable;
                rustix::process::set_dumpable_behavior(hidden)?;
                rustix::process::setsid()?;
                Ok(())
            };
            prepare().during(Stage::Start, || "cannot become the root of the pod's user namespace")
        }
    }
}

/// The calling process keeps its number and loses all privileges outside.
pub(super) fn enter(user: &UserNamespace) -> Result<(), Failure> {
    namespace::enter(user.as_fd(), Namespaces::USER)
        .during(Stage::Start, || "cannot join the pod's user namespace")
}
