//! Whoever watches a machine: what its VMM tells, and whether its agent still answers. A machine that is of no use any
//! more is killed; that its agent is gone then ends the pod, like that of any other pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hull_agent::protocol::messages::{Ping, request};
use hull_vmm::protocol::messages::event;

use super::control::VmmEvents;
use super::machine::Machine;
use super::{Inner, logs};
use crate::runtime::now;
use crate::sandbox::{Obituary, Place, Slots};

/// How often the agent is asked whether it lives.
const INTERVAL: Duration = Duration::from_secs(3);
/// How long it may take to say so, not counting time in which the host did not let the machine run.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take in any case.
const MOST: Duration = Duration::from_secs(300);
/// How often a machine whose guest is silent is looked at.
const SLICE: Duration = Duration::from_secs(3);
/// Between two warnings of faults that pass: a guest can make them, a full disk of the host too.
const PAUSE: Duration = Duration::from_secs(60);
/// The guest's kernel goes on writing to its console after it said that it panicked.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Most characters of what a VMM says.
const WORDS: usize = 512;
/// Every so many beats everything that could have been missed is looked at.
const CATCH_UP: u32 = 20;

/// Watches until the machine ends.
pub(super) fn start(launcher: &Arc<Inner>, machine: &Arc<Machine>, place: Place, events: VmmEvents) {
    let over = machine.over.clone();
    let watch = Watch { launcher: Arc::downgrade(launcher), machine: Arc::downgrade(machine), place };
    let heart = watch.clone();
    let beats = over.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = over.cancelled() => {}
            () = watch.listen(events) => {}
        }
    });
    tokio::spawn(async move {
        tokio::select! {
            () = beats.cancelled() => {}
            () = heart.beat() => {}
        }
    });
}

#[derive(Clone)]
struct Watch {
    launcher: Weak<Inner>,
    machine: Weak<Machine>,
    place: Place,
}

impl Watch {
    async fn listen(self, mut events: VmmEvents) {
        let mut told = None;
        while let Some(event) = events.recv().await {
            let Some(machine) = self.machine.upgrade() else { return };
            match plain(event) {
                event::Kind::Panicked(panic) => {
                    tracing::warn!(pod = machine.id, message = panic.message, "a guest's kernel panicked");
                    let message = match panic.message.trim() {
                        "" => "the guest's kernel panicked".to_owned(),
                        text => format!("the guest's kernel panicked: {text}"),
                    };
                    machine.blame(Obituary::of("GuestPanic", message));
                    tokio::time::sleep(LAST_WORDS).await;
                    self.kill().await;
                    return;
                }
                event::Kind::ShutDown(end) => {
                    let message = format!("the pod's machine ended: {}", end.reason);
                    machine.blame(Obituary::of("GuestShutDown", message));
                }
                event::Kind::Fault(fault) if fault.passing => {
                    if told.is_none_or(|told: Instant| told.elapsed() > PAUSE) {
                        told = Some(Instant::now());
                        let (device, message) = (fault.device, fault.message);
                        tracing::warn!(
                            pod = machine.id,
                            device,
                            message,
                            "a device of a pod's machine fails"
                        );
                    }
                }
                event::Kind::Fault(fault) => {
                    let message =
                        format!("the device {} of the pod's machine failed: {}", fault.device, fault.message);
                    tracing::warn!(pod = machine.id, "{message}");
                    // What waits for it in the guest would wait for ever.
                    machine.blame(Obituary::of("MachineFault", message));
                    self.kill().await;
                    // Whatever it goes on to tell, the pod is ended.
                    return;
                }
                event::Kind::AgentStarted(_) | event::Kind::AgentListening(_) => {}
            }
        }
    }

    async fn beat(self) {
        for beat in 1_u32.. {
            tokio::time::sleep(INTERVAL).await;
            let Some((machine, launcher)) = self.machine.upgrade().zip(self.launcher.upgrade()) else {
                return;
            };
            if answers(&machine).await {
                if beat % CATCH_UP == 0 {
                    launcher.follower.catch_up(&machine).await;
                    logs::shorten(&machine.directory);
                }
                continue;
            }
            let message = format!("the pod's machine has not answered for {} s", PATIENCE.as_secs());
            tracing::warn!(pod = machine.id, "{message}");
            machine.blame(Obituary::of("GuestSilent", message));
            if self.kill().await {
                return;
            }
        }
    }

    /// False if that did not work.
    async fn kill(&self) -> bool {
        let Some(launcher) = self.launcher.upgrade() else { return true };
        kill(&launcher, &self.place).await
    }
}

/// With words of modest length and without control characters: they go into logs and records, and a VMM may have been
/// taken over.
fn plain(event: event::Kind) -> event::Kind {
    let plain = |text: &mut String| {
        *text = text.chars().filter(|letter| !letter.is_control()).take(WORDS).collect();
    };
    let mut event = event;
    match &mut event {
        event::Kind::Panicked(panic) => plain(&mut panic.message),
        event::Kind::ShutDown(end) => plain(&mut end.reason),
        event::Kind::Fault(fault) => {
            plain(&mut fault.device);
            plain(&mut fault.message);
        }
        event::Kind::AgentStarted(_) | event::Kind::AgentListening(_) => {}
    }
    event
}

