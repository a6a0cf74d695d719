use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::list::NetworkList;

/// An answer is good for so long; kubelet asks for the node's condition about as often.
const FRESH: Duration = Duration::from_secs(5);

/// What the plugins said of themselves last.
#[derive(Debug, Default)]
pub(super) struct Status {
    last: Mutex<Option<Answer>>,
    /// One question at a time; whoever waits gets the same answer.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Answer {
    list: NetworkList,
    at: Instant,
    outcome: Result<(), String>,
}

impl Status {
    /// The last answer for this configuration, and whether it is still good or being asked for.
    pub(super) fn recall(&self, list: &NetworkList) -> (Option<Result<(), String>>, bool) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let asking = self.asking.try_lock().is_err();
        match last.as_ref().filter(|answer| answer.list == *list) {
            Some(answer) => (Some(answer.outcome.clone()), asking || answer.at.elapsed() < FRESH),
            None => (None, asking),
        }
    }

    /// The last answer if it is still good, else that of `question`.
    pub(super) async fn ask(
        &self,
        list: &NetworkList,
        question: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
        let _turn = self.asking.lock().await;
        {
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(answer) =
                last.as_ref().filter(|answer| answer.list == *list && answer.at.elapsed() < FRESH)
            {
                return answer.outcome.clone();
            }
        }
        let outcome = question.await;
        let answer = Answer { list: list.clone(), at: Instant::now(), outcome: outcome.clone() };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        outcome
    }
}
