//! A container's writable layer as a stream: written by a copy of the agent, so that the agent goes on meanwhile.

use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use hull_archive::{Marks, Options, Summary, write_tree};
use hull_sys::confine;
use hull_sys::process::{self, Clone3, Cloned};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::Server;
use super::super::exec::own_end;
use super::super::failure::CallError;
use super::super::report;
use crate::container::Slots;
use crate::guest::ranges::Kind;
use crate::protocol::messages::{Archive, Archived, response::Outcome};

/// Most archives at a time.
const MAX_ARCHIVES: usize = 4;
/// Longest result of a writer: it fits into its pipe, so no writer waits for the agent.
const MAX_RESULT: usize = 2048;
/// Bytes that are written at a time.
const CHUNK: usize = 64 << 10;

/// An archive that is being written.
pub(super) struct Archiving {
    pid: i32,
    connection: u32,
    request: u64,
    container: String,
    paused: bool,
    /// What the writer says last: a byte 1, eight bytes of entries and eight of content, or a byte 0 and a sentence.
    result: OwnedFd,
}

impl Server {
    /// Starts the writer; the answer comes from [`Self::archive_ended`].
    pub(in super::super) fn start_archive(
        &mut self,
        connection: u32,
        request: u64,
        call: &Archive,
        slots: &Slots<'_>,
    ) -> Result<(), CallError> {
        let Some(machine) = &mut self.guest else { return Err(CallError::only_in_a_guest("the call")) };
        if machine.archives.len() >= MAX_ARCHIVES {
            return Err(CallError::precondition(format!(
                "{MAX_ARCHIVES} archives are being written already"
            )));
        }
        let container = self
            .containers
            .iter()
            .find(|container| container.id == call.container_id)
            .ok_or_else(|| CallError::no_container(&call.container_id))?;
        let doing = || format!("cannot archive the files of container {}", container.id);
        let path = container.holdings.scratch().and_then(|range| machine.ranges.path(Kind::Scratch, range));
        let path = path.ok_or_else(|| CallError::precondition(format!("{}: they are not here", doing())))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let upper = rustix::fs::openat(CWD, format!("{path}/upper"), flags, Mode::empty())
            .map_err(|error| CallError::system(doing(), error))?;
        let stream = own_end(slots, call.slot, "the archive's stream")?;
        let (result, told) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|error| CallError::system(doing(), error))?;
        let paused = call.pause && container.running().is_some();
        if paused {
            container.leaf.freeze().map_err(|error| CallError::from(error).during(doing()))?;
        }
        match process::clone3(&Clone3::default()) {
            Ok(Cloned::Child) => be_writer(upper, stream, told),
            Ok(Cloned::Parent { pid, .. }) => {
                let container = container.id.clone();
                machine.archives.push(Archiving { pid, connection, request, container, paused, result });
                Ok(())
            }
            Err(error) => {
                let error = CallError::system(doing(), error);
                if paused {
                    self.let_go_on(&call.container_id);
                }
                Err(error)
            }
        }
    }

    /// Whether this process writes an archive.
    pub(in super::super) fn is_archiving(&self, pid: i32) -> bool {
        let machine = self.guest.as_ref();
        machine.is_some_and(|machine| machine.archives.iter().any(|archive| archive.pid == pid))
    }

    /// A writer has ended, and was waited for: answers.
    pub(in super::super) fn archive_ended(&mut self, pid: i32) {
        let Some(machine) = &mut self.guest else { return };
        let Some(index) = machine.archives.iter().position(|archive| archive.pid == pid) else { return };
        let Archiving { connection, request, container, paused, result, .. } =
            machine.archives.swap_remove(index);
        let others = machine.archives.iter().any(|other| other.paused && other.container == container);
        if paused && !others {
            self.let_go_on(&container);
        }
        let outcome = match read_result(result) {
            Ok(archived) => Outcome::Archived(archived),
            Err(reason) => CallError::system(
                format_args!("cannot archive the files of container {container}"),
                io::Error::other(reason),
            )
            .into_outcome(),
        };
        self.connections.respond(connection, request, outcome, &self.poll);
    }

    fn let_go_on(&self, container: &str) {
        let Ok(container) = self.container(container) else { return };
        if let Err(error) = container.leaf.thaw() {
            report::line(format_args!("cannot let container {} go on: {error}", container.id));
        }
    }
}

