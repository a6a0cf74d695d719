//! The end of the pod.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hull_sys::process;

use super::Server;
use super::failure::CallError;
use super::report;
use crate::protocol::messages::{Empty, response::Outcome};

/// How long killed processes may take to be gone before the caller is told that they are not.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between attempts to remove cgroups.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A stop under way.
#[derive(Debug)]
pub(super) struct Stopping {
    /// Who asked: connection and number of the request.
    callers: Vec<(u32, u64)>,
    give_up: Instant,
    next: Instant,
    pause: Duration,
    complete: bool,
}

impl Stopping {
    pub(super) const fn deadline(&self) -> Instant {
        self.next
    }
}

impl Server {
    /// Kills everything in the pod; the event loop waits for the ends and removes the cgroups.
    pub(super) fn begin_stop(&mut self, caller: Option<(u32, u64)>) {
        if let Some(stopping) = &mut self.stopping {
            stopping.callers.extend(caller);
            return;
        }
        for container in &self.containers {
            // The ones that have ended too: a forked daemon may have stayed.
            if let Err(error) = container.leaf.kill() {
                report::line(format_args!("cannot kill container {}: {error}", container.id));
            }
        }
        self.forget_all_expected();
        if let Some(reaper) = &self.pod.reaper {
            // Ended already: fine.
            let _ = process::pidfd_send_signal(reaper.pidfd.as_fd(), super::SIGKILL);
        }
        let now = Instant::now();
        self.stopping = Some(Stopping {
            callers: caller.into_iter().collect(),
            give_up: now + PATIENCE,
            next: now,
            pause: FIRST_PAUSE,
            complete: false,
        });
    }

    /// Looks whether all is gone.
    pub(super) fn continue_stop(&mut self, now: Instant) {
        let Some(stopping) = &mut self.stopping else { return };
        let ended = self.execs.is_empty()
            && self.pod.reaper.is_none()
            && self.containers.iter().all(super::container::Container::has_ended);
        if ended && self.containers.iter().all(|container| container.leaf.try_remove().unwrap_or(false)) {
            stopping.complete = true;
            return;
        }
        // Woken by something else: the next look is due when it was.
        if now < stopping.next {
            return;
        }
        stopping.pause = (stopping.pause * 2).min(LONGEST_PAUSE);
        stopping.next = now + stopping.pause;
        if now >= stopping.give_up {
            self.give_up_stop();
        }
    }

    /// Tells the callers that something would not die; they may ask again.
    fn give_up_stop(&mut self) {
        let Some(stopping) = self.stopping.take() else { return };
        let seconds = PATIENCE.as_secs();
        report::line(format_args!("something in the pod is still alive {seconds} s after it was killed"));
        for (connection, id) in stopping.callers {
            let error = CallError::precondition(format!(
                "cannot stop the pod: processes or cgroups of it are still there {seconds} s after they were killed"
            ));
            self.connections.respond(connection, id, error.into_outcome(), &self.poll);
        }
    }

    /// True once the agent has nothing left to do: the callers have their answer.
    pub(super) fn stop_is_complete(&mut self) -> bool {
        let Some(stopping) = self.stopping.take_if(|stopping| stopping.complete) else { return false };
        for (connection, id) in stopping.callers {
            self.connections.respond(connection, id, Outcome::Done(Empty {}), &self.poll);
        }
        self.connections.finish();
        true
    }
}
