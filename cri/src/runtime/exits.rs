//! What agents tell: exits, and their own end.

use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_agent::protocol::exit_record;
use hull_agent::protocol::messages::{self, ContainerState, Event, ExitRecord, event, request};

use super::objects::{Container, Pod};
use super::{Runtime, blocking, host};
use crate::sandbox::{Agent, Events, Obituary, SandboxError, Slots};
use crate::store::record::{ContainerPhase, EXIT_CODE_UNKNOWN, Exit, PodPhase, RunningUser};

/// A broken connection to a living agent is mended at once or not at all.
const MEND: Duration = Duration::from_millis(400);
/// How long a killed container of nobody may hold up the adoption of its pod, and how often it is looked at.
const DEATH: Duration = Duration::from_secs(2);
const DYING: Duration = Duration::from_millis(10);
const SIGKILL: u32 = 9;
/// Containers of nobody that are ended at a time: an agent in a guest names as many as it likes.
const MOST_UNKNOWN: usize = 64;
/// The least time between two connections to an agent in a guest.
const RELAPSE: Duration = Duration::from_secs(1);
/// Lines of the log that the events of one pod may cause in a while.
const LINES: u32 = 20;
const WHILE: Duration = Duration::from_secs(60);

impl Runtime {
    /// Follows the events of a pod's agent until it, or hulld, ends.
    pub(super) fn follow(self: &Arc<Self>, pod: &Arc<Pod>, mut events: Events) {
        let runtime = Arc::clone(self);
        let pod = Arc::clone(pod);
        tokio::spawn(async move {
            let (begun, mut words) = (Instant::now(), Words::default());
            loop {
                tokio::select! {
                    () = runtime.closing.cancelled() => return,
                    event = events.recv() => match event {
                        Some(event) => runtime.note(&pod, event, &mut words).await,
                        None => break,
                    },
                }
            }
            if pod.launcher.has_own_kernel() {
                // One in a guest that hangs up as soon as it is spoken to must not keep hulld busy.
                tokio::time::sleep(RELAPSE.saturating_sub(begun.elapsed())).await;
            }
            if !pod.is_ending() && !runtime.closing.is_cancelled() {
                runtime.agent_lost(&pod).await;
            }
        });
    }

    async fn note(&self, pod: &Pod, event: Event, words: &mut Words) {
        match event.event {
            Some(event::Event::Exited(record)) => {
                // A container ends once, whatever an agent in a guest tells.
                let container = pod.container(&record.container_id);
                if container.is_some_and(|container| !container.with_record(|one| one.is_over())) {
                    pod.launcher.ended(&pod.place(), &record.container_id).await;
                }
                self.note_exit(pod, &record);
            }
            Some(event::Event::Oom(id)) => {
                let Some(container) = pod.container(&id) else { return };
                if words.one_more() {
                    let container = container.id();
                    tracing::info!(pod = pod.id(), container, "the kernel killed a process for memory");
                }
            }
            None => tracing::debug!(pod = pod.id(), "an event of a kind that this hulld does not know"),
        }
    }

    /// Commits a container's end.
    pub(super) fn note_exit(&self, pod: &Pod, record: &ExitRecord) {
        let Some(container) = pod.container(&record.container_id) else {
            tracing::debug!(pod = pod.id(), container = record.container_id, "an unknown container ended");
            return;
        };
        let exit = Exit {
            code: record.exit_code,
            finished_at: record.finished_at,
            oom_killed: record.oom_killed,
            reason: None,
            message: String::new(),
        };
        container.ended(&self.store, record.started_at, exit);
    }

    /// Brings a container up to what its agent knows of it.
    pub(super) fn note_state(&self, pod: &Pod, state: &ContainerState) {
        let Some(container) = pod.container(&state.id) else { return };
        if let Some(exit) = &state.exit {
            self.note_exit(pod, exit);
        } else if matches!(container.phase(), ContainerPhase::Created | ContainerPhase::Starting) {
            // hulld was killed between the agent's start and its own note of it, or the end of the record is torn; who runs
            // there is not known.
            container.change(&self.store, |record| {
                record.begin_start(&self.boot_id);
                record.started(state.pid, state.started_at, RunningUser::default());
            });
        }
    }

