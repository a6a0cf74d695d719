//! hull.v1 StartContainer: also for a container that has ended, whose files are as it left them.

use std::sync::Arc;

use hull_agent::protocol::messages::{Forget, request};

use super::objects::{Container, Pod};
use super::start_container::Again;
use super::trace::Trace;
use super::translate::pod;
use super::{Error, Result, Runtime, host};
use crate::api::hull::RUN_LABEL;
use crate::sandbox::{Agent, SandboxError, Slots};
use crate::store::record::PodPhase;

impl Runtime {
    /// Starts a container that was made, or one that has ended: with its writable layer, into the same log. Its pod has
    /// to be there, unless `hull run` made it: then it belongs to this container and is brought up again.
    pub async fn start_container_again(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.objects.container(id)?;
        let runtime = Arc::clone(self);
        let starting = async move {
            runtime.bring_back(&container).await?;
            runtime.start(&container, Again::AfterItsEnd).await
        };
        self.to_the_end(starting).await
    }

    /// Its agent forgets the run that is over. The caller holds the container's order.
    pub(super) async fn forget_run(&self, container: &Container, agent: &Agent) -> Result<()> {
        let call = request::Call::Forget(Forget { container_id: container.id().to_owned() });
        match agent.order("forget a container", call, Slots::default()).await {
            Ok(()) => Ok(()),
            // Whoever learns of the agent's end tells what that means; here it is only in the way.
            Err(error @ SandboxError::Lost(_)) => Err(Error::Unavailable(error.to_string())),
            Err(error) => {
                Err(Error::sandbox(format!("cannot start the container {} again", container.id()))(error))
            }
        }
    }

    /// Brings up the container's pod if it has ended and is ours to bring up.
    async fn bring_back(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let pod = &container.pod;
        if pod.phase() == PodPhase::Ready {
            return Ok(());
        }
        let config = pod.with_record(|record| record.config.clone()).unwrap_or_default();
        let refuse = |why: &str| {
            Err(Error::FailedPrecondition(format!(
                "the container {} cannot be started: its pod sandbox {} has ended, {why}",
                container.id(),
                pod.id()
            )))
        };
        if !config.labels.contains_key(RUN_LABEL) {
            return refuse("and only who made it can make another one");
        }
        if pod.launcher.has_own_kernel() {
            return refuse("and its files have gone with the pod's machine");
        }
        let Some(_order) = self.order_to_end(pod).await else {
            // It is to find the pod gone should it ever go on, and not another one in its place.
            return refuse("and an operation in it does not end: remove it");
        };
        if pod.phase() == PodPhase::Ready {
            return Ok(());
        }
        // What is left of it, after a restart of the machine perhaps nothing.
        self.dismantle(pod).await?;
        let brought = self.bring_up_again(pod).await;
        if brought.is_err()
            && let Err(error) = self.stop_pod(pod).await
        {
            tracing::warn!(pod = pod.id(), %error, "a pod that could not be brought up again is not cleared away");
        }
        brought
    }

    /// The caller holds the pod's order.
    async fn bring_up_again(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let (config, hostname) =
            pod.with_record(|record| (record.config.clone().unwrap_or_default(), record.hostname.clone()));
        let network = match pod::namespaces(&config)?.host_network {
            true => None,
            false => Some(pod::network(pod.id(), &config, &hostname)?),
        };
        // Not ready until it is: killed before that, hulld clears away what it finds.
        pod.try_change(&self.store, |record| {
            record.set_phase(PodPhase::Lost);
            record.boot_id.clone_from(&self.boot_id);
            record.network_held = network.is_some();
            record.addresses.clear();
            record.agent_pid = 0;
            record.reaper_pid = 0;
            record.stopping = false;
        })?;
        let mut trace = Trace::begin("RunPodSandbox");
        self.bring_up(pod, &config, network, &host::host(), &mut trace).await?;
        self.traces.keep(trace, pod.id());
        Ok(())
    }
}
