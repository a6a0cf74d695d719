//! How long the steps of an operation took: what `hull debug trace start` shows of the agent's part.

use std::time::{Duration, Instant};

use crate::protocol::messages::Step;

/// A clock that is read after every step.
#[derive(Debug)]
pub(crate) struct Steps {
    last: Instant,
    taken: Vec<(&'static str, Duration)>,
}

impl Steps {
    /// From now on.
    pub(crate) fn begin() -> Self {
        Self { last: Instant::now(), taken: Vec::with_capacity(16) }
    }

    /// What was done since the last step had this name.
    pub(crate) fn done(&mut self, name: &'static str) {
        let now = Instant::now();
        self.taken.push((name, now.duration_since(self.last)));
        self.last = now;
    }

    /// What was done since the last step was these; what they leave over is `rest`.
    pub(crate) fn done_in_steps(&mut self, steps: &[(&'static str, Duration)], rest: &'static str) {
        let now = Instant::now();
        let all = now.duration_since(self.last);
        self.taken.extend_from_slice(steps);
        self.taken.push((rest, all.saturating_sub(steps.iter().map(|(_, took)| *took).sum())));
        self.last = now;
    }

    /// As they are told to the caller.
    pub(crate) fn into_messages(self) -> Vec<Step> {
        let message =
            |(name, took): (&str, Duration)| Step { name: name.to_owned(), micros: took.as_micros() as u64 };
        self.taken.into_iter().map(message).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_within_a_step_and_what_they_leave_over_are_all_of_it() {
        let mut steps = Steps::begin();
        steps.done("first");
        std::thread::sleep(Duration::from_millis(3));
        steps.done_in_steps(&[("inner", Duration::from_millis(2))], "rest");
        let told = steps.into_messages();
        let names: Vec<&str> = told.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, ["first", "inner", "rest"]);
        assert_eq!(told[1].micros, 2000);
        assert!(told[2].micros >= 1000);
    }
}
