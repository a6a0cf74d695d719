//! StartContainer: the agent makes the container's first process.

use std::sync::Arc;

use hull_agent::protocol::messages::{ContainerStarted, StartContainer, request, response};

use super::create_container::facts;
use super::objects::Container;
use super::trace::Trace;
use super::translate::container::{self, Plan};
use super::{Error, Result, Runtime, blocking, blocking_here, host};
use crate::sandbox::{SandboxError, Slots, Source};
use crate::store::record::{ContainerPhase, Exit, RunningUser};

/// Exit code of a container that could not be started, as other runtimes report it.
const START_FAILED: i32 = 128;

/// Whether a container may be started that has run before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// As CRI has it: an attempt is made once.
    Never,
    /// If it has ended.
    AfterItsEnd,
}

/// How far the preparation of a start has come.
enum Planned<O> {
    /// What it needs from the host is to be opened.
    Whole(Plan, O),
    Opened((StartContainer, Slots)),
}

impl Runtime {
    /// Starts a container that has not been started yet.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.objects.container(id)?;
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.start(&container, Again::Never).await }).await
    }

    pub(super) async fn start(self: &Arc<Self>, container: &Arc<Container>, again: Again) -> Result<()> {
        let mut trace = Trace::begin("StartContainer");
        let _pod_order = container.pod.order.read().await;
        let _order = container.order.lock().await;
        let agent = container.pod.ready_agent()?;
        let once_more = again == Again::AfterItsEnd && container.phase() == ContainerPhase::Exited;
        if once_more {
            self.forget_run(container, &agent).await?;
            // Before the record says so: whoever stops it from then on waits for the end that is to come.
            container.begin_run();
        }
        let begun = container.try_change(&self.store, |record| match once_more {
            true => record.begin_start_again(&self.boot_id),
            false => record.begin_start(&self.boot_id),
        });
        if once_more && !matches!(begun, Ok(true)) {
            container.run_as_recorded();
        }
        if !begun? {
            return Err(Error::FailedPrecondition(format!(
                "the container {} was started before: it is {:?}",
                container.id(),
                container.phase()
            )));
        }
        trace.step("write the record");
        let (start, slots) = match self.prepare(container).await {
            Ok(prepared) => prepared,
            Err(error) => {
                self.note_failed_start(container, &error);
                return Err(error);
            }
        };
        trace.step("plan, open layers and volumes");
        let limits = start.resources.clone().unwrap_or_default();
        let asked = agent.ask(request::Call::StartContainer(start), slots);
        // On the socket before the agent can come to anything else: they miss nothing of the output.
        let attaches: Vec<_> = container
            .take_at_start()
            .into_iter()
            .map(|waiting| (agent.ask(request::Call::Attach(waiting.call), waiting.slots), waiting.done))
            .collect();
        let started = async {
            match asked {
                Ok(asked) => asked.answer().await,
                Err(error) => Err(error),
            }
        };
        let attached = async {
            for (asked, done) in attaches {
                let answer = match asked {
                    Ok(asked) => asked.answer().await.map(drop),
                    Err(error) => Err(error),
                };
                // Who attached may have left.
                let _ = done.send(answer);
            }
        };
        let (answer, ()) = tokio::join!(started, attached);
        match answer {
            Ok(response::Outcome::ContainerStarted(mut started)) => {
                let pid = started.pid;
                trace.step("the agent starts it");
                trace.parts(std::mem::take(&mut started.steps));
                self.note_start(container, started);
                let place = container.pod.place();
                let announced = container.pod.launcher.announce(&place, container.id(), Some(pid), &limits);
                if let Err(error) = announced.await {
                    tracing::warn!(container = container.id(), %error, "it runs, but in a cgroup of nobody's");
                }
                trace.step("write the record again, tell of it");
                self.traces.keep(trace, container.id());
                Ok(())
            }
            // Whoever learns of the agent's end ends its containers, this one among them.
            Err(error @ SandboxError::Lost(_)) => Err(Error::sandbox(doing(container))(error)),
            Ok(_) => {
                let error =
                    Error::sandbox(doing(container))(SandboxError::Unexpected("the start of a container"));
                self.note_failed_start(container, &error);
                Err(error)
            }
            Err(error) => {
                let error = Error::sandbox(doing(container))(error);
                self.note_failed_start(container, &error);
                Err(error)
            }
        }
    }

    async fn prepare(&self, container: &Container) -> Result<(StartContainer, Slots)> {
        let (record, pod) = (container.record(), container.pod.record());
        let directory = self.container_directory(container.id());
        let (launcher, node) = (Arc::clone(&container.pod.launcher), self.node_of(&container.pod));
        let (doing, place) = (doing(container), container.pod.place());
        let owner = Arc::clone(&container.pod);
        let plan = move || {
            let facts = facts(&record, &pod, &node)?;
            container::plan(&record, &pod, &directory, &facts)
        };
        let open = move |mut plan: Plan| {
            let slots = launcher.open(&place, &mut plan.start, &plan.sources, &|| owner.is_over());
            Ok((plan.start, slots.map_err(Error::sandbox(doing))?))
        };
        let own_kernel = container.pod.launcher.has_own_kernel();
        // Each change of threads costs more than most of the steps. But a path of the host may be one that never answers,
        // and a machine has more to do.
        let planned = blocking_here(move || {
            let plan = plan()?;
            match own_kernel || plan.sources.iter().any(|source| matches!(source, Source::Tree(_))) {
                true => Ok(Planned::Whole(plan, open)),
                false => open(plan).map(Planned::Opened),
            }
        });
        match planned.await?? {
            Planned::Whole(plan, open) => blocking(move || open(plan)).await?,
            Planned::Opened(opened) => Ok(opened),
        }
    }

    fn note_start(&self, container: &Container, started: ContainerStarted) {
        let user = RunningUser { uid: started.uid, gid: started.gid, groups: started.groups };
        container.change(&self.store, |record| record.started(started.pid, started.started_at, user));
    }

    fn note_failed_start(&self, container: &Container, error: &Error) {
        let exit = Exit {
            code: START_FAILED,
            finished_at: host::now(),
            oom_killed: false,
            reason: Some("StartError"),
            message: error.to_string(),
        };
        container.ended(&self.store, 0, exit);
    }
}

fn doing(container: &Container) -> String {
    format!("cannot start the container {}", container.id())
}
