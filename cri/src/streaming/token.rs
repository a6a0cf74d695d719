//! URLs that work once: the one proof that a request for a stream was allowed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::rand::GetRandomFlags;

/// How long a URL works.
pub const LIFETIME: Duration = Duration::from_secs(60);
/// Most URLs that wait to be used.
pub const MAX_PENDING: usize = 1000;
const LENGTH: usize = 16;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Too many URLs wait to be used.
    #[error("{MAX_PENDING} streams were asked for in the last minute and not begun")]
    TooMany,
    /// The kernel gives no random numbers.
    #[error("cannot draw a random number: {0}")]
    Random(std::io::Error),
}

/// What waits to be fetched with a token, the oldest first.
#[derive(Debug)]
pub struct Tokens<T>(Mutex<VecDeque<Pending<T>>>);

#[derive(Debug)]
struct Pending<T> {
    token: [u8; LENGTH],
    until: Instant,
    what: T,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Tokens<T> {
    fn pending(&self, now: Instant) -> MutexGuard<'_, VecDeque<Pending<T>>> {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while pending.front().is_some_and(|oldest| oldest.until <= now) {
            pending.pop_front();
        }
        pending
    }

    /// Keeps `what` for a minute; the token is 32 hex digits.
    pub fn put(&self, what: T) -> Result<String, TokenError> {
        self.put_at(what, Instant::now())
    }

    fn put_at(&self, what: T, now: Instant) -> Result<String, TokenError> {
        let mut token = [0; LENGTH];
        let filled = rustix::rand::getrandom(&mut token[..], GetRandomFlags::empty())
            .map_err(|errno| TokenError::Random(errno.into()))?;
        if filled != LENGTH {
            return Err(TokenError::Random(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let mut pending = self.pending(now);
        if pending.len() >= MAX_PENDING {
            return Err(TokenError::TooMany);
        }
        pending.push_back(Pending { token, until: now + LIFETIME, what });
        Ok(hex::encode(token))
    }

    /// Gives out what was kept if `wanted` likes it; that token works no more.
    pub fn take(&self, token: &str, wanted: impl FnOnce(&T) -> bool) -> Option<T> {
        self.take_at(token, wanted, Instant::now())
    }

    fn take_at(&self, token: &str, wanted: impl FnOnce(&T) -> bool, now: Instant) -> Option<T> {
        let mut given = [0; LENGTH];
        hex::decode_to_slice(token, &mut given).ok()?;
        let mut pending = self.pending(now);
        let mut found = None;
        // Every one is compared, and in full: how long this takes tells nothing of a token.
        for (index, one) in pending.iter().enumerate() {
            let differing = one.token.iter().zip(&given).fold(0, |bits, (a, b)| bits | (a ^ b));
            if std::hint::black_box(differing) == 0 {
                found = Some(index);
            }
        }
        let index = found.filter(|index| pending.get(*index).is_some_and(|one| wanted(&one.what)))?;
        pending.remove(index).map(|one| one.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once() {
        let tokens = Tokens::default();
        let (one, other) = (tokens.put(1).unwrap(), tokens.put(2).unwrap());
        assert!(one.len() == 32 && one != other);
        assert_eq!(tokens.take(&one, |_| true), Some(1));
        assert_eq!(tokens.take(&one, |_| true), None);
        assert_eq!(tokens.take(&other, |_| true), Some(2));
        for nonsense in ["", "x", &"0".repeat(32), &"é".repeat(16), &format!("{other}00")] {
            assert_eq!(tokens.take(nonsense, |_| true), None);
        }
    }

    #[test]
    fn a_token_for_something_else_is_not_used_up() {
        let tokens = Tokens::default();
        let token = tokens.put(1).unwrap();
        assert_eq!(tokens.take(&token, |what| *what == 2), None);
        assert_eq!(tokens.take(&token, |what| *what == 1), Some(1));
    }

    #[test]
    fn a_token_works_for_a_minute() {
        let tokens = Tokens::default();
        let now = Instant::now();
        let (one, other) = (tokens.put_at(1, now).unwrap(), tokens.put_at(2, now).unwrap());
        let just_before = now + LIFETIME - Duration::from_millis(1);
        assert_eq!(tokens.take_at(&one, |_| true, just_before), Some(1));
        assert_eq!(tokens.take_at(&other, |_| true, now + LIFETIME), None);
    }

    #[test]
    fn a_thousand_may_wait_and_room_comes_back_with_time() {
        let tokens = Tokens::default();
        let now = Instant::now();
        for number in 0..MAX_PENDING {
            tokens.put_at(number, now).unwrap();
        }
        assert!(matches!(tokens.put_at(0, now), Err(TokenError::TooMany)));
        tokens.put_at(0, now + LIFETIME).unwrap();
    }
}