async fn kill(launcher: &Inner, place: &Place) -> bool {
    let (cgroups, its_place) = (Arc::clone(&launcher.cgroups), place.clone());
    let killed = tokio::task::spawn_blocking(move || cgroups.kill(&its_place)).await;
    if let Ok(Err(error)) = &killed {
        tracing::error!(pod = place.id, %error, "cannot kill a machine");
    }
    matches!(killed, Ok(Ok(())))
}

/// Ends a machine that is of no use any more; the reason becomes that of its containers' exits.
pub(super) async fn end(launcher: &Inner, machine: &Machine, place: &Place, reason: &str) {
    tracing::warn!(pod = machine.id, reason, "a pod's machine is ended");
    machine.blame(Obituary::of("MachineFault", format!("the pod's machine is ended: {reason}")));
    kill(launcher, place).await;
}

/// False if the guest has been silent for too long.
async fn answers(machine: &Machine) -> bool {
    let ping = request::Call::Ping(Ping { wall_clock_ns: now() });
    let answer = machine.agent.call(ping, Slots::default());
    tokio::pin!(answer);
    let mut silence = Silence::default();
    let mut waited = BTreeMap::new();
    loop {
        // An error is an answer, and whoever follows the agent's events knows what the end of its connection means.
        if tokio::time::timeout(SLICE, &mut answer).await.is_ok() {
            return true;
        }
        let look = look(machine, &mut waited).await;
        if silence.goes_on(SLICE, look) {
            return false;
        }
    }
}

/// What a machine did while its guest was silent.
async fn look(machine: &Machine, waited: &mut BTreeMap<String, u64>) -> Look {
    let now = machine.vmm().map(|vmm| vmm.kept_waiting()).unwrap_or_default();
    let more = |(thread, now): (&String, &u64)| now.saturating_sub(*waited.get(thread).unwrap_or(now));
    let most = Duration::from_nanos(now.iter().map(more).max().unwrap_or(0));
    *waited = now;
    match tokio::time::timeout(SLICE, machine.status()).await {
        Ok(Ok(status)) if status.paused => Look::Paused,
        Ok(Ok(_)) if most < SLICE / 2 => Look::Ran,
        _ => Look::Starved,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// A machine that was paused is silent and well.
    Paused,
    /// It could have answered.
    Ran,
    /// The host was too busy to let it run, or its cgroup was throttled: its processors waited for most of the time, or
    /// not even its VMM answers.
    Starved,
}

/// How long a guest has been silent.
#[derive(Debug, Default)]
struct Silence {
    /// While it could have answered.
    own: Duration,
    whole: Duration,
}

impl Silence {
    /// Another while of it; true if it has been too long.
    fn goes_on(&mut self, slice: Duration, look: Look) -> bool {
        match look {
            Look::Paused => *self = Self::default(),
            Look::Ran => self.own += slice,
            Look::Starved => {}
        }
        if look != Look::Paused {
            self.whole += slice;
        }
        self.own >= PATIENCE || self.whole >= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(looks: impl IntoIterator<Item = Look>) -> Option<usize> {
        let mut silence = Silence::default();
        looks.into_iter().position(|look| silence.goes_on(SLICE, look)).map(|slice| slice + 1)
    }

    #[test]
    fn what_a_vmm_says_is_short_and_plain() {
        let message = format!("a\n\u{1b}[0m{}", "x".repeat(1 << 20));
        let fault = hull_vmm::protocol::messages::Fault { device: message.clone(), message, passing: false };
        let event::Kind::Fault(fault) = plain(event::Kind::Fault(fault)) else { panic!() };
        assert!(fault.message.starts_with("a[0m") && fault.message.len() == WORDS);
        assert_eq!(fault.device.len(), WORDS);
    }

    #[test]
    fn a_guest_that_could_have_answered_is_given_up_after_its_patience() {
        let slices = (PATIENCE.as_secs() / SLICE.as_secs()) as usize;
        assert_eq!(after(vec![Look::Ran; 1000]), Some(slices));
    }

    #[test]
    fn a_loaded_host_does_not_kill_a_healthy_pod_but_nothing_may_hang_for_ever() {
        let slices = (PATIENCE.as_secs() / SLICE.as_secs()) as usize;
        let mut looks = vec![Look::Starved; slices * 3];
        looks.extend(vec![Look::Ran; slices - 1]);
        assert_eq!(after(looks), None);
        assert_eq!(after(vec![Look::Starved; 1000]), Some((MOST.as_secs() / SLICE.as_secs()) as usize));
        assert_eq!(after(vec![Look::Paused; 1000]), None);
    }
}
