//! How fast an answer must come: a server that drips bytes is no better than one that sends nothing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::Response;

use super::text::reasons;

/// Bytes a second, averaged over the progress timeout, below which an answer counts as stalled. The slowest modem did
/// more; whoever sends less wants to hold a connection.
const MIN_RATE: u64 = 1024;

/// Watches the pace of one answer. Only the time that is spent waiting for it counts.
pub(super) struct Pace {
    /// What the rate is averaged over. Zero: no pace is asked for.
    window: Duration,
    waited: Duration,
    bytes: u64,
}

/// Why an answer did not go on.
pub(super) struct Broken {
    /// For messages.
    pub(super) reason: String,
    /// It came, but too slowly, and likely would again.
    pub(super) is_slow: bool,
}

impl Pace {
    pub(super) fn new(window: Duration) -> Self {
        Self { window, waited: Duration::ZERO, bytes: 0 }
    }

    /// The next bytes of the answer; None at its end. A wait without a single byte is ended by the client's own timeout.
    pub(super) async fn chunk(&mut self, response: &mut Response) -> Result<Option<Bytes>, Broken> {
        let started = Instant::now();
        let chunk = response.chunk().await;
        let waited = started.elapsed();
        match chunk {
            Ok(Some(chunk)) => self.count(chunk.len() as u64, waited).map(|()| Some(chunk)),
            Ok(None) => Ok(None),
            // Addresses of redirects hold signatures; they do not belong in messages.
            Err(error) => Err(Broken { reason: reasons(&error.without_url()), is_slow: false }),
        }
    }

    fn count(&mut self, bytes: u64, waited: Duration) -> Result<(), Broken> {
        self.waited += waited;
        self.bytes += bytes;
        if self.window.is_zero() || self.waited < self.window {
            return Ok(());
        }
        let (bytes, waited) = (self.bytes, self.waited);
        (self.bytes, self.waited) = (0, Duration::ZERO);
        if bytes as f64 >= MIN_RATE as f64 * waited.as_secs_f64() {
            return Ok(());
        }
        Err(Broken { reason: format!("it sent only {bytes} bytes in {waited:.1?}"), is_slow: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    #[test]
    fn a_drip_is_too_slow_and_a_trickle_is_not() {
        let mut pace = Pace::new(WINDOW);
        let dripped = (0..10).map(|_| pace.count(100, Duration::from_secs(1))).collect::<Vec<_>>();
        assert!(dripped[..9].iter().all(Result::is_ok));
        let broken = dripped.into_iter().next_back().unwrap().err().unwrap();
        assert!(broken.is_slow && broken.reason.contains("1000 bytes in 10.0s"), "{}", broken.reason);
        let mut pace = Pace::new(WINDOW);
        for _ in 0..100 {
            assert!(pace.count(2048, Duration::from_secs(1)).is_ok());
        }
    }

    #[test]
    fn a_burst_does_not_make_up_for_a_later_drip() {
        let mut pace = Pace::new(WINDOW);
        assert!(pace.count(1 << 30, WINDOW).is_ok());
        assert!(pace.count(1, WINDOW).is_err());
    }

    #[test]
    fn without_a_timeout_no_pace_is_asked_for() {
        assert!(Pace::new(Duration::ZERO).count(0, WINDOW * 100).is_ok());
    }
}
