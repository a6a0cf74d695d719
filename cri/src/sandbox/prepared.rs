//! Agents' programs that run before anybody asks for their pods: to start one takes longer than all else that
//! RunPodSandbox does.
//!
//! A prepared program has left the host's mounts already, waits for its first request and knows of no pod. It is nobody's
//! to clear up: when hulld lets go of its socket, however hulld ends, it ends. Its log has no name until the program is
//! given to a pod.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hull_agent::protocol::FrameWriter;
use hull_agent::protocol::messages::{CgroupLayout, Message, Prepare, Request, message, request};
use hull_network::refill::Refill;
use rustix::fs::{AtFlags, CWD, OFlags};

use super::program::Program;
use crate::server::descriptors;

/// How many wait: the pods that a node gets at once, and what they cost an idle one, some 100 KiB each.
const COUNT: usize = 4;

/// Starts an agent's program, which writes what it has to say to `log`.
pub(super) fn start(program: &Path, log: fs::File) -> io::Result<Program> {
    let program = Program::start(program, log, "an agent")?;
    // It waits for its first request, so nothing of the pod has hulld's own limit by then.
    descriptors::restore_for(Some(program.pid));
    Ok(program)
}

/// Programs that wait for pods.
#[derive(Debug)]
pub(super) struct Prepared {
    program: PathBuf,
    /// On the file system of the pods' directories.
    state: PathBuf,
    /// What each is told at once.
    request: Option<Message>,
    waiting: Mutex<Vec<Waiting>>,
    refill: Arc<Refill>,
}

#[derive(Debug)]
struct Waiting {
    program: Program,
    log: fs::File,
    version: Version,
}

/// Tells a program from another one that was installed in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Version {
    fn of(program: &Path) -> io::Result<Self> {
        let facts = fs::metadata(program)?;
        let changed = (facts.ctime(), facts.ctime_nsec());
        Ok(Self { device: facts.dev(), inode: facts.ino(), changed })
    }
}

impl Prepared {
    /// They prepare for pods without labels on this layout, if one is given. None wait before the first was asked for: a
    /// node may have machines only. Must be called inside the runtime.
    pub(super) fn new(program: &Path, state: &Path, layout: Option<&CgroupLayout>) -> Arc<Self> {
        let refill = Arc::new(Refill::default());
        let (program, state) = (program.to_owned(), state.to_owned());
        let request = layout.map(|layout| {
            let call = request::Call::Prepare(Prepare { cgroups: Some(layout.clone()) });
            let request = Request { slots: Vec::new(), call: Some(call) };
            Message { id: 0, body: Some(message::Body::Request(request)) }
        });
        let waiting = Mutex::default();
        let prepared = Arc::new(Self { program, state, request, waiting, refill: Arc::clone(&refill) });
        let weak = Arc::downgrade(&prepared);
        tokio::spawn(async move {
            loop {
                refill.due(|| weak.upgrade().map_or(0, |prepared| prepared.left())).await;
                // Whoever drops them wakes this task.
                let Some(prepared) = weak.upgrade() else { return };
                if let Err(error) = prepared.fill() {
                    tracing::debug!(%error, "no agent is prepared; each starts when it is needed");
                }
            }
        });
        prepared
    }

    /// A program that waits, with its log at `log`, a path below `state`. `None`: there is none, and one has to be started.
    pub(super) fn take(&self, log: &Path) -> Option<Program> {
        self.refill.taken();
        let version = Version::of(&self.program).ok()?;
        loop {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if waiting.version == version && waiting.program.lives() {
                return give_name(&waiting.log, log).ok().map(|()| waiting.program);
            }
        }
    }

    fn left(&self) -> usize {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn fill(&self) -> io::Result<()> {
        let version = Version::of(&self.program)?;
        let missing = || {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|waiting| waiting.version == version && waiting.program.lives());
            COUNT.saturating_sub(waiting.len())
        };
        for _ in 0..missing() {
            let log = nameless(&self.state)?;
            let program = start(&self.program, log.try_clone()?)?;
            if let Some(request) = &self.request {
                let mut writer = FrameWriter::new();
                writer.push(request, Vec::new()).map_err(io::Error::other)?;
                // A new socket takes a small frame at once.
                writer.write_to(program.socket.as_fd())?;
            }
            let waiting = Waiting { program, log, version };
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(waiting);
        }
        Ok(())
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.refill.taken();
    }
}

