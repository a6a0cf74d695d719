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

/// A newer connection has taken the place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken;

impl Line {
    /// Where the connection of this number stands. Numbers only grow, so they are in order.
    fn find(&self, number: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&number, |(number, _)| *number).ok()
    }
}

impl Place {
    /// The connection shows a token: if that gives it something, nobody takes its place any more. If somebody has taken
    /// it, the token is not even looked at and works on: the client may come again with it. No other connection comes in
    /// between.
    pub(super) fn show<T>(&self, token: impl FnOnce() -> Option<T>) -> Result<Option<T>, Taken> {
        let mut line = self.line.line();
        let index = line.find(self.number).ok_or(Taken)?;
        let given = token();
        if given.is_some() {
            line.waiting.remove(index);
        }
        Ok(given)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut line = self.line.line();
        if let Some(index) = line.find(self.number) {
            line.waiting.remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::token::Tokens;

    #[test]
    fn the_oldest_makes_room_and_who_has_left_does_not_count() {
        let waiting = Waiting::new(2);
        let first = waiting.enter();
        let second = waiting.enter();
        assert_eq!(first.show(|| Some(1)), Ok(Some(1)));
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

    #[test]
    fn a_connection_whose_place_was_taken_uses_no_token_up() {
        let waiting = Waiting::new(1);
        let tokens = Tokens::default();
        let token = tokens.put("stream").unwrap();
        let old = waiting.enter();
        // One that shows nothing good keeps waiting
        assert_eq!(old.show(|| tokens.take("nonsense", |_| true)), Ok(None));
        let new = waiting.enter();
        assert_eq!(old.show(|| tokens.take(&token, |_| true)), Err(Taken));
        assert_eq!(new.show(|| tokens.take(&token, |_| true)), Ok(Some("stream")));
        // Who has a stream is evicted by nobody
        let _newest = waiting.enter();
        assert!(!new.taken.is_cancelled());
    }
}
