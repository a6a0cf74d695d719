//! Whoever watches a machine: what its VMM tells, and whether its agent still answers. A machine that is of no use any
//! more is killed; that its agent is gone then ends the pod, like that of any other pod.

use std::sync::{Arc, Weak};
use std::time::Duration;

use hull_agent::protocol::messages::{Ping, request};
use hull_vmm::protocol::messages::event;

use super::Inner;
use super::control::VmmEvents;
use super::machine::Machine;
use crate::runtime::now;
use crate::sandbox::{Obituary, Place, Slots};

/// How often the agent is asked whether it lives.
const INTERVAL: Duration = Duration::from_secs(3);
/// How long it may take to say so. A guest that swaps, or whose node is overloaded, needs a while.
const PATIENCE: Duration = Duration::from_secs(30);
/// The guest's kernel goes on writing to its console after it said that it panicked.
const LAST_WORDS: Duration = Duration::from_millis(300);
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
        while let Some(event) = events.recv().await {
            let Some(machine) = self.machine.upgrade() else { return };
            match event {
                event::Kind::Panicked(panic) => {
                    tracing::warn!(pod = machine.id, message = panic.message, "a guest's kernel panicked");
                    let message = match panic.message.trim() {
                        "" => "the guest's kernel panicked".to_owned(),
                        text => format!("the guest's kernel panicked: {text}"),
                    };
                    machine.blame(Obituary::of("GuestPanic", message));
                    tokio::time::sleep(LAST_WORDS).await;
                    self.kill().await;
                }
                event::Kind::ShutDown(end) => {
                    let message = format!("the pod's machine ended: {}", end.reason);
                    machine.blame(Obituary::of("GuestShutDown", message));
                }
                event::Kind::Fault(fault) => {
                    let message =
                        format!("the device {} of the pod's machine failed: {}", fault.device, fault.message);
                    tracing::warn!(pod = machine.id, "{message}");
                    // What waits for it in the guest would wait for ever.
                    machine.blame(Obituary::of("MachineFault", message));
                    self.kill().await;
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
            let ping = request::Call::Ping(Ping { wall_clock_ns: now() });
            let answer =
                machine.agent.call_within(PATIENCE, "say that it lives", ping, Slots::default()).await;
            match answer {
                Ok(_) if beat % CATCH_UP == 0 => launcher.follower.catch_up(&machine).await,
                Ok(_) => {}
                Err(crate::sandbox::SandboxError::Silent(_)) => {
                    // A machine that was paused is silent and well.
                    if machine.status().await.is_ok_and(|status| status.paused) {
                        continue;
                    }
                    let message = format!("the pod's machine has not answered for {} s", PATIENCE.as_secs());
                    tracing::warn!(pod = machine.id, "{message}");
                    machine.blame(Obituary::of("GuestSilent", message));
                    self.kill().await;
                    return;
                }
                // Whoever follows the agent's events knows what to do; an error is an answer.
                Err(_) => {}
            }
        }
    }

    async fn kill(&self) {
        let Some(launcher) = self.launcher.upgrade() else { return };
        let (cgroups, place) = (Arc::clone(&launcher.cgroups), self.place.clone());
        let killed = tokio::task::spawn_blocking(move || cgroups.kill(&place)).await;
        if let Ok(Err(error)) = killed {
            tracing::error!(pod = self.place.id, %error, "cannot kill a machine");
        }
    }
}
