//! Connections that have not shown a token yet.
//!
//! Whoever reaches the server's port can open connections and say nothing. Of those only so many are kept: one more
//! takes the place of the oldest, which has had the most time to speak. So nobody who has a token is held up by those
//! who have none, unless more than there is room for come while he shows it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Those that wait, the oldest first.
#[derive(Debug)]
pub(super) struct Waiting {
    most: usize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// How many have ever come.
    come: u64,
    waiting: VecDeque<(u64, CancellationToken)>,
}

/// A connection's place; it leaves with this value at the latest.
#[derive(Debug)]
pub(super) struct Place {
    line: Arc<Waiting>,
    number: u64,
    /// Cancelled when a newer connection has taken this place.
    pub(super) taken: CancellationToken,
}

impl Waiting {
    /// Room for `most` connections, at least one.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), line: Mutex::default() })
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one more in, for the oldest if there is no room.
    pub(super) fn enter(self: &Arc<Self>) -> Place {
        let taken = CancellationToken::new();
        let mut line = self.line();
        if line.waiting.len() >= self.most
            && let Some((_, oldest)) = line.waiting.pop_front()
        {
            oldest.cancel();
        }
        let number = line.come;
        line.come += 1;
        line.waiting.push_back((number, taken.clone()));
        drop(line);
        Place { line: Arc::clone(self), number, taken }
    }
}

impl Place {
    /// The connection has shown a token, or ends: nobody takes its place any more.
    pub(super) fn leave(&self) {
        let mut line = self.line.line();
        // Numbers only grow, so they are in order.
        if let Ok(index) = line.waiting.binary_search_by_key(&self.number, |(number, _)| *number) {
            line.waiting.remove(index);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_who_has_left_does_not_count() {
        let waiting = Waiting::new(2);
        let first = waiting.enter();
        let second = waiting.enter();
        first.leave();
        first.leave();
        // There is room for a third now, and none for a fourth
        let third = waiting.enter();
        assert!(!second.taken.is_cancelled());
        let fourth = waiting.enter();
        assert!(second.taken.is_cancelled());
        // One that goes away makes room too
        drop(third);
        let fifth = waiting.enter();
        assert!([&first, &fourth, &fifth].iter().all(|place| !place.taken.is_cancelled()));
        drop((second, fourth, fifth));
        assert!(waiting.line().waiting.is_empty());
    }
}
