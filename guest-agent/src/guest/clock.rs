//! The wall clock: set at the pod's beginning, then kept by the host's clock, which KVM shows as a PTP device.

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fd::AsFd;
use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic};

/// Between two looks at the host's clock. The drift of a clock that nobody disciplines is below 100 ppm, so the wall
/// clock stays within 2 ms of the host's.
const INTERVAL: Duration = Duration::from_secs(16);
/// Beyond this the clock is stepped: a machine that stood still (paused, cloned, its host suspended).
const STEP: i64 = 500_000_000;
/// Of an offset that a message told: its way took time, so small ones say nothing.
const TOLD_TOLERANCE: i64 = 100_000_000;
/// Below this nothing is done.
const TOLERANCE: i64 = 50_000;

const DEVICE: &str = "/dev/ptp0";

/// Keeps the wall clock right.
#[derive(Debug)]
pub(crate) struct Clock {
    /// The host's clock, where KVM has one (its clock source must be the TSC).
    host: Option<File>,
    next: Instant,
}

impl Clock {
    /// Sets the clock to `wall_clock` (nanoseconds since 1970, 0: unknown) or better, to the host's own.
    pub(crate) fn start(wall_clock: i64) -> Self {
        let host = File::open(DEVICE).ok().filter(|file| read(file).is_some());
        let clock = Self { host, next: Instant::now() + INTERVAL };
        if clock.host.is_some() {
            clock.look();
        } else if wall_clock > 0 {
            correct(wall_clock - now(), TOLERANCE);
        }
        clock
    }

    /// When [`Self::keep`] is due next; never without a device.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.host.as_ref().map(|_| self.next)
    }

    /// Looks at the host's clock, if it is time.
    pub(crate) fn keep(&mut self, now: Instant) {
        if now >= self.next {
            self.next = now + INTERVAL;
            self.look();
        }
    }

    /// The caller told its time (nanoseconds since 1970; 0: it did not). Used where there is no device.
    pub(crate) fn told(&self, wall_clock: i64) {
        if self.host.is_none() && wall_clock > 0 {
            correct(wall_clock.saturating_sub(now()), TOLD_TOLERANCE);
        }
    }

    fn look(&self) {
        let Some(host) = &self.host else { return };
        // The quickest of a few looks: nothing interrupted it, so the time in its middle is nearest.
        let looks = (0..3).filter_map(|_| {
            let before = now();
            let theirs = read(host)?;
            let after = now();
            Some((after - before, theirs - before - (after - before) / 2))
        });
        if let Some((_, offset)) = looks.min_by_key(|(duration, _)| *duration) {
            correct(offset, TOLERANCE);
        }
    }
}

/// Steps or slews by `offset` nanoseconds, if that is more than `tolerance`.
fn correct(offset: i64, tolerance: i64) {
    let size = offset.saturating_abs();
    if size > STEP {
        // Refused only for times that no clock has; then it stays as it is.
        let _ = hull_sys::clock::step(offset);
    } else if size > tolerance {
        let _ = hull_sys::clock::slew(offset);
    }
}

fn now() -> i64 {
    nanoseconds(clock_gettime(ClockId::Realtime))
}

fn read(device: &File) -> Option<i64> {
    clock_gettime_dynamic(DynamicClockId::Dynamic(device.as_fd())).ok().map(nanoseconds)
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}
