//! Whoever reads along with a container's output, beside its log.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// How long a container is held up for somebody who reads along and takes nothing: a reader that only waits for its turn on
/// a busy machine misses nothing, and one that has stopped costs the container this long, once.
pub(super) const HOLD: Duration = Duration::from_secs(2);
/// Most bytes that wait for one reader; more than one chunk only after the end of the container.
const MAX_WAITING: usize = 2 << 20;

/// A pipe that gets a copy of everything.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) number: u32,
    pub(super) pipe: OwnedFd,
    waiting: Vec<u8>,
    /// When it took something for the last time, while something waits for it.
    stuck: Option<Instant>,
}

/// What became of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fed {
    /// It has everything, or will get it.
    Kept,
    /// Its reader has gone.
    Gone,
    /// Its reader is too slow.
    Late,
}

impl Tap {
    /// Takes over `pipe` and makes it non-blocking.
    pub(super) fn new(number: u32, pipe: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Self { number, pipe, waiting: Vec::new(), stuck: None })
    }

    /// Gives it bytes; what it does not take at once waits for it.
    pub(super) fn push(&mut self, bytes: &[u8], now: Instant) -> Fed {
        let mut rest = bytes;
        if self.waiting.is_empty() {
            match rustix::io::write(&self.pipe, bytes) {
                Ok(length) => rest = &bytes[length.min(bytes.len())..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return Fed::Gone,
            }
        }
        if self.waiting.len() + rest.len() > MAX_WAITING {
            return Fed::Late;
        }
        if !rest.is_empty() {
            self.waiting.extend_from_slice(rest);
            self.stuck.get_or_insert(now);
        }
        Fed::Kept
    }

    /// Sends what waits.
    pub(super) fn step(&mut self, now: Instant) -> Fed {
        let mut sent = 0;
        while sent < self.waiting.len() {
            match rustix::io::write(&self.pipe, &self.waiting[sent..]) {
                Ok(length) => {
                    sent += length;
                    self.stuck = Some(now);
                }
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.waiting.drain(..sent);
                    let late = self.stuck.is_some_and(|since| now >= since + HOLD);
                    return if late { Fed::Late } else { Fed::Kept };
                }
                Err(_) => return Fed::Gone,
            }
        }
        self.waiting = Vec::new();
        self.stuck = None;
        Fed::Kept
    }

    /// By when it has to take something, if something waits for it.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.stuck.map(|since| since + HOLD)
    }

    /// Whether its reader has gone.
    pub(super) fn is_gone(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut look = [PollFd::new(&self.pipe, PollFlags::empty())];
        let looked = rustix::event::poll(&mut look, Some(&now));
        looked.is_ok() && look[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
    }
}
