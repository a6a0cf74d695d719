//! Kills by the kernel for want of memory: counted, and watched for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, pread, read};

use std::os::fd::AsRawFd;

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, files};

/// Tells when the kernel kills a process of a cgroup for memory. Add it to an epoll set with [`Self::interest`] and
/// call [`Self::acknowledge`] when it fires. It costs one or two descriptors and no inotify instance (of which root
/// has 128 by default, for all pods of a node and kubelet together).
#[derive(Debug)]
pub struct OomWatch {
    /// v1: an eventfd. v2: `memory.events`, whose changes are told as priority data.
    signal: OwnedFd,
    /// v1: `memory.oom_control`.
    counter: Option<OwnedFd>,
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

impl OomWatch {
    /// What to wait for. Nothing else: on v2 the file is always readable.
    pub fn interest(&self) -> EventFlags {
        if self.counter.is_some() { EventFlags::IN } else { EventFlags::PRI }
    }

    /// Quietens the watch until the next event and returns the number of kills so far. On v1 the event comes when
    /// memory runs out, which can be a moment before the kill is counted, and also when the cgroup is removed; so a
    /// number that has not grown means "look again soon, and at the process's end".
    pub fn acknowledge(&self) -> Result<u64, CgroupError> {
        let fail = |errno: Errno| CgroupError::Io {
            action: "read the memory events".into(),
            cgroup: "that is watched".into(),
            source: errno.into(),
        };
        let file = match &self.counter {
            None => &self.signal,
            Some(counter) => {
                match read(&self.signal, &mut [0_u8; 8]) {
                    Ok(_) | Err(Errno::AGAIN) => {}
                    Err(errno) => return Err(fail(errno)),
                }
                counter
            }
        };
        let mut text = [0_u8; 1024];
        match pread(file, &mut text, 0) {
            Ok(length) => Ok(kills_in(&String::from_utf8_lossy(&text[..length]))),
            // The cgroup was removed.
            Err(Errno::NODEV) => Ok(0),
            Err(errno) => Err(fail(errno)),
        }
    }
}

/// The `oom_kill` line of `memory.events` (v2) and `memory.oom_control` (v1) alike.
fn kills_in(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

fn file_of(version: Version) -> &'static str {
    match version {
        Version::V1(_) => "memory.oom_control",
        Version::V2 => "memory.events",
    }
}

pub(super) fn kills(control: &Control) -> Result<u64, CgroupError> {
    let Some(version) = control.version_of("memory") else { return Ok(0) };
    match control.try_read(version, file_of(version)) {
        Ok(text) => Ok(kills_in(&text)),
        Err(error) if files::is_missing(&error) => Ok(0),
        Err(error) => Err(control.failed(format!("read {}", file_of(version)), error)),
    }
}

pub(super) fn watch(control: &Control) -> Result<Option<OomWatch>, CgroupError> {
    let Some(version) = control.version_of("memory") else { return Ok(None) };
    let base = control.directory(version)?;
    let file = file_of(version);
    let fail = |error| control.failed(format!("watch {file}"), error);
    let opened = files::open_for_reading(base, &control.path_of(version, file)).map_err(fail)?;
    match version {
        Version::V2 => {
            let watch = OomWatch { signal: opened, counter: None };
            // Reading once arms it: only changes after that are told.
            watch.acknowledge()?;
            Ok(Some(watch))
        }
        Version::V1(_) => {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let signal = eventfd(0, flags).map_err(|errno| fail(errno.into()))?;
            // cgroup-v1/memory.rst, "OOM Control": "<event_fd> <fd of memory.oom_control>".
            let registration = format!("{} {}", signal.as_raw_fd(), opened.as_raw_fd());
            control.write(version, "cgroup.event_control", &registration)?;
            Ok(Some(OomWatch { signal, counter: Some(opened) }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_read_from_either_version() {
        assert_eq!(kills_in("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(kills_in("low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(kills_in("under_oom 0\n"), 0);
    }
}
