//! What a cloned child tells the agent between the clone and its execve, over a stream socket that execve closes.
//!
//! Frames of a tag byte, a little-endian u32 length and that many bytes. The end of the stream after `Executing` means
//! success; a `Failed` frame, or an end before `Executing`, means that there is no container.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_sys::descriptor::{recv_with_fds, send_with_fds};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::failure::{Failure, Stage};

/// Bytes of everything a child may say; its groups (at most 65536) are the greatest part.
const MAX_REPORT: usize = 1 << 20;

const IDENTITY: u8 = 1;
const TERMINAL: u8 = 2;
const EXECUTING: u8 = 3;
const FAILED: u8 = 4;
const CHILD: u8 = 5;

/// The user a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The supplementary groups, the primary one among them.
    pub(super) groups: Vec<u32>,
}

/// Everything that a child said before it became the container's program.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) identity: Identity,
    pub(super) terminal: Option<OwnedFd>,
    /// The process that becomes the program, if it is not the one that was cloned first.
    pub(super) child: Option<(i32, OwnedFd)>,
    /// How long each part of the launch took, up to the program's execution.
    pub(super) parts: Vec<(&'static str, Duration)>,
    executing: bool,
    failure: Option<Failure>,
}

/// Both ends, close-on-exec: the agent's, the child's.
pub(super) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Parts of a launch, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Part {
    Clone,
    Cgroup,
    Rootfs,
    Mounts,
    Guard,
    Pivot,
    Privileges,
}

impl Part {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Clone, "clone"),
        (Self::Cgroup, "enter the cgroups"),
        (Self::Rootfs, "root filesystem, user"),
        (Self::Mounts, "devices, mounts"),
        (Self::Guard, "masked paths"),
        (Self::Pivot, "streams, pivot_root"),
        (Self::Privileges, "limits, user, capabilities"),
    ];
}

/// The child's end.
#[derive(Debug)]
pub(super) struct Reporter {
    socket: OwnedFd,
    begun: Instant,
    /// Of each part its number and when it was done, in microseconds since the launch began.
    parts: RefCell<Vec<u8>>,
    /// The frame that tells the user. Told with [`Self::executing`], too: each word wakes the agent on another processor.
    identity: RefCell<Vec<u8>>,
}

impl Reporter {
    /// `begun` is when the launch began.
    pub(super) const fn new(socket: OwnedFd, begun: Instant) -> Self {
        Self { socket, begun, parts: RefCell::new(Vec::new()), identity: RefCell::new(Vec::new()) }
    }

    /// A part of the launch is done. Told with [`Self::executing`].
    pub(super) fn done(&self, part: Part) {
        let micros = u32::try_from(self.begun.elapsed().as_micros()).unwrap_or(u32::MAX);
        let mut parts = self.parts.borrow_mut();
        parts.push(part as u8);
        parts.extend(micros.to_le_bytes());
    }

    /// Whom the program will run as.
    pub(super) fn identity(&self, identity: &Identity) -> io::Result<()> {
        let numbers = [identity.uid, identity.gid];
        let body: Vec<u8> = numbers.iter().chain(&identity.groups).flat_map(|id| id.to_le_bytes()).collect();
        *self.identity.borrow_mut() = frame(IDENTITY, &body)?;
        Ok(())
    }

    pub(super) fn terminal(&self, primary: BorrowedFd<'_>) -> io::Result<()> {
        self.frame(TERMINAL, &[], &[primary])
    }

    /// Another process goes on with the start: its number and the process itself.
    pub(super) fn child(&self, pid: i32, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        self.frame(CHILD, &pid.to_le_bytes(), &[pidfd])
    }

    pub(super) fn executing(&self) -> io::Result<()> {
        let executing = frame(EXECUTING, &self.parts.borrow())?;
        self.send(&[self.identity.take(), executing].concat(), &[])
    }

    /// Best effort: if the agent is gone nobody wants to know.
    pub(super) fn failed(&self, failure: &Failure) {
        let mut body = vec![failure.stage as u8];
        body.extend(failure.errno.to_le_bytes());
        body.extend(failure.message.as_bytes());
        let _ = self.frame(FAILED, &body, &[]);
    }

    fn frame(&self, tag: u8, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(&frame(tag, body)?, fds)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut sent = send_with_fds(self.socket.as_fd(), bytes, fds)?;
        while sent < bytes.len() {
            sent += send_with_fds(self.socket.as_fd(), &bytes[sent..], &[])?;
        }
        Ok(())
    }
}

