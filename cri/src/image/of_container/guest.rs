//! The archive that a machine's agent makes of a container's writable layer, as bytes to read.

use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use hull_agent::protocol::messages::Archived;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::unreadable;
use crate::runtime::objects::Container;
use crate::runtime::{Result, Runtime};
use crate::sandbox::SandboxError;

/// How long a guest may send nothing, and how long its last word may be late.
const SILENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// An archive on its way. One that breaks off, or about which the agent does not say that it is whole, is an error: half
/// an archive may look like a whole one.
pub(super) struct GuestArchive {
    pipe: PipeReader,
    answer: Receiver<std::result::Result<Archived, SandboxError>>,
    whole: Option<Archived>,
}

impl Runtime {
    /// Asks for the archive. Inside the runtime, and read on a thread that may block.
    pub(super) fn guest_archive(
        self: &Arc<Self>,
        container: &Arc<Container>,
        pause: bool,
    ) -> Result<GuestArchive> {
        let (pipe, to) = io::pipe().map_err(|error| unreadable(container.id(), &error))?;
        let (told, answer) = sync_channel(1);
        let container = Arc::clone(container);
        tokio::spawn(async move {
            let place = container.pod.place();
            let archive = container.pod.launcher.archive(&place, container.id(), pause, to.into());
            // Whoever asked may be gone.
            let _ = told.send(archive.await);
        });
        Ok(GuestArchive { pipe, answer, whole: None })
    }
}

impl GuestArchive {
    /// What the agent said of an archive that was read to its end.
    pub(super) const fn whole(&self) -> Option<Archived> {
        self.whole
    }

    /// Waits until there is something to read, or the end.
    fn wait(&self) -> io::Result<()> {
        let mut ready = [PollFd::from_borrowed_fd(self.pipe.as_fd(), PollFlags::IN)];
        loop {
            match poll(&mut ready, Some(&SILENCE)) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the machine sends nothing")),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for GuestArchive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.whole.is_some() {
            return Ok(0);
        }
        self.wait()?;
        match self.pipe.read(buffer)? {
            0 => {
                let late = || io::Error::other("the machine's agent does not say that this is all");
                let wait = Duration::from_secs(SILENCE.tv_sec.unsigned_abs());
                let said = self.answer.recv_timeout(wait).map_err(|_| late())?;
                self.whole = Some(said.map_err(|error| io::Error::other(error.to_string()))?);
                Ok(0)
            }
            read => Ok(read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn archive(said: Option<std::result::Result<Archived, SandboxError>>) -> io::Result<String> {
        let (pipe, mut to) = io::pipe().unwrap();
        let (told, answer) = sync_channel(1);
        to.write_all(b"half").unwrap();
        drop(to);
        if let Some(said) = said {
            told.send(said).unwrap();
        }
        drop(told);
        let mut text = String::new();
        GuestArchive { pipe, answer, whole: None }.read_to_string(&mut text).map(|_| text)
    }

    #[test]
    fn an_archive_ends_well_only_if_the_agent_says_so() {
        assert_eq!(archive(Some(Ok(Archived::default()))).unwrap(), "half");
        let failed = archive(Some(Err(SandboxError::Source("the disk is broken".into())))).unwrap_err();
        assert_eq!(failed.to_string(), "the disk is broken");
        assert!(archive(None).unwrap_err().to_string().contains("does not say"));
    }
}
