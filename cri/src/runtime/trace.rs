//! Where the time of the last starts went: what `hull debug trace start` prints.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hull_agent::protocol::messages;

use super::host;
use crate::api::hull;

/// How many operations are remembered: about twenty pods of one container.
const KEPT: usize = 64;
/// Most steps of an agent, which may be hostile.
const MOST_INNER: usize = 32;
/// Longest name of an agent's step, in characters.
const LONGEST_NAME: usize = 64;

/// One step of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// What was done.
    pub(crate) name: String,
    /// How long it took.
    pub(crate) took: Duration,
    /// It is a part of the last step before it that is not: the agent's side.
    pub(crate) is_part: bool,
}

/// One operation, as it goes on or as it went.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    /// The call of CRI.
    pub(crate) operation: &'static str,
    /// Of the pod or the container.
    pub(crate) id: String,
    /// Nanoseconds since 1970.
    pub(crate) began_at: i64,
    /// What was done, in this order.
    pub(crate) steps: Vec<Step>,
    last: Instant,
}

impl Trace {
    /// An operation that begins.
    pub(crate) fn begin(operation: &'static str) -> Self {
        let steps = Vec::with_capacity(24);
        Self { operation, id: String::new(), began_at: host::now(), steps, last: Instant::now() }
    }

    /// What was done since the last step has this name.
    pub(crate) fn step(&mut self, name: &str) {
        let now = Instant::now();
        let took = now.duration_since(self.last);
        self.last = now;
        self.steps.push(Step { name: name.to_owned(), took, is_part: false });
    }

    /// The parts of the last step, as an agent tells them.
    pub(crate) fn parts(&mut self, told: Vec<messages::Step>) {
        let part = |step: messages::Step| Step {
            name: step.name.chars().filter(|letter| !letter.is_control()).take(LONGEST_NAME).collect(),
            took: Duration::from_micros(step.micros),
            is_part: true,
        };
        self.steps.extend(told.into_iter().take(MOST_INNER).map(part));
    }

    /// All of it.
    pub(crate) fn total(&self) -> Duration {
        self.steps.iter().filter(|step| !step.is_part).map(|step| step.took).sum()
    }
}

/// The last operations that succeeded, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Traces(Mutex<VecDeque<Trace>>);

impl Traces {
    /// Keeps an operation that has ended well.
    pub(crate) fn keep(&self, mut trace: Trace, id: &str) {
        id.clone_into(&mut trace.id);
        let (operation, total) = (trace.operation, trace.total());
        tracing::debug!(operation, id, ?total, steps = %Words(&trace.steps), "done");
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(trace);
    }

    /// hull.v1 Traces.
    pub(crate) fn report(&self) -> hull::TracesReply {
        let step = |step: Step| hull::TraceStep {
            name: step.name,
            micros: step.took.as_micros() as u64,
            is_part: step.is_part,
        };
        let trace = |trace: Trace| hull::Trace {
            operation: trace.operation.to_owned(),
            id: trace.id,
            began_at: trace.began_at,
            steps: trace.steps.into_iter().map(step).collect(),
        };
        hull::TracesReply { traces: self.all().into_iter().map(trace).collect() }
    }

    /// All that are remembered.
    fn all(&self) -> Vec<Trace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// Steps in one line of a log.
struct Words<'a>(&'a [Step]);

impl std::fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, step) in self.0.iter().enumerate() {
            let (comma, mark) = (if number > 0 { ", " } else { "" }, if step.is_part { "- " } else { "" });
            write!(f, "{comma}{mark}{} {:?}", step.name, step.took)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_operations_are_kept_and_parts_are_not_counted_twice() {
        let traces = Traces::default();
        for number in 0..=KEPT {
            let mut trace = Trace::begin("StartContainer");
            trace.step("the agent");
            let micros = 5_000_000;
            trace.parts(vec![messages::Step { name: "a\npart".into(), micros }]);
            assert!(trace.total() < Duration::from_secs(5));
            traces.keep(trace, &number.to_string());
        }
        let all = traces.all();
        assert_eq!(all.len(), KEPT);
        assert_eq!((all[0].id.as_str(), all[KEPT - 1].id.as_str()), ("1", "64"));
        assert_eq!(all[0].steps[1].name, "apart");
    }

    #[test]
    fn an_agent_cannot_fill_the_memory_with_steps() {
        let mut trace = Trace::begin("StartContainer");
        let told = messages::Step { name: "x".repeat(10_000), micros: u64::MAX };
        trace.parts(vec![told; 10_000]);
        assert_eq!(trace.steps.len(), MOST_INNER);
        assert!(trace.steps.iter().all(|step| step.name.len() == LONGEST_NAME));
    }
}
