use std::convert::Infallible;
use std::os::fd::AsFd;

use hull_sys::mount::{self, Attributes, MountAttrFlags as Attr, MoveMountFlags, OpenTreeFlags, Propagation};
use hull_sys::namespace::Namespaces;
use hull_sys::{privilege, process};
use rustix::fs::{CWD, Mode, OFlags};

use crate::cgroup::Leaf;
use crate::sandbox::{UserNamespace, layout};

use super::failure::{During, Failure, Stage};
use super::inside::Root;
use super::report::{Identity, Reporter};
use super::{LaunchError, Launched, PidNamespace, inner, launch, rootfs};

/// Starts the first process of a PID namespace that a pod's containers share: it reaps what is orphaned there, ignores
/// everything else, and ends with the agent or on SIGTERM from it; with it ends all that is in the namespace.
///
/// It is a copy of the agent, in sight of the pod's containers; so it has no descriptor, no capability, no_new_privs,
/// and an empty directory for a root.
///
/// The PID namespace belongs to the pod's user namespace, if it has one.
pub fn start_reaper(cgroup: &Leaf, user_namespace: Option<&UserNamespace>) -> Result<Launched, LaunchError> {
    let Some(user) = user_namespace else {
        return launch::start(cgroup, None, Namespaces::MOUNT, PidNamespace::New, |reporter| {
            launch::in_cgroup(cgroup.enter_v1_cpu())?;
            reaper_process(reporter)
        });
    };
    launch::start(cgroup, None, Namespaces::NONE, PidNamespace::Agent, |reporter| {
        launch::in_cgroup(cgroup.enter_v1_cpu())?;
        inner::go_on_inside(user, PidNamespace::New, reporter)?;
        reaper_process(reporter)
    })
}

fn reaper_process(reporter: &Reporter) -> Result<Infallible, Failure> {
    let doing = || "cannot prepare the pod's first process";
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during(Stage::Start, doing)?;
    // It leads a session already if it was made inside a user namespace.
    let _ = rustix::process::setsid();
    empty_root()?;
    privilege::set_no_new_privs().during(Stage::Privileges, doing)?;
    privilege::limit_bounding_set(0).during(Stage::Privileges, doing)?;
    privilege::become_user(0, 0, &[]).during(Stage::Privileges, doing)?;
    privilege::set_capabilities(0, 0, 0).during(Stage::Privileges, doing)?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .during(Stage::Start, doing)?;
    let identity = Identity { uid: 0, gid: 0, groups: Vec::new() };
    reporter.identity(&identity).during(Stage::Start, doing)?;
    reporter.executing().during(Stage::Start, doing)?;
    // Closes the reporter's socket with everything else: that is the success.
    process::reap_until_terminated()
}

/// /proc/1/root leads here for the containers that share the namespace.
fn empty_root() -> Result<(), Failure> {
    let change = || -> std::io::Result<Root> {
        let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
        mount::set_attributes_at(CWD, c"/", true, &private)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = mount::open_tree(CWD, layout::EMPTY, flags)?;
        let set = Attr::MOUNT_ATTR_RDONLY
            | Attr::MOUNT_ATTR_NOSUID
            | Attr::MOUNT_ATTR_NODEV
            | Attr::MOUNT_ATTR_NOEXEC;
        mount::set_attributes(tree.as_fd(), false, &Attributes { set, ..Attributes::default() })?;
        mount::move_mount(&tree, "", CWD, layout::ROOTFS, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root::new(rustix::fs::open(layout::ROOTFS, open, Mode::empty())?))
    };
    let root = change().during(Stage::Rootfs, || "cannot make an empty root for the pod's first process")?;
    rootfs::pivot(&root)
}
