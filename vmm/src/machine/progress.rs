use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::control::Events;
use crate::devices::legacy::PortEvent;
use crate::protocol::messages::event::Kind;
use crate::protocol::messages::{AgentListening, AgentStarted, Panicked};
use crate::vcpu::{VcpuEvent, VcpuEvents};

/// How far the guest has come.
#[derive(Debug)]
pub struct Progress {
    /// When the VMM's first process started.
    started: Instant,
    /// When it had read its request.
    read: Instant,
    /// Microseconds since the start; 0: not yet.
    agent_started: AtomicU64,
    agent_listening: AtomicU64,
    panicked: AtomicBool,
}

impl Progress {
    /// Of a machine whose process started and had read its request then.
    #[must_use]
    pub fn new(started: Instant, read: Instant) -> Self {
        let (agent_started, agent_listening) = Default::default();
        Self { started, read, agent_started, agent_listening, panicked: AtomicBool::new(false) }
    }

    /// Microseconds since the process started.
    #[must_use]
    pub fn uptime(&self) -> u64 {
        micros(self.started.elapsed())
    }

    /// When the agent ran its first instruction, and when it listened, in microseconds since the process started.
    #[must_use]
    pub fn agent(&self) -> (Option<u64>, Option<u64>) {
        let read = |at: &AtomicU64| Some(at.load(Ordering::Relaxed)).filter(|micros| *micros > 0);
        (read(&self.agent_started), read(&self.agent_listening))
    }

    /// Hears the processors, keeps what it hears and passes it on to hulld.
    #[must_use]
    pub fn listen(this: &Arc<Self>, events: &Events) -> VcpuEvents {
        let (this, events) = (Arc::clone(this), events.clone());
        Arc::new(move |event| this.hear(event, &events))
    }

    fn hear(&self, event: VcpuEvent, events: &Events) {
        match event {
            VcpuEvent::Port(PortEvent::AgentStarted) => {
                if let Some((micros, micros_since_boot)) = self.first(&self.agent_started) {
                    events.send(Kind::AgentStarted(AgentStarted { micros, micros_since_boot }));
                }
            }
            VcpuEvent::Port(PortEvent::AgentListening) => {
                if let Some((micros, micros_since_boot)) = self.first(&self.agent_listening) {
                    events.send(Kind::AgentListening(AgentListening { micros, micros_since_boot }));
                }
            }
            VcpuEvent::Port(PortEvent::Panicked(message)) => self.panicked(message, events),
            VcpuEvent::Port(PortEvent::Reset(panic)) => {
                if let Some(message) = panic {
                    self.panicked(message, events);
                }
                let panicked = self.panicked.load(Ordering::Relaxed);
                events.end(if panicked { "the guest's kernel panicked" } else { "the guest restarted" });
            }
            VcpuEvent::Port(PortEvent::PowerOff) => events.end("the guest powered off"),
            VcpuEvent::Stopped(how) => events.end(format!("the guest stopped: {how}")),
            VcpuEvent::Failed(why) => {
                events.fault("vcpu", why.clone());
                events.end(format!("a virtual processor failed: {why}"));
            }
            VcpuEvent::Device(error) => events.fault("virtio", error.to_string()),
        }
    }

    /// Notes the moment, if it is the first time: a guest can write to its port as often as it likes.
    fn first(&self, at: &AtomicU64) -> Option<(u64, u64)> {
        let now = self.uptime().max(1);
        at.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some((now, micros(self.read.elapsed())))
    }

    fn panicked(&self, message: String, events: &Events) {
        if !self.panicked.swap(true, Ordering::Relaxed) {
            events.send(Kind::Panicked(Panicked { message }));
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