    /// Commits what the exit records in the pod's directory tell.
    pub(super) fn note_exit_records(&self, pod: &Pod) {
        let directory = pod.place().directory;
        let records = match fs::File::open(&directory).and_then(|dir| exit_record::list(dir.as_fd())) {
            Ok(records) => records,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!(pod = pod.id(), %error, "cannot read the pod's exit records");
                return;
            }
        };
        for record in &records {
            self.note_exit(pod, record);
        }
    }

    /// Every container that is not known to have ended has, nobody knows how.
    pub(super) fn end_all(&self, pod: &Pod, code: i32, why: &Obituary) {
        for container in pod.containers() {
            let exit = Exit {
                code,
                finished_at: host::now(),
                oom_killed: why.oom_killed,
                reason: Some(why.reason),
                message: why.message.clone(),
            };
            container.ended(&self.store, 0, exit);
        }
    }

    /// The agent's connection ended unasked: it is mended, or the pod is ended.
    async fn agent_lost(self: &Arc<Self>, pod: &Arc<Pod>) {
        let _order = pod.order.write().await;
        if pod.phase() != PodPhase::Ready || pod.is_ending() {
            return;
        }
        pod.set_agent(None);
        if let Ok(Ok(())) = tokio::time::timeout(MEND, self.reconnect(pod)).await {
            tracing::info!(pod = pod.id(), "reconnected to the pod's agent");
            return;
        }
        self.end_pod_of_lost_agent(pod).await;
    }

    /// Kills what is left of a pod without an agent, and says so in its records.
    pub(super) async fn end_pod_of_lost_agent(self: &Arc<Self>, pod: &Arc<Pod>) {
        let obituary = self.obituary(pod).await;
        tracing::warn!(
            pod = pod.id(),
            reason = obituary.message,
            "the pod is lost; its containers are ended"
        );
        if let Err(error) = self.clear(pod).await {
            tracing::error!(pod = pod.id(), %error, "cannot clear away what the agent left");
        }
        self.note_exit_records(pod);
        let (code, why) = self.verdict(pod, obituary);
        self.end_all(pod, code, &why);
        pod.change(&self.store, |record| {
            record.set_phase(PodPhase::Lost);
            record.agent_pid = 0;
        });
    }

    /// Why the pod is gone.
    async fn obituary(&self, pod: &Arc<Pod>) -> Obituary {
        let (launcher, place) = (Arc::clone(&pod.launcher), pod.place());
        blocking(move || launcher.obituary(&place)).await.unwrap_or_else(|_| Obituary::agent_lost())
    }

    /// Ends every process of the pod and removes its cgroups, without its agent's help.
    pub(super) async fn clear(&self, pod: &Arc<Pod>) -> super::Result<()> {
        let leaves: Vec<String> =
            pod.containers().iter().map(|container| container.id().to_owned()).collect();
        let (launcher, place) = (Arc::clone(&pod.launcher), pod.place());
        let id = pod.id().to_owned();
        blocking(move || launcher.clear(&place, &leaves))
            .await?
            .map_err(super::Error::sandbox(format!("cannot clear away the pod sandbox {id}")))
    }

    /// Connects to a pod's agent and catches up with it.
    pub(super) async fn reconnect(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<(), SandboxError> {
        let (agent, events) = pod.launcher.reconnect(&pod.place()).await?;
        self.catch_up(pod, &agent).await?;
        pod.set_agent(Some(agent));
        self.follow(pod, events);
        Ok(())
    }

    async fn catch_up(&self, pod: &Pod, agent: &Agent) -> Result<(), SandboxError> {
        let report = agent.state(crate::sandbox::agent::ANSWER_TIME).await?;
        if report.sandbox_id != pod.id() {
            return Err(SandboxError::Unexpected("the question who it is"));
        }
        pod.set_agent_has_rdt(report.rdt_tasks);
        for state in &report.containers {
            let news =
                pod.container(&state.id).is_some_and(|container| !container.with_record(|one| one.is_over()));
            if state.exit.is_some() && news {
                pod.launcher.ended(&pod.place(), &state.id).await;
            }
            self.note_state(pod, state);
        }
        let is_unknown = |state: &&ContainerState| {
            hull_agent::protocol::is_valid_id(&state.id) && pod.container(&state.id).is_none()
        };
        for state in report.containers.iter().filter(is_unknown).take(MOST_UNKNOWN) {
            end_unknown(pod, agent, &state.id).await;
        }
        // What it has been told to forget, or never heard of, left a record or nothing at all.
        self.note_exit_records(pod);
        let known =
            |container: &Arc<Container>| report.containers.iter().any(|state| state.id == container.id());
        for container in pod.containers().iter().filter(|container| !known(container)) {
            match container.phase() {
                ContainerPhase::Starting => {
                    container.start_never_happened(&self.store);
                }
                ContainerPhase::Running => {
                    let exit = Exit {
                        code: EXIT_CODE_UNKNOWN,
                        finished_at: host::now(),
                        oom_killed: false,
                        reason: Some("AgentLost"),
                        message: "the pod's agent knows nothing of the container".into(),
                    };
                    container.ended(&self.store, 0, exit);
                }
                ContainerPhase::Created | ContainerPhase::Exited => {}
            }
        }
        Ok(())
    }
}