/// The rest of the writer's life. It has nothing open but what it needs: whoever waits for the end of another of the
/// agent's descriptors is not held up.
fn be_writer(upper: OwnedFd, stream: OwnedFd, told: OwnedFd) -> ! {
    let wrote = confine::close_all_but(&[upper.as_fd(), stream.as_fd(), told.as_fd()])
        .map_err(|error| error.to_string())
        .and_then(|()| write(&upper, stream));
    let mut said = Vec::new();
    match &wrote {
        Ok(summary) => {
            said.push(1);
            said.extend(summary.entries.to_le_bytes());
            said.extend(summary.content.to_le_bytes());
        }
        Err(reason) => {
            said.push(0);
            said.extend(reason.as_bytes());
        }
    }
    said.truncate(MAX_RESULT);
    // The agent takes silence for a failure.
    let _ = rustix::io::write(&told, &said);
    process::exit_now(i32::from(wrote.is_err()))
}

fn write(upper: &OwnedFd, stream: OwnedFd) -> Result<Summary, String> {
    let blocking = rustix::io::ioctl_fionbio(&stream, false);
    blocking.map_err(|error| error.to_string())?;
    let mut out = BufWriter::with_capacity(CHUNK, std::fs::File::from(stream));
    let options = Options { marks: Marks::ToWhiteouts, ..Options::default() };
    let summary = write_tree(upper.as_fd(), &mut out, &options).map_err(|error| error.to_string())?;
    out.flush().map_err(|error| error.to_string())?;
    Ok(summary)
}

/// The writer has ended: all that it said is in the pipe, and nobody else can write.
fn read_result(result: OwnedFd) -> Result<Archived, String> {
    let mut said = Vec::new();
    let read = std::fs::File::from(result).take(MAX_RESULT as u64).read_to_end(&mut said);
    read.map_err(|error| error.to_string())?;
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).ok();
    match said.split_first() {
        Some((1, rest)) if rest.len() == 16 => {
            let (entries, content) = rest.split_at(8);
            match (number(entries), number(content)) {
                (Some(entries), Some(content)) => Ok(Archived { entries, content }),
                _ => Err("its writer said nonsense".into()),
            }
        }
        Some((0, reason)) => Err(String::from_utf8_lossy(reason).into_owned()),
        _ => Err("its writer ended unexpectedly".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: &[u8]) -> Result<Archived, String> {
        let (result, told) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&told, bytes).unwrap();
        drop(told);
        read_result(result)
    }

    #[test]
    fn only_what_was_said_whole_is_a_whole_archive() {
        let whole = [&[1][..], &7_u64.to_le_bytes(), &9_u64.to_le_bytes()].concat();
        assert_eq!(said(&whole).unwrap(), Archived { entries: 7, content: 9 });
        assert!(said(&whole[..16]).is_err());
        assert_eq!(said(b"\0no room").unwrap_err(), "no room");
        assert!(said(b"").unwrap_err().contains("unexpectedly"));
    }

    #[test]
    fn the_upper_directory_goes_down_the_stream() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "content").unwrap();
        let upper = rustix::fs::open(directory.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let summary = write(&upper.unwrap(), theirs.into()).unwrap();
        assert_eq!((summary.entries, summary.content), (1, 7));
        let mut archive = Vec::new();
        ours.read_to_end(&mut archive).unwrap();
        assert_eq!(archive.len() as u64, summary.bytes);
        assert!(archive.windows(7).any(|bytes| bytes == b"content"));
    }
}
