//! Everything in a cgroup stands still for a while.

use std::thread::sleep;
use std::time::{Duration, Instant};

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, files};

/// How long processes may take to stop: those in uninterruptible sleep stop when they wake up.
const PATIENCE: Duration = Duration::from_secs(2);

/// Freezes the cgroup and waits until all in it stands still; on failure it is thawed again.
pub(super) fn freeze(control: &Control) -> Result<(), CgroupError> {
    let frozen = set(control, true).and_then(|()| wait(control));
    if frozen.is_err() {
        // The failure that made this necessary is what the caller hears of.
        let _ = set(control, false);
    }
    frozen
}

/// Lets all go on. One that is not frozen, or is gone, is as it should be.
pub(super) fn thaw(control: &Control) -> Result<(), CgroupError> {
    match set(control, false) {
        Err(CgroupError::MissingController { .. }) => Ok(()),
        Err(CgroupError::Io { source, .. }) if files::is_missing(&source) => Ok(()),
        other => other,
    }
}

/// The unified hierarchy's switch (cgroup-v2.rst, "cgroup.freeze"), which hybrid machines have too since 5.2; else v1's.
fn set(control: &Control, frozen: bool) -> Result<(), CgroupError> {
    let value = if frozen { "1" } else { "0" };
    match control.try_write(Version::V2, "cgroup.freeze", value) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound || files::is_missing(&error) => {}
        Err(error) => return Err(control.failed_write("cgroup.freeze", value, error)),
    }
    match control.version_of("freezer") {
        Some(freezer) => control.write(freezer, "freezer.state", if frozen { "FROZEN" } else { "THAWED" }),
        None => Err(CgroupError::MissingController {
            controller: "freezer".to_owned(),
            limit: "cgroup.freeze".to_owned(),
            cgroup: control.to_string(),
        }),
    }
}

fn wait(control: &Control) -> Result<(), CgroupError> {
    let start = Instant::now();
    loop {
        let stands_still = match control.try_read(Version::V2, "cgroup.events") {
            Ok(events) => events.lines().any(|line| line == "frozen 1"),
            Err(_) => match control.version_of("freezer") {
                Some(freezer) => control
                    .try_read(freezer, "freezer.state")
                    .map_err(|error| control.failed("read freezer.state of", error))?
                    .starts_with("FROZEN"),
                None => false,
            },
        };
        if stands_still {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            let waited_ms = start.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
            return Err(CgroupError::Busy { cgroup: control.to_string(), waited_ms });
        }
        sleep(Duration::from_millis(1));
    }
}
