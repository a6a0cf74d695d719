//! StopPodSandbox: nothing of the pod runs any more, and its network is given back.

use std::sync::Arc;
use std::time::Duration;

use hull_agent::protocol::messages::{StopSandbox, request};
use tokio::sync::{RwLock, RwLockWriteGuard};

use super::objects::Pod;
use super::translate::pod;
use super::{Error, Result, Runtime};
use crate::sandbox::{Obituary, SandboxError, Slots};
use crate::store::record::{EXIT_CODE_UNKNOWN, PodPhase};

/// How long an operation on one of its containers may keep a pod from being stopped.
const COURTESY: Duration = Duration::from_secs(10);
/// How long an agent may take to end its pod; it gives up itself after 10 s.
const STOP_TIME: Duration = Duration::from_secs(15);
/// Exit code of a container that was killed with its pod (128 + SIGKILL).
const KILLED: i32 = 137;

/// Why a container ended that was killed with its pod.
fn killed_with_pod() -> Obituary {
    Obituary::of("Error", "the container was killed with its pod")
}

impl Runtime {
    /// Stops a pod. That it is stopped, or gone, already is no error.
    pub async fn stop_pod_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        let pod = match self.objects.pod(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let runtime = Arc::clone(self);
        let stopping = async move {
            let _order = runtime.order_to_end(&pod).await;
            runtime.stop_pod(&pod).await
        };
        self.to_the_end(stopping).await
    }

    /// The order of a pod that is to be ended. An agent that hangs in the start of a container must not keep its pod
    /// alive: with its death the start fails, and the order is free. None: whoever holds it waits for something else
    /// that will not come, the server of a mount source say, and finds the pod gone should it ever go on.
    pub(super) async fn order_to_end<'a>(&self, pod: &'a Arc<Pod>) -> Option<RwLockWriteGuard<'a, ()>> {
        let kill = async || {
            tracing::warn!(pod = pod.id(), "an operation in the pod does not end; the pod is killed");
            self.begin_end(pod);
            if let Err(error) = self.clear(pod).await {
                tracing::warn!(pod = pod.id(), %error, "cannot kill the pod");
            }
        };
        let order = win(&pod.order, COURTESY, kill).await;
        if order.is_none() {
            tracing::warn!(pod = pod.id(), "an operation outlives its pod");
        }
        order
    }

    /// The caller holds the pod's order.
    pub(super) async fn stop_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        if pod.with_record(|record| record.phase() == PodPhase::Stopped && !record.network_held) {
            return Ok(());
        }
        self.dismantle(pod).await?;
        pod.try_change(&self.store, |record| {
            record.set_phase(PodPhase::Stopped);
            record.addresses.clear();
            record.agent_pid = 0;
            record.reaper_pid = 0;
            record.stopping = false;
        })
    }

    /// From now on the end of the pod is meant. A machine takes along how its last containers ended, so that it was
    /// stopped must be known before it is: hulld may be killed in between.
    fn begin_end(&self, pod: &Pod) {
        pod.set_ending(true);
        let runs = pod.phase() == PodPhase::Ready && !pod.with_record(|record| record.stopping);
        if runs && pod.launcher.has_own_kernel() {
            pod.change(&self.store, |record| record.stopping = true);
        }
    }

    /// Ends the agent and all it runs, removes cgroups, network and volatile directory. Can be repeated until it works.
    pub(super) async fn dismantle(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        self.begin_end(pod);
        if let Some(agent) = pod.agent() {
            let call = request::Call::StopSandbox(StopSandbox {});
            match agent.call_within(STOP_TIME, "stop the pod", call, Slots::default()).await {
                Ok(_) | Err(SandboxError::Lost(_)) => {}
                Err(error) => {
                    tracing::warn!(pod = pod.id(), %error, "the pod's agent does not stop it; it is killed");
                }
            }
            pod.set_agent(None);
        }
        let cleared = self.clear(pod).await;
        self.note_exit_records(pod);
        if cleared.is_err() {
            // What is left of it has no agent any more: until it is tried again, nobody must take it for a pod that works.
            self.mark_lost(pod);
        }
        cleared?;
        self.end_all(pod, KILLED, &killed_with_pod());
        // Should the network refuse below, the same.
        self.mark_lost(pod);
        if pod.with_record(|record| record.network_held) {
            let (config, hostname) = pod
                .with_record(|record| (record.config.clone().unwrap_or_default(), record.hostname.clone()));
            let network = pod::network(pod.id(), &config, &hostname)?;
            self.network.tear_down(&network).await?;
            pod.change(&self.store, |record| record.network_held = false);
        }
        self.remove_tree(self.pod_directory(pod.id())).await
    }

    /// Exit code and reason of what ran in a pod that was found dead for this reason. One that was being stopped died of
    /// that, unless its machine says otherwise.
    pub(super) fn verdict(&self, pod: &Pod, obituary: Obituary) -> (i32, Obituary) {
        let own = matches!(obituary.reason, "OOMKilled" | "GuestPanic" | "MachineFault" | "GuestSilent");
        match pod.with_record(|record| record.stopping) && !own {
            true => (KILLED, killed_with_pod()),
            false => (EXIT_CODE_UNKNOWN, obituary),
        }
    }

    /// Ends the stop that was begun when hulld was killed, as whoever asked for it was promised nothing less.
    pub(super) fn stop_on(self: &Arc<Self>, pod: &Arc<Pod>) {
        tracing::info!(pod = pod.id(), "the stop of the pod was interrupted; it goes on");
        let (runtime, pod) = (Arc::clone(self), Arc::clone(pod));
        // Like any other: a hulld that ends waits for it.
        self.operations.spawn(async move {
            let _order = runtime.order_to_end(&pod).await;
            if let Err(error) = runtime.stop_pod(&pod).await {
                tracing::warn!(pod = pod.id(), %error, "cannot end the stop of the pod");
            }
        });
    }

    fn mark_lost(&self, pod: &Pod) {
        if pod.phase() == PodPhase::Ready {
            pod.change(&self.store, |record| record.set_phase(PodPhase::Lost));
        }
    }

    /// Removes a directory of hull's own with all in it; a missing one is fine.
    pub(super) async fn remove_tree(&self, path: std::path::PathBuf) -> Result<()> {
        super::blocking(move || match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Internal(format!("cannot remove {}: {error}", path.display())))
            }
            _ => Ok(()),
        })
        .await?
    }
}

/// An order that others have for `courtesy` yet; then they are killed, and have as long again to let go of it.
async fn win(
    order: &RwLock<()>,
    courtesy: Duration,
    kill: impl AsyncFnOnce(),
) -> Option<RwLockWriteGuard<'_, ()>> {
    if let Ok(order) = tokio::time::timeout(courtesy, order.write()).await {
        return Some(order);
    }
    kill().await;
    tokio::time::timeout(courtesy, order.write()).await.ok()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn an_operation_that_outlives_its_killed_pod_does_not_keep_it_from_being_stopped() {
        let order = RwLock::new(());
        let mut killed = 0;
        assert!(win(&order, MOMENT, async || killed += 1).await.is_some());
        assert_eq!(killed, 0, "what is free is not fought for");

        let busy = order.read().await;
        assert!(win(&order, MOMENT, async || killed += 1).await.is_none());
        assert_eq!(killed, 1);
        // One that ends with its pod
        assert!(win(&order, Duration::from_secs(60), async || unreachable!()).now_or_never().is_none());
        let mut busy = Some(busy);
        assert!(win(&order, MOMENT, async || drop(busy.take())).await.is_some());
    }
}
