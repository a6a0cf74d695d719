//! The set of descriptors that the event loop waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use crate::stdio::Stream;

/// Events taken in one wait.
const BATCH: usize = 16;

/// What became ready. The numbers are serials, never reused for something else in one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A child ended.
    Children,
    /// Somebody connects.
    Listener,
    /// A control connection.
    Connection(u32),
    /// An output of a container.
    Output(u32, Stream),
    /// Memory ran out in a container's cgroup.
    Oom(u32),
    /// The terminal of an exec, or one of its caller's ends.
    Exec(u32),
    /// What an attached caller typed, or the stdin of the container that it is for.
    Input(u32),
    /// A connection to a guest that has not said yet what it is.
    Greeting(u32),
    /// Streams of a guest and what they are joined with.
    Relay(u32),
}

impl Source {
    const fn to_data(self) -> u64 {
        let (kind, serial) = match self {
            Self::Children => (0, 0),
            Self::Listener => (1, 0),
            Self::Connection(serial) => (2, serial),
            Self::Output(serial, Stream::Stdout) => (3, serial),
            Self::Output(serial, Stream::Stderr) => (4, serial),
            Self::Oom(serial) => (5, serial),
            Self::Exec(serial) => (6, serial),
            Self::Input(serial) => (7, serial),
            Self::Greeting(serial) => (8, serial),
            Self::Relay(serial) => (9, serial),
        };
        (kind << 32) | serial as u64
    }

    const fn from_data(data: u64) -> Option<Self> {
        let serial = data as u32;
        Some(match data >> 32 {
            0 => Self::Children,
            1 => Self::Listener,
            2 => Self::Connection(serial),
            3 => Self::Output(serial, Stream::Stdout),
            4 => Self::Output(serial, Stream::Stderr),
            5 => Self::Oom(serial),
            6 => Self::Exec(serial),
            7 => Self::Input(serial),
            8 => Self::Greeting(serial),
            9 => Self::Relay(serial),
            _ => return None,
        })
    }
}

/// An epoll set.
#[derive(Debug)]
pub(super) struct Poll(OwnedFd);

/// What one wait brought.
pub(super) struct Sources([Option<Source>; BATCH]);

impl Sources {
    pub(super) fn iter(&self) -> impl Iterator<Item = Source> {
        self.0.iter().copied().flatten()
    }
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Waits for `fd` to be readable, as long as it is.
    pub(super) fn add(&self, fd: &impl AsFd, source: Source) -> io::Result<()> {
        self.add_for(fd, source, EventFlags::IN)
    }

    pub(super) fn add_for(&self, fd: &impl AsFd, source: Source, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(source.to_data()), interest)?)
    }

    pub(super) fn change(&self, fd: &impl AsFd, source: Source, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, EventData::new_u64(source.to_data()), interest)?)
    }

    /// Forgets `fd`. Needed before closing it only if another process has the same open file.
    pub(super) fn remove(&self, fd: &impl AsFd) {
        // Not in the set: then nothing is to be done.
        let _ = epoll::delete(&self.0, fd);
    }

    /// Waits until something is ready, at most until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> io::Result<Sources> {
        let timeout = deadline.map(|deadline| {
            // Rounded up to milliseconds, the unit of epoll_wait: waking early would spin.
            let left = deadline.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
            let left = i64::try_from(left).unwrap_or(i64::MAX).min(24 * 3600 * 1000);
            Timespec { tv_sec: left / 1000, tv_nsec: left % 1000 * 1_000_000 }
        });
        let mut events = [MaybeUninit::<Event>::uninit(); BATCH];
        let events = match epoll::wait(&self.0, &mut events, timeout.as_ref()) {
            Ok((events, _)) => &*events,
            Err(rustix::io::Errno::INTR) => &[],
            Err(error) => return Err(error.into()),
        };
        let mut sources = [None; BATCH];
        for (source, event) in sources.iter_mut().zip(events) {
            let data = event.data;
            *source = Source::from_data(data.u64());
        }
        Ok(Sources(sources))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_survives_the_kernel() {
        for serial in [0, 1, u32::MAX] {
            for source in [
                Source::Children,
                Source::Listener,
                Source::Connection(serial),
                Source::Output(serial, Stream::Stdout),
                Source::Output(serial, Stream::Stderr),
                Source::Oom(serial),
                Source::Exec(serial),
                Source::Input(serial),
                Source::Greeting(serial),
                Source::Relay(serial),
            ] {
                assert_eq!(Source::from_data(source.to_data()), Some(source));
            }
        }
        assert_eq!(Source::from_data(u64::MAX), None);
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_not_before() {
        let poll = Poll::new().unwrap();
        let start = Instant::now();
        let deadline = start + std::time::Duration::from_millis(20);
        assert_eq!(poll.wait(Some(deadline)).unwrap().iter().count(), 0);
        assert!(Instant::now() >= deadline);
    }
}