fn frame(tag: u8, body: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(body.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut bytes = vec![tag];
    bytes.extend(length.to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// How long only the end of a report is waited for, before it is read as it comes: one may be longer than what a socket
/// holds.
const WHOLE: Duration = Duration::from_millis(20);

/// Reads until the end of the stream, at most until `deadline`.
pub(super) fn collect(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<Report> {
    let (mut bytes, mut fds, mut buffer) = (Vec::new(), Vec::new(), [0; 4096]);
    // The word before the end says nothing yet, and waking for it would take the processor from whoever said it.
    await_event(socket, PollFlags::empty(), deadline.min(Instant::now() + WHOLE))?;
    loop {
        if !await_event(socket, PollFlags::IN, deadline)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match recv_with_fds(socket, &mut buffer, &mut fds)? {
            0 => return Ok(Report::parse(&bytes, fds)),
            count => bytes.extend(&buffer[..count]),
        }
        if bytes.len() > MAX_REPORT {
            return Err(io::Error::other("the starting process reported too much"));
        }
    }
}

/// Waits for one of these events or the end of the stream; false: neither came in time.
fn await_event(socket: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::time::Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&socket, events)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Report {
    fn parse(mut bytes: &[u8], fds: Vec<OwnedFd>) -> Self {
        let mut report = Self::default();
        let mut fds = fds.into_iter();
        while let Some((tag, body, rest)) = split_frame(bytes) {
            bytes = rest;
            match tag {
                IDENTITY => report.identity = parse_identity(body),
                TERMINAL => report.terminal = fds.next(),
                CHILD => report.child = parse_number(body).zip(fds.next()),
                EXECUTING => {
                    report.executing = true;
                    report.parts = parse_parts(body);
                }
                FAILED => report.failure = parse_failure(body),
                _ => {}
            }
        }
        report
    }

    /// The report of a process that became its program, or why it did not.
    pub(super) fn into_result(self) -> Result<Self, Failure> {
        match (&self.failure, self.executing) {
            (Some(failure), _) => Err(failure.clone()),
            (None, true) => Ok(self),
            (None, false) => Err(Failure::new(
                Stage::Start,
                "the process was killed before it could start its program (out of memory?)",
            )),
        }
    }
}

fn split_frame(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (head, rest) = bytes.split_at_checked(5)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    let (body, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    Some((head[0], body, rest))
}

/// How long each part took.
fn parse_parts(body: &[u8]) -> Vec<(&'static str, Duration)> {
    let mut before = 0;
    let part = |bytes: &[u8; 5]| {
        let (_, name) = Part::ALL.into_iter().find(|(part, _)| *part as u8 == bytes[0])?;
        let done = u32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        let took = done.saturating_sub(std::mem::replace(&mut before, done));
        Some((name, Duration::from_micros(took.into())))
    };
    body.as_chunks::<5>().0.iter().filter_map(part).collect()
}

fn parse_number(body: &[u8]) -> Option<i32> {
    Some(i32::from_le_bytes(body.try_into().ok()?))
}

fn parse_identity(body: &[u8]) -> Identity {
    let mut numbers = body.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let (uid, gid) = (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(u32::MAX));
    Identity { uid, gid, groups: numbers.collect() }
}

fn parse_failure(body: &[u8]) -> Option<Failure> {
    let (head, text) = body.split_at_checked(5)?;
    Some(Failure {
        stage: Stage::from_number(head[0])?,
        errno: i32::from_le_bytes([head[1], head[2], head[3], head[4]]),
        message: String::from_utf8_lossy(text).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_process_that_reached_execve_is_a_success() {
        let (agent, child) = channel().unwrap();
        let reporter = Reporter::new(child, Instant::now());
        let identity = Identity { uid: 7, gid: 8, groups: (0..5000).collect() };
        reporter.identity(&identity).unwrap();
        reporter.terminal(std::io::stdin().as_fd()).unwrap();
        reporter.done(Part::Clone);
        reporter.done(Part::Rootfs);
        reporter.executing().unwrap();
        drop(reporter);
        let report = collect(agent.as_fd(), soon()).unwrap().into_result().unwrap();
        let parts: Vec<&str> = report.parts.iter().map(|(name, _)| *name).collect();
        assert_eq!(parts, ["clone", "root filesystem, user"]);
        assert_eq!(report.identity, identity);
        assert!(report.terminal.is_some());
    }

    #[test]
    fn a_report_that_is_longer_than_what_a_socket_holds_arrives_whole() {
        let (agent, child) = channel().unwrap();
        let identity = Identity { uid: 7, gid: 8, groups: (0..65_536).collect() };
        let expected = identity.clone();
        let telling = std::thread::spawn(move || {
            let reporter = Reporter::new(child, Instant::now());
            reporter.identity(&identity).unwrap();
            reporter.executing().unwrap();
        });
        let report = collect(agent.as_fd(), soon()).unwrap().into_result().unwrap();
        telling.join().unwrap();
        assert!(report.identity == expected);
    }

    #[test]
    fn a_process_that_never_ends_its_report_is_given_up_in_time() {
        let (agent, child) = channel().unwrap();
        let reporter = Reporter::new(child, Instant::now());
        reporter.executing().unwrap();
        let error = collect(agent.as_fd(), Instant::now() + Duration::from_millis(60)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_failure_arrives_whole_even_after_executing() {
        let (agent, child) = channel().unwrap();
        let reporter = Reporter::new(child, Instant::now());
        let failure = Failure { stage: Stage::Execute, message: "exec: \"x\": näh".into(), errno: 2 };
        reporter.executing().unwrap();
        reporter.failed(&failure);
        drop(reporter);
        assert_eq!(collect(agent.as_fd(), soon()).unwrap().into_result().unwrap_err(), failure);
    }

    #[test]
    fn a_process_that_dies_silently_is_no_success() {
        let (agent, child) = channel().unwrap();
        drop(child);
        let failure = collect(agent.as_fd(), soon()).unwrap().into_result().unwrap_err();
        assert!(failure.message.contains("killed"), "{failure}");
    }

    #[test]
    fn a_process_that_hangs_is_given_up() {
        let (agent, _child) = channel().unwrap();
        let error = collect(agent.as_fd(), Instant::now() + Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
