//! When things that are made in advance are made again.

use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// Whoever started something has it by then, and a series of starts is over. What is made earlier is made beside the next
/// start, which then takes longer by what it was to save.
const QUIET: Duration = Duration::from_millis(40);
/// In a series that does not end, new ones are made when fewer are left than these,
const FEW: usize = 2;
/// and so long after that was noticed, so that they are not made beside the start that took the last one.
const PAUSE: Duration = Duration::from_millis(20);

/// Says when to make again what has been taken.
#[derive(Debug)]
pub struct Refill {
    taken: Notify,
    quiet: Duration,
}

impl Default for Refill {
    fn default() -> Self {
        Self { taken: Notify::new(), quiet: QUIET }
    }
}

impl Refill {
    /// Something was taken, or asked for where there was none.
    pub fn taken(&self) {
        self.taken.notify_one();
    }

    /// Waits for the moment to make new ones: after something was taken, when nothing has been taken for 40 ms, or hardly
    /// any are left. `left` says how many there are.
    pub async fn due(&self, left: impl Fn() -> usize) {
        self.taken.notified().await;
        while left() >= FEW {
            if timeout(self.quiet, self.taken.notified()).await.is_err() {
                return;
            }
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn nothing_is_made_before_something_was_taken() {
        let refill = Refill::default();
        assert!(timeout(QUIET * 3, refill.due(|| 0)).await.is_err());
    }

    #[tokio::test]
    async fn new_ones_are_made_when_a_series_is_over() {
        let (refill, begun) = (Refill::default(), Instant::now());
        refill.taken();
        refill.due(|| FEW).await;
        assert!(begun.elapsed() >= QUIET);
    }

    #[tokio::test]
    async fn in_a_series_they_are_made_when_few_are_left() {
        let refill = Refill { quiet: HOUR, ..Default::default() };
        let left = AtomicUsize::new(FEW + 2);
        let mut due = std::pin::pin!(refill.due(|| left.load(Ordering::Relaxed)));
        while left.fetch_sub(1, Ordering::Relaxed) > FEW {
            refill.taken();
            assert!(timeout(PAUSE * 3, due.as_mut()).await.is_err(), "{left:?}");
        }
        refill.taken();
        timeout(HOUR / 60, due).await.expect("few are left");
    }
}
