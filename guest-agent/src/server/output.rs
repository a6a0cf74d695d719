//! Where the output of a container goes, and what the event loop watches for it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::container::Container;
use super::failure::CallError;
use super::poll::{Poll, Source};
use crate::container::Slots;
use crate::guest::LOG_PORT;
use crate::guest::hello::frame;
use crate::protocol::messages::{LogHello, StartContainer};
use crate::stdio::{Forward, SinkInterest, Stream};

/// A log file of the agent's own, or the connections over which somebody else gets what to log.
pub(super) struct Log {
    pub(super) file: Option<OwnedFd>,
    pub(super) stdout: Option<Forward>,
    pub(super) stderr: Option<Forward>,
}

impl Log {
    pub(super) fn new(spec: &StartContainer, slots: &Slots<'_>) -> Result<Self, CallError> {
        let mut log = Self { file: None, stdout: None, stderr: None };
        let Some(slot) = spec.log else { return Ok(log) };
        if let Some(id) = slots.log(slot) {
            let connect = |stream| {
                forward(id, stream).map_err(|error| CallError::system("cannot reach the log", error))
            };
            log.stdout = Some(connect(0)?);
            let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
            log.stderr = (!terminal).then(|| connect(1)).transpose()?;
            return Ok(log);
        }
        let file = slots.get(slot).ok_or_else(|| CallError::no_slot("the log file", slot))?;
        log.file = Some(
            file.try_clone_to_owned()
                .map_err(|error| CallError::system("cannot keep the log file", error))?,
        );
        Ok(log)
    }
}

fn forward(id: &str, stream: u32) -> io::Result<Forward> {
    let socket = hull_sys::vsock::connect(hull_sys::vsock::HOST, LOG_PORT)?;
    Forward::new(socket, frame(&LogHello { container_id: id.into(), stream }))
}

/// Makes the event loop watch what the container's outputs need next.
pub(super) fn watch_all(container: &mut Container, poll: &Poll) -> io::Result<()> {
    watch(container, Stream::Stdout, poll).and(watch(container, Stream::Stderr, poll))
}

/// The same for one of them.
pub(super) fn watch(container: &mut Container, stream: Stream, poll: &Poll) -> io::Result<()> {
    let source = Source::Output(container.serial, stream);
    let Some(output) = container.stream(stream) else { return Ok(()) };
    let (wanted, had) = (output.interest(), output.watched);
    for pipe in output.stuck_taps() {
        // Once each time: a reader that has gone would wake the loop over and over.
        let once = EventFlags::OUT | EventFlags::ONESHOT;
        if poll.change(&pipe, source, once).is_err() {
            poll.add_for(&pipe, source, once)?;
        }
    }
    if wanted == had {
        return Ok(());
    }
    output.watched = wanted;
    let flags = |interest| match interest {
        SinkInterest::None => EventFlags::empty(),
        SinkInterest::Read => EventFlags::IN,
        SinkInterest::Write => EventFlags::OUT,
    };
    if let Some(sink) = output.forward().filter(|_| wanted.sink != had.sink) {
        match (had.sink, wanted.sink) {
            // Not watched at all rather than for nothing: a hang-up would wake the loop over and over.
            (_, SinkInterest::None) => poll.remove(sink),
            (SinkInterest::None, wanted) => poll.add_for(sink, source, flags(wanted))?,
            (_, wanted) => poll.change(sink, source, flags(wanted))?,
        }
    }
    match (had.source, wanted.source) {
        (false, true) => poll.add(output, source),
        (true, false) => {
            poll.remove(output);
            Ok(())
        }
        _ => Ok(()),
    }
}

impl Container {
    /// Whether somebody else has not got all of its output yet.
    pub(super) fn waits_for_log(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().flatten().any(|output| output.waits_for_sink())
    }
}
