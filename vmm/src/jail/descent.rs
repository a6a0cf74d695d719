//! From the first process, which is the host's root, to its clone in namespaces of its own.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::namespace::{self, Namespaces};
use hull_sys::process::{Clone3, Cloned, clone3, exit_now};
use rustix::pipe::{PipeFlags, pipe_with};

use super::error::{Doing, JailError};
use crate::protocol::{Descriptors, HIGH_BASE, messages};

/// Ids of a user namespace end here; see [`id_map`].
const END_OF_IDS: u32 = 1 << 31;

/// The namespaces that every confined process has of its own.
const OWN: Namespaces = Namespaces::MOUNT
    .union(Namespaces::PID)
    .union(Namespaces::IPC)
    .union(Namespaces::UTS)
    .union(Namespaces::NET);

/// Whose user namespace the confined process lives in.
pub(super) enum Users<'a> {
    /// A new one with these ids.
    New(&'a messages::Jail),
    /// That of another process of the pod.
    Of(BorrowedFd<'a>),
}

/// The pod's cgroups, as the request's descriptors.
pub(super) struct Cgroups {
    unified: Option<OwnedFd>,
    tasks: Vec<OwnedFd>,
}

impl Cgroups {
    pub(super) fn take(jail: &messages::Jail, fds: &mut Descriptors) -> Result<Self, JailError> {
        let unified = jail.cgroup.map(|number| fds.take(number, "the cgroup's directory")).transpose()?;
        let tasks = jail.cgroup_tasks.iter().map(|number| fds.take(*number, "a cgroup's tasks file"));
        Ok(Self { unified, tasks: tasks.collect::<Result<_, _>>()? })
    }

    /// Moves the calling process, which has one thread, into the v1 hierarchies. A thread that moves only itself needs
    /// no lock against the machine's forks.
    fn enter_v1(&self) -> io::Result<()> {
        for file in &self.tasks {
            rustix::io::write(file, b"0")?;
        }
        Ok(())
    }
}

/// Clones the calling process into the namespaces and cgroups. Returns in the clone only, which is PID 1 of its
/// namespace and has its user namespace's root, with the clone's number in the caller's PID namespace; the caller ends
/// with status 0. An error is returned in whichever process can still report it, and the other one is gone.
pub(super) fn descend(
    users: Users<'_>,
    cgroups: Cgroups,
    oom_score_adj: Option<i32>,
) -> Result<i32, JailError> {
    let (receiver, sender) = pipe_with(PipeFlags::CLOEXEC).doing("make a pipe")?;
    if let Some(value) = oom_score_adj {
        set_oom_score_adj(value).doing("set the OOM score")?;
    }
    cgroups.enter_v1().doing("enter the pod's cgroups")?;
    let mut namespaces = OWN;
    match users {
        Users::New(_) => namespaces |= Namespaces::USER,
        Users::Of(fd) => namespace::enter(fd, Namespaces::USER).doing("join the pod's user namespace")?,
    }
    let options = Clone3 { namespaces, cgroup: cgroups.unified.as_ref().map(AsFd::as_fd), sibling: false };
    match clone3(&options).doing("clone into the pod's namespaces")? {
        Cloned::Parent { pid, pidfd } => {
            drop(receiver);
            let let_in = match users {
                Users::New(jail) => write_maps(pid, jail),
                Users::Of(_) => Ok(()),
            };
            let let_in = let_in.and_then(|()| {
                rustix::io::write(&sender, &pid.to_ne_bytes()).map(drop).doing("let the clone in")
            });
            match let_in {
                Ok(()) => exit_now(0),
                Err(error) => {
                    // Without maps it waits, and ends when the pipe does; sooner is better.
                    let _ = hull_sys::process::pidfd_send_signal(pidfd.as_fd(), 9);
                    Err(error)
                }
            }
        }
        Cloned::Child => {
            drop(sender);
            let mut pid = [0; size_of::<i32>()];
            let length = rustix::io::read(&receiver, &mut pid).doing("wait for the first process")?;
            if length != pid.len() {
                return Err(JailError::Abandoned);
            }
            hull_sys::privilege::become_user(0, 0, &[]).doing("become root of the user namespace")?;
            Ok(i32::from_ne_bytes(pid))
        }
    }
}

/// Lowering may be forbidden on this machine; then it stays.
fn set_oom_score_adj(value: i32) -> io::Result<()> {
    match fs::write("/proc/self/oom_score_adj", value.clamp(-1000, 1000).to_string()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}

fn write_maps(pid: i32, jail: &messages::Jail) -> Result<(), JailError> {
    let (uids, gids) = (id_map(jail.uid_base, jail)?, id_map(jail.gid_base, jail)?);
    fs::write(format!("/proc/{pid}/uid_map"), uids).doing("map the pod's user ids")?;
    fs::write(format!("/proc/{pid}/gid_map"), gids).doing("map the pod's group ids")
}

/// The pod's ids 0 to `ids` - 1 are the range of the host that is its own. Those above, to 2^31 - 1, are a range that
/// all pods share, so that files can be written through idmapped mounts by any user; no process ever runs as one of
/// them but while it makes a file.
fn id_map(base: u32, jail: &messages::Jail) -> Result<String, JailError> {
    let high = if jail.high_base == 0 { HIGH_BASE } else { jail.high_base };
    let wrong = |what: &str| JailError::Request(format!("{what} of the user namespace"));
    if jail.ids == 0 || jail.ids >= END_OF_IDS || base == 0 {
        return Err(wrong("the range of ids"));
    }
    let end = base.checked_add(jail.ids).ok_or_else(|| wrong("the end of the ids"))?;
    let count = END_OF_IDS - jail.ids;
    if end > high || high.checked_add(count).is_none() {
        return Err(wrong("the shared range of ids"));
    }
    Ok(format!("0 {base} {}\n{} {high} {count}\n", jail.ids, jail.ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jail(uid_base: u32, ids: u32, high_base: u32) -> messages::Jail {
        messages::Jail { uid_base, ids, high_base, ..messages::Jail::default() }
    }

    #[test]
    fn a_pod_has_its_own_range_and_shares_what_is_above() {
        let map = id_map(1_879_048_192, &jail(0, 65_536, 0)).unwrap();
        assert_eq!(map, "0 1879048192 65536\n65536 2147483648 2147418112\n");
    }

    #[test]
    fn ranges_that_overlap_or_include_the_hosts_root_are_refused() {
        for (base, ids, high) in [
            (0, 65_536, 0),
            (1, 0, 0),
            (1, END_OF_IDS, 0),
            (u32::MAX - 10, 65_536, 0),
            (HIGH_BASE - 1, 65_536, 0),
            (65_536, 65_536, 100_000),
            (65_536, 65_536, u32::MAX - 10),
        ] {
            assert!(id_map(base, &jail(0, ids, high)).is_err(), "{base} {ids} {high}");
        }
    }
}
