//! The end of everything in a cgroup.

use std::os::fd::BorrowedFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, files, tree};

/// How long the v1 way goes on against a cgroup that refills itself.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn kill(control: &Control) -> Result<(), CgroupError> {
    match control.try_write(Version::V2, "cgroup.kill", "1") {
        Ok(()) => return Ok(()),
        // No unified hierarchy, or a kernel before 5.14. A leaf that is gone from there may still exist in v1.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound || files::is_missing(&error) => {}
        // A threaded cgroup has no kill file for its own; its domain's processes are found the other way.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => {}
        Err(error) => return Err(control.failed_write("cgroup.kill", "1", error)),
    }
    kill_one_by_one(control)
}

/// Freezes the cgroup, so that nothing in it can fork away, signals all, and thaws it, until it is empty.
pub(super) fn kill_one_by_one(control: &Control) -> Result<(), CgroupError> {
    let start = Instant::now();
    // Without the freezer the loop still ends, as the signal reaches forks faster than they are made.
    let freezer = control.version_of("freezer").filter(|freezer| control.leaf_in(*freezer).is_some());
    loop {
        let before = processes(control)?;
        if before.is_empty() {
            return Ok(());
        }
        if let Some(freezer) = freezer {
            // Nor does it need to succeed.
            let _ = control.try_write(freezer, "freezer.state", "FROZEN");
        }
        for pid in processes(control)? {
            if let Some(pid) = Pid::from_raw(pid) {
                // One that ended meanwhile is what was wanted.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if let Some(freezer) = freezer {
            control.write(freezer, "freezer.state", "THAWED")?;
        }
        if start.elapsed() > PATIENCE {
            let waited_ms = start.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
            return Err(CgroupError::Busy { cgroup: control.to_string(), waited_ms });
        }
        sleep(Duration::from_millis(2));
    }
}

/// The hierarchy that knows best who is inside: the unified one, else the v1 one that containers can least leave.
fn census(control: &Control) -> Option<(Version, BorrowedFd<'_>)> {
    let directories = &control.directories;
    let of = |version| Some((version, directories.of(version)?));
    let v1 = || ["pids", "memory", "freezer"].into_iter().find_map(|name| control.version_of(name));
    of(Version::V2).or_else(|| of(v1()?)).or_else(|| directories.all().next())
}

pub(super) fn processes(control: &Control) -> Result<Vec<i32>, CgroupError> {
    let Some((version, base)) = census(control) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    tree::processes(base, control.leaf_in(version).unwrap_or("."), &mut found)
        .map_err(|error| control.failed("list the processes", error))?;
    Ok(found)
}