/// A file that is gone with its last descriptor, unless it gets a name.
fn nameless(directory: &Path) -> io::Result<fs::File> {
    let flags = (OFlags::TMPFILE | OFlags::APPEND).bits();
    fs::OpenOptions::new().write(true).mode(0o600).custom_flags(flags.cast_signed()).open(directory)
}

fn give_name(file: &fs::File, path: &Path) -> io::Result<()> {
    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, descriptor, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Duration;

    /// A program that says who it is and waits, as an agent does, until its socket is closed.
    fn program(directory: &Path, says: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = directory.join("program");
        let new = directory.join("program.new");
        fs::write(&new, format!("#!/bin/sh\necho {says} >&2\nread -r line\n")).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o700)).unwrap();
        fs::rename(new, &path).unwrap();
        path
    }

    async fn taken(prepared: &Prepared, log: &Path) -> Program {
        for _ in 0..1000 {
            if let Some(program) = prepared.take(log) {
                return program;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("none is prepared");
    }

    fn waiting(prepared: &Prepared) -> Vec<u32> {
        prepared.waiting.lock().unwrap().iter().map(|waiting| waiting.program.pid).collect()
    }

    /// Waits until as many are prepared as ever are: their numbers.
    async fn all_wait(prepared: &Prepared) -> Vec<u32> {
        for _ in 0..1000 {
            let pids = waiting(prepared);
            if pids.len() == COUNT {
                return pids;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} are prepared", waiting(prepared).len());
    }

    async fn becomes(log: &Path, wanted: &str) {
        for _ in 0..1000 {
            if fs::read_to_string(log).unwrap() == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{}", fs::read_to_string(log).unwrap());
    }

    #[tokio::test]
    async fn a_prepared_program_writes_into_the_log_of_the_pod_that_it_is_given_to() {
        let directory = tempfile::tempdir().unwrap();
        let prepared = Prepared::new(&program(directory.path(), "first"), directory.path(), None);
        let log = directory.path().join("agent.log");
        assert!(prepared.take(&log).is_none(), "none is made before one was needed");

        let mut one = taken(&prepared, &log).await;
        becomes(&log, "first\n").await;
        // Where a log is already, whoever asks starts another, and the one that could not be given is gone
        all_wait(&prepared).await;
        assert!(prepared.take(&log).is_none());
        assert_eq!(waiting(&prepared).len(), COUNT - 1);
        // And it ends when it is told so, or its socket is closed
        one.socket.write_all(b"\n").unwrap();
        let _ = one.socket.read(&mut [0]);
        for _ in 0..1000 {
            if !Path::new(&format!("/proc/{}", one.pid)).exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} still runs", one.pid);
    }

    #[tokio::test]
    async fn a_program_that_was_killed_while_it_waited_is_given_to_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let prepared = Prepared::new(&program(directory.path(), "here"), directory.path(), None);
        drop(taken(&prepared, &directory.path().join("first")).await);
        let dead = all_wait(&prepared).await;
        for pid in &dead {
            let pid = rustix::process::Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        for pid in &dead {
            for _ in 0..1000 {
                if !Path::new(&format!("/proc/{pid}")).exists() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let log = directory.path().join("second");
        let next = taken(&prepared, &log).await;
        assert!(!dead.contains(&next.pid));
        becomes(&log, "here\n").await;
    }

    #[tokio::test]
    async fn a_program_that_was_replaced_is_given_to_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let prepared = Prepared::new(&program(directory.path(), "old"), directory.path(), None);
        drop(taken(&prepared, &directory.path().join("one")).await);
        // When another is installed
        program(directory.path(), "new");
        let log = directory.path().join("two");
        let _two = taken(&prepared, &log).await;
        becomes(&log, "new\n").await;
    }
}