/// What hulld still says of what a pod tells, until the while is over.
#[derive(Debug, Default)]
struct Words {
    begun: Option<Instant>,
    said: u32,
}

impl Words {
    fn one_more(&mut self) -> bool {
        if self.begun.is_none_or(|begun| begun.elapsed() >= WHILE) {
            *self = Self { begun: Some(Instant::now()), said: 0 };
        }
        self.said = self.said.saturating_add(1);
        self.said <= LINES
    }
}

/// Nobody could ever stop or remove a container whose record was lost, so it is ended now.
async fn end_unknown(pod: &Pod, agent: &Agent, id: &str) {
    tracing::warn!(pod = pod.id(), container = id, "ending a container that has no record");
    let kill = messages::Signal { container_id: id.to_owned(), signal: SIGKILL, all: true };
    let killed = agent.order("kill a container", request::Call::Signal(kill), Slots::default()).await;
    if let Err(error) = killed {
        tracing::debug!(pod = pod.id(), container = id, %error, "it cannot be killed");
    }
    let forgotten = async {
        loop {
            let forget = request::Call::Forget(messages::Forget { container_id: id.to_owned() });
            match agent.order("forget a container", forget, Slots::default()).await {
                // It is still dying.
                Err(SandboxError::Refused { code: messages::error::Code::FailedPrecondition, .. }) => {
                    tokio::time::sleep(DYING).await;
                }
                other => return other,
            }
        }
    };
    match tokio::time::timeout(DEATH, forgotten).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(pod = pod.id(), container = id, %error, "it stays in its pod's agent")
        }
        Err(_) => tracing::warn!(pod = pod.id(), container = id, "it was killed and does not end"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_tells_of_kills_without_end_does_not_flood_the_log() {
        let mut words = Words::default();
        assert_eq!((0..100_000).filter(|_| words.one_more()).count(), LINES as usize);
    }

    #[test]
    fn an_agents_own_words_are_bounded_and_without_control_characters() {
        let message = format!("\u{1b}[31mno{}", "x".repeat(1 << 20));
        let error = SandboxError::from(messages::Error { message, ..Default::default() });
        let SandboxError::Refused { message, .. } = error else { panic!() };
        assert!(message.starts_with("[31mno") && message.len() == 4096, "{}", message.len());
    }
}
