//! systemd as the owner of cgroups: a pod is a slice, its agent and each of its containers a scope.
//!
//! systemd wants to know every process's unit and writes limits itself, so each scope is announced to it over D-Bus
//! (StartTransientUnit) with the limits that hull has set. A scope needs a process to begin with: the agent is announced
//! before it enters its cgroup, a container right after its start, which therefore does not wait for systemd. Scopes end
//! by themselves with their last process; what hull started as a slice it also stops.

mod bus;
pub mod properties;
pub mod slice;
pub mod wire;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hull_agent::protocol::messages::Resources;

use bus::Bus;
pub use bus::BusError;
use wire::{Properties, Value, Writer};

/// Exists while systemd is the machine's init.
const BOOTED: &str = "/run/systemd/system";
/// How long a process may take to arrive in its scope.
const ARRIVAL: Duration = Duration::from_secs(25);
const SIGKILL: i32 = 9;

/// The way to systemd.
#[derive(Debug)]
pub struct Systemd {
    bus: Mutex<Option<Bus>>,
    v2: bool,
}

impl Systemd {
    /// Connects; `v2` says which kind of cgroups the machine has.
    pub fn connect(v2: bool) -> Result<Self, BusError> {
        Ok(Self { bus: Mutex::new(Some(Bus::connect()?)), v2 })
    }

    /// Whether systemd runs this machine.
    pub fn is_init() -> bool {
        Path::new(BOOTED).is_dir()
    }

    /// Announces an agent's first process and waits until it is in its scope, so that what it makes is, too.
    pub fn take_agent(&self, pod_cgroup: &str, id: &str, pid: u32) -> Result<(), BusError> {
        let mut all = self.scope(pod_cgroup, format!("hull pod {id}"), pid);
        // It blocks every signal that asks: the end of the machine must not wait for it.
        all.push(("KillSignal", Value::I32(SIGKILL)));
        let name = slice::leaf(pod_cgroup, id);
        self.start(&name, &all)?;
        let started = Instant::now();
        loop {
            let memberships = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            if memberships.lines().any(|line| line.ends_with(&name)) {
                return Ok(());
            }
            if started.elapsed() > ARRIVAL {
                let waited = format!("process {pid} has not arrived in {name}");
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, waited).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Announces a container that has just been started. That it has ended meanwhile is no error.
    pub fn take_container(
        &self,
        pod_cgroup: &str,
        id: &str,
        pid: u32,
        limits: &Resources,
    ) -> Result<(), BusError> {
        let mut all = self.scope(pod_cgroup, format!("hull container {id}"), pid);
        for (name, value) in properties::of_limits(limits, self.v2) {
            all.retain(|(known, _)| *known != name);
            all.push((name, value));
        }
        match self.start(&slice::leaf(pod_cgroup, id), &all) {
            Err(BusError::Refused { .. }) if !Path::new(&format!("/proc/{pid}")).exists() => Ok(()),
            other => other,
        }
    }

    fn scope(&self, pod_cgroup: &str, description: String, pid: u32) -> Properties {
        vec![
            ("Description", Value::Text(description)),
            ("Slice", Value::Text(slice::name_of(pod_cgroup).to_owned())),
            ("PIDs", Value::U32s(vec![pid])),
            ("Delegate", Value::Bool(true)),
            ("DefaultDependencies", Value::Bool(false)),
            ("CollectMode", Value::Text("inactive-or-failed".into())),
            // systemd's own default is a share of what the machine can have.
            ("TasksMax", Value::U64(u64::MAX)),
        ]
    }

    /// Starts a slice of hull's own, with these limits.
    pub fn start_slice(&self, pod_cgroup: &str, limits: &Resources) -> Result<(), BusError> {
        let mut all: Properties = vec![
            ("Description", Value::Text("hull pod".into())),
            ("DefaultDependencies", Value::Bool(false)),
        ];
        all.extend(properties::of_limits(limits, self.v2));
        self.start(slice::name_of(pod_cgroup), &all)
    }

    fn start(&self, unit: &str, properties: &Properties) -> Result<(), BusError> {
        let mut body = Writer::default();
        body.text(unit);
        body.text("replace");
        body.properties(properties);
        body.no_auxiliary_units();
        match self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body) {
            // The first try was heard before the connection broke.
            Err(error) if error.is("org.freedesktop.systemd1.UnitExists") => Ok(()),
            other => other,
        }
    }

    /// Changes the limits of a container's scope. That there is none is no error: it has ended.
    pub fn limit_container(&self, pod_cgroup: &str, id: &str, limits: &Resources) -> Result<(), BusError> {
        self.limit(&slice::leaf(pod_cgroup, id), limits)
    }

    /// Changes the limits of a slice.
    pub fn limit_slice(&self, pod_cgroup: &str, limits: &Resources) -> Result<(), BusError> {
        self.limit(slice::name_of(pod_cgroup), limits)
    }

    fn limit(&self, unit: &str, limits: &Resources) -> Result<(), BusError> {
        let mut body = Writer::default();
        body.text(unit);
        body.bool(true);
        body.properties(&properties::of_limits(limits, self.v2));
        unless_gone(self.call("SetUnitProperties", "sba(sv)", body))
    }

    /// Stops a slice of hull's own, with whatever is in it.
    pub fn stop_slice(&self, pod_cgroup: &str) -> Result<(), BusError> {
        let mut body = Writer::default();
        body.text(slice::name_of(pod_cgroup));
        body.text("replace");
        unless_gone(self.call("StopUnit", "ss", body))
    }

    /// One call at a time: systemd does one thing at a time, too. A connection that broke (systemd or the bus was
    /// started anew) is made again once.
    fn call(&self, member: &str, signature: &str, body: Writer) -> Result<(), BusError> {
        let mut bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = &mut *bus {
            match connected.manager(member, signature, body.clone()) {
                Err(BusError::Io(error)) if error.kind() != std::io::ErrorKind::WouldBlock => *bus = None,
                Err(error @ BusError::Io(_)) => {
                    // It may still answer, to somebody who does not expect it.
                    *bus = None;
                    return Err(error);
                }
                other => return other.map(drop),
            }
        }
        let mut connected = Bus::connect()?;
        let answer = connected.manager(member, signature, body);
        *bus = Some(connected);
        answer.map(drop)
    }
}

fn unless_gone(result: Result<(), BusError>) -> Result<(), BusError> {
    match result {
        Err(error) if error.is("org.freedesktop.systemd1.NoSuchUnit") => Ok(()),
        other => other,
    }
}
