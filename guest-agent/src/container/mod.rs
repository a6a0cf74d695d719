//! From a request to a running process: first a plan ([`ContainerPlan`], pure), then its execution ([`launch`], only
//! system calls).
//!
//! A container's process is cloned with its own mount namespace, assembles its root filesystem there, mounts what the
//! plan says, and becomes the program. So all mounts of a container are its own and go with it. Everything inside an
//! image is hostile: paths are resolved below the root and by descriptor, files are read with a bound.

mod devices;
mod exec;
mod execute;
mod failure;
mod guarded;
mod inner;
mod inside;
mod launch;
mod mount_plan;
mod mounts;
mod own_proc;
mod plan;
mod process_plan;
mod reaper;
mod report;
mod rootfs;
mod scaffold;
mod slots;
mod stdio;
mod users;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

pub use exec::{RunningContainer, exec};
pub use failure::{Failure, Stage};
pub use launch::launch;
pub(crate) use mounts::with_label;
pub use plan::{ContainerPlan, PlanError};
pub use reaper::start_reaper;
pub use slots::Slots;
pub use users::UserError;

use crate::cgroup::CgroupError;

/// Entrances to private parsers for the fuzz targets; no API.
#[doc(hidden)]
pub mod fuzzing {
    use super::users::WantedUser;
    use crate::protocol::messages;

    /// Looks a user up in an image's files. True if there is such a user.
    pub fn users(user: &messages::User, passwd: &[u8], group: &[u8]) -> bool {
        WantedUser::new(user).and_then(|wanted| wanted.resolve(passwd, group)).is_ok()
    }
}

/// A process that has become its program.
#[derive(Debug)]
pub struct Launched {
    /// As the agent's PID namespace numbers it.
    pub pid: i32,
    /// The process, a direct child of the agent.
    pub pidfd: OwnedFd,
    /// The user it runs as.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its supplementary groups, the primary one among them.
    pub groups: Vec<u32>,
    /// The primary end of its terminal, if it asked for one: in the container's own devpts, sized, blocking.
    pub terminal: Option<OwnedFd>,
    /// How long each part of the launch took, up to the program's execution.
    pub parts: Vec<(&'static str, Duration)>,
}

/// The process's own ends of its standard streams; what is absent is /dev/null. Not used for a process with a terminal.
#[derive(Debug, Default)]
pub struct ChildStdio {
    /// Descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// Descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// Descriptor 2.
    pub stderr: Option<OwnedFd>,
}

/// Where a process is numbered.
#[derive(Clone, Copy, Debug)]
pub enum PidNamespace<'a> {
    /// In a new namespace, as its first process.
    New,
    /// In the agent's (the host's).
    Agent,
    /// In the namespace behind this descriptor: a /proc/PID/ns/pid file, or a pidfd of any process in it.
    Join(BorrowedFd<'a>),
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The request asks for something that cannot be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A step of the launch failed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The process could not be put into its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl LaunchError {
    /// The errno behind it, 0 if there is none or it is not known.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Failed(failure) => failure.errno,
            Self::Plan(_) | Self::Cgroup(_) => 0,
        }
    }

    /// True if the request or the image is at fault (a missing program, an unknown user, …), not the machine.
    pub const fn is_invalid_request(&self) -> bool {
        match self {
            Self::Plan(_) => true,
            Self::Failed(failure) => {
                matches!(failure.stage, Stage::User | Stage::WorkingDirectory | Stage::Execute)
            }
            Self::Cgroup(_) => false,
        }
    }
}
