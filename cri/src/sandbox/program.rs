//! The programs that pods begin with: agents and VMMs.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec};

/// A running program that does not know yet which pod it is for. Dropped, it ends by itself.
#[derive(Debug)]
pub(super) struct Program {
    /// Its standard input.
    pub(super) socket: UnixStream,
    /// The number of its first process; 0 if that has ended already.
    pub(super) pid: u32,
}

impl Program {
    /// Starts `path`, which writes what it has to say to `log`. `name` is for hulld's own log. Must be called inside the
    /// runtime, which waits for the first process.
    pub(super) fn start(path: &Path, log: fs::File, name: impl Display + Send + 'static) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // Only what posix_spawn can do: no code of ours runs between fork and exec.
        let mut child = tokio::process::Command::new(path)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        let pid = child.id().unwrap_or_default();
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) if status.success() => {}
                // Whoever waits for the pod reports what that means; an unused program ends like this, too.
                Ok(status) => tracing::debug!(pid, %status, "the first process of {name} failed"),
                Err(error) => tracing::warn!(pid, %error, "cannot wait for the first process of {name}"),
            }
        });
        Ok(Self { socket: ours, pid })
    }

    /// Whether it still has its end of the socket. One that was killed while it waited is nobody's agent, and its number
    /// may be another process's by now.
    pub(super) fn lives(&self) -> bool {
        // Its first word would be an answer: that it says anything, too, means that it is not waiting. A hang-up comes
        // without being asked for.
        let mut socket = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut socket, Some(&now)).is_ok_and(|ready| ready == 0)
    }
}
