//! UpdateResources: other limits for a container that runs.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::Server;
use super::container::{Container, Phase};
use super::failure::CallError;
use crate::protocol::messages::UpdateResources;
use crate::sandbox;

impl Server {
    pub(super) fn update_resources(&mut self, call: &UpdateResources) -> Result<(), CallError> {
        let container = self.container_mut(&call.container_id)?;
        if container.has_ended() {
            return Err(CallError::not_running(&container.id));
        }
        if call.resources.is_none() && call.oom_score_adj.is_none() {
            return Err(CallError::invalid("there are no resources to set"));
        }
        if let Some(resources) = &call.resources {
            container.leaf.apply(resources)?;
        }
        match call.oom_score_adj {
            Some(value) => set_oom_score(container, value),
            None => Ok(()),
        }
    }
}

/// Gives the value to every process of the container that has the one of before (one that chose its own keeps it), and
/// to the execs to come.
fn set_oom_score(container: &mut Container, value: i32) -> Result<(), CallError> {
    let failed = |error| {
        CallError::system(format_args!("cannot set the OOM score of container {}", container.id), error)
    };
    let before = match &container.phase {
        Phase::Running { process, .. } => process.oom_score_adj,
        _ => return Err(CallError::not_running(&container.id)),
    };
    let opened: Vec<(i32, OwnedFd)> =
        container.leaf.processes()?.into_iter().filter_map(|pid| Some((pid, open_process(pid)?))).collect();
    // A number that is still in the list belonged to the same process, or another of the container, all the time.
    let still_there = container.leaf.processes()?;
    for (_, directory) in opened.iter().filter(|(pid, _)| still_there.contains(pid)) {
        let present = read_oom_score(directory);
        if present.is_some() && (before.is_none() || present == before) {
            match sandbox::set_oom_score_adj(directory.as_fd(), value) {
                // It has just ended.
                Err(error) if matches!(error.raw_os_error(), Some(ESRCH | ENOENT)) => {}
                other => other.map_err(failed)?,
            }
        }
    }
    if let Phase::Running { process, .. } = &mut container.phase {
        process.oom_score_adj = Some(value);
    }
    Ok(())
}

const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();

/// None if it has ended.
fn open_process(pid: i32) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty()).ok()
}

fn read_oom_score(process: &OwnedFd) -> Option<i32> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(process, "oom_score_adj", flags, Mode::empty()).ok()?;
    let mut text = [0; 16];
    let length = rustix::io::read(&file, &mut text[..]).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}
