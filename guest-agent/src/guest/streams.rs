//! Connections that carry the bytes of a slot, until a request names them.

use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;

/// How long a connection waits for its request, and a request for its connections.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Most connections that wait; the oldest gives way.
const MAX_WAITING: usize = 256;

#[derive(Debug)]
struct Waiting {
    number: u64,
    socket: OwnedFd,
    until: Instant,
}

/// Connections by their number.
#[derive(Debug, Default)]
pub(crate) struct Streams(Vec<Waiting>);

impl Streams {
    /// Keeps a connection. A number that is taken already is nobody's mistake but the caller's: the newer one stays.
    pub(crate) fn add(&mut self, number: u64, socket: OwnedFd, now: Instant) {
        self.0.retain(|waiting| waiting.number != number);
        if self.0.len() >= MAX_WAITING {
            self.0.remove(0);
        }
        self.0.push(Waiting { number, socket, until: now + PATIENCE });
    }

    pub(crate) fn has(&self, number: u64) -> bool {
        self.0.iter().any(|waiting| waiting.number == number)
    }

    /// Hands a connection out, once.
    pub(crate) fn take(&mut self, number: u64) -> Option<OwnedFd> {
        let index = self.0.iter().position(|waiting| waiting.number == number)?;
        Some(self.0.remove(index).socket)
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.iter().map(|waiting| waiting.until).min()
    }

    /// Closes those that nobody has asked for.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.0.retain(|waiting| waiting.until > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_stream_is_handed_out_once_and_not_kept_for_ever() {
        let (mut streams, now) = (Streams::default(), Instant::now());
        streams.add(7, socket(), now);
        streams.add(8, socket(), now);
        assert!(streams.has(7) && streams.take(7).is_some() && streams.take(7).is_none());
        assert_eq!(streams.deadline(), Some(now + PATIENCE));
        streams.sweep(now + PATIENCE);
        assert!(!streams.has(8) && streams.deadline().is_none());
    }

    #[test]
    fn however_many_come_only_so_many_are_kept() {
        let (mut streams, now) = (Streams::default(), Instant::now());
        for number in 0..1000 {
            streams.add(number, socket(), now);
        }
        assert_eq!(streams.0.len(), MAX_WAITING);
        assert!(streams.has(999) && !streams.has(0));
    }
}
