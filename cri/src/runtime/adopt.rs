//! The start of hulld: what still runs is taken up, what has ended is noted, what nobody knows is cleared away.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use hull_agent::protocol::messages::{StopSandbox, request};
use hull_images::LayerId;
use hull_network::PodNetwork;

use super::objects::{Container, Pod, container_key, pod_key};
use super::{OpenError, Runtime, blocking};
use crate::sandbox::{Obituary, Place, SandboxError, Slots};
use crate::store::record::{ContainerRecord, EXIT_CODE_UNKNOWN, PodPhase, SandboxRecord};

/// How long an agent may take before hulld serves requests without it; then it is tried further in the background.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause between attempts to reach an agent that is there and does not answer.
const PAUSE: Duration = Duration::from_secs(2);

impl Runtime {
    pub(super) async fn adopt_all(self: &Arc<Self>) -> Result<(), OpenError> {
        for record in self.store.sandboxes.load()? {
            self.add_recorded_pod(record);
        }
        for record in self.store.containers.load()? {
            self.add_recorded_container(record)?;
        }
        let pods = self.objects.pods();
        join_all(pods.iter().map(|pod| self.adopt(pod))).await;
        self.sweep_directories().await;
        let live: BTreeSet<String> = self
            .objects
            .pods()
            .iter()
            .filter(|pod| pod.with_record(|record| record.network_held))
            .map(|pod| pod.id().to_owned())
            .collect();
        if let Err(error) = self.network.collect(&live).await {
            tracing::warn!(%error, "cannot give back the network of pods that are gone");
        }
        let images = Arc::clone(&self.images);
        match blocking(move || images.sweep()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the image store"),
            Err(error) => tracing::warn!(%error, "cannot sweep the image store"),
        }
        Ok(())
    }

    fn add_recorded_pod(&self, record: SandboxRecord) {
        let directory = self.pod_directory(&record.id);
        let launcher = self.launcher(&record.runtime_handler).unwrap_or_else(|error| {
            tracing::warn!(pod = record.id, %error, "the pod's runtime handler is gone; its pod can only be removed");
            Arc::clone(&self.launcher)
        });
        let metadata = record.config.as_ref().and_then(|config| config.metadata.as_ref());
        if let Some(metadata) = metadata {
            self.pod_names.hold(pod_key(metadata), record.id.clone());
        }
        self.objects.add_pod(Pod::new(record, launcher, directory));
    }

    fn add_recorded_container(&self, record: ContainerRecord) -> Result<(), OpenError> {
        let Ok(pod) = self.objects.pod(&record.sandbox_id) else {
            tracing::warn!(container = record.id, "a container's pod is gone; so is the container");
            self.store.containers.remove(&record.id)?;
            return Ok(());
        };
        let layers: Vec<LayerId> = record
            .image
            .iter()
            .flat_map(|image| &image.layers)
            .chain(record.image_volumes.iter().flat_map(|volume| &volume.layers))
            .filter_map(|layer| layer.parse().ok())
            .collect();
        let metadata = record.config.as_ref().and_then(|config| config.metadata.as_ref());
        if let Some(metadata) = metadata {
            self.container_names.hold(container_key(pod.id(), metadata), record.id.clone());
        }
        self.objects.add_container(Container::new(record, pod, self.images.hold(&layers)));
        Ok(())
    }

    async fn adopt(self: &Arc<Self>, pod: &Arc<Pod>) {
        let this_boot = pod.with_record(|record| record.boot_id == self.boot_id);
        match pod.phase() {
            PodPhase::Creating => self.unmake(pod).await,
            PodPhase::Ready | PodPhase::Lost if !this_boot => self.note_reboot(pod),
            PodPhase::Ready if !self.has_its_network(pod) => self.end_pod_without_network(pod).await,
            PodPhase::Ready => {
                // Also of one that is being stopped: its agent may still tell how its containers ended.
                self.reach(pod).await;
                if pod.phase() == PodPhase::Ready && pod.with_record(|record| record.stopping) {
                    self.stop_on(pod);
                }
            }
            PodPhase::Lost | PodPhase::Stopped => {
                // hulld may have been killed while it brought the pod up again.
                if self.pod_directory(pod.id()).exists()
                    && let Err(error) = self.clear(pod).await
                {
                    tracing::warn!(pod = pod.id(), %error, "cannot clear away what is left of the pod");
                }
                self.note_exit_records(pod);
                let (code, why) = self.verdict(pod, Obituary::agent_lost());
                self.end_all(pod, code, &why);
            }
        }
    }

    /// hulld was killed while it made this pod; nobody was told of it.
    async fn unmake(self: &Arc<Self>, pod: &Arc<Pod>) {
        match self.dismantle(pod).await {
            Ok(()) => {
                if let Some(metadata) = pod.with_record(|record| record.config.clone()?.metadata) {
                    self.pod_names.release(&pod_key(&metadata), pod.id());
                }
                self.objects.remove_pod(pod.id());
                if let Err(error) = self.store.sandboxes.remove(pod.id()) {
                    tracing::warn!(pod = pod.id(), %error, "the record of a pod that was not made stays");
                }
            }
            Err(error) => {
                tracing::warn!(pod = pod.id(), %error, "a pod that was not made cannot be cleared away yet");
                pod.change(&self.store, |record| record.set_phase(PodPhase::Lost));
            }
        }
    }

    /// Nothing survives a restart of the machine, but that it was there must not be forgotten: a pod that is to run
    /// once would run twice.
    fn note_reboot(&self, pod: &Pod) {
        self.note_exit_records(pod);
        let why = Obituary::of("NodeRebooted", "the machine was restarted while the container ran");
        self.end_all(pod, EXIT_CODE_UNKNOWN, &why);
        if pod.phase() == PodPhase::Ready {
            tracing::info!(pod = pod.id(), "the pod is of another boot of this machine");
            pod.change(&self.store, |record| {
                record.set_phase(PodPhase::Lost);
                record.agent_pid = 0;
            });
        }
    }

    fn has_its_network(&self, pod: &Pod) -> bool {
        !pod.with_record(|record| record.network_held) || self.network.has_record(pod.id())
    }

    /// The network's record was lost: the pod's addresses would be given to others while it lives.
    async fn end_pod_without_network(self: &Arc<Self>, pod: &Arc<Pod>) {
        tracing::warn!(pod = pod.id(), "the record of the pod's network is lost; the pod is ended");
        if let Err(error) = self.clear(pod).await {
            tracing::error!(pod = pod.id(), %error, "cannot end the pod");
        }
        self.note_exit_records(pod);
        let why = Obituary::of("NetworkLost", "the record of the pod's network was lost");
        self.end_all(pod, EXIT_CODE_UNKNOWN, &why);
        pod.change(&self.store, |record| {
            record.set_phase(PodPhase::Lost);
            record.agent_pid = 0;
        });
    }

    /// Connects to the agent of a pod that should live. One that is gone ends its pod; one that is slow is given time.
    async fn reach(self: &Arc<Self>, pod: &Arc<Pod>) {
        match tokio::time::timeout(PATIENCE, self.reconnect(pod)).await {
            Ok(Ok(())) => tracing::info!(pod = pod.id(), "took up the pod"),
            Ok(Err(SandboxError::Lost(reason))) => {
                tracing::info!(pod = pod.id(), reason, "cannot connect to the pod's agent");
                self.end_pod_of_lost_agent(pod).await;
            }
            Ok(Err(error)) => self.reach_later(pod, &error.to_string()),
            Err(_) => self.reach_later(pod, "it does not answer"),
        }
    }

    fn reach_later(self: &Arc<Self>, pod: &Arc<Pod>, reason: &str) {
        tracing::warn!(pod = pod.id(), reason, "cannot take up the pod yet; trying on");
        let (runtime, pod) = (Arc::clone(self), Arc::clone(pod));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = runtime.closing.cancelled() => return,
                    () = tokio::time::sleep(PAUSE) => {}
                }
                let _order = pod.order.write().await;
                if pod.is_ending() || pod.phase() != PodPhase::Ready {
                    return;
                }
                match tokio::time::timeout(PATIENCE, runtime.reconnect(&pod)).await {
                    Ok(Ok(())) => {
                        tracing::info!(pod = pod.id(), "took up the pod");
                        return;
                    }
                    Ok(Err(SandboxError::Lost(_))) => return runtime.end_pod_of_lost_agent(&pod).await,
                    Ok(Err(_)) | Err(_) => {}
                }
            }
        });
    }

    /// Directories of pods and containers that have no record.
    async fn sweep_directories(self: &Arc<Self>) {
        let pods: BTreeSet<String> = self.objects.pods().iter().map(|pod| pod.id().to_owned()).collect();
        for id in names_in(&self.config.state.join("pods")) {
            if self.objects.pods().iter().all(|pod| pod.id() != id) {
                tracing::warn!(pod = id, "ending a pod that has no record");
                self.end_unknown_pod(&id).await;
            }
        }
        // Those of pods that were ended just now are gone too: nothing uses their disks any more.
        let launchers: Vec<_> = self.launchers.values().cloned().collect();
        let sweep = move || launchers.iter().for_each(|launcher| launcher.sweep(&pods));
        if let Err(error) = blocking(sweep).await {
            tracing::warn!(%error, "cannot sweep what launchers have of pods that are gone");
        }
        for id in names_in(&self.config.root.join("containers")) {
            if self.objects.containers().iter().all(|container| container.id() != id)
                && let Err(error) = self.remove_tree(self.container_directory(&id)).await
            {
                tracing::warn!(container = id, %error, "cannot sweep a container that has no record");
            }
        }
    }

    /// Its agent is asked to end it; should that fail, its cgroup is cleared, and a living agent notices the removal of
    /// its directory.
    async fn end_unknown_pod(&self, id: &str) {
        let directory = self.pod_directory(id);
        let remembered = self.launchers.values().find_map(|launcher| {
            launcher.remembers(id, &directory).map(|place| (Arc::clone(launcher), place))
        });
        let (launcher, place) = remembered.unwrap_or_else(|| {
            // The record knew whether the pod's cgroup was hull's. If it was, it is the group with the pod's id here,
            // and goes with all that is in it.
            let cgroup_parent = self.config.cgroup.parent.clone();
            let cgroup_levels = cgroup_parent.split('/').filter(|part| !part.is_empty()).count() as u32;
            let place =
                Place { id: id.to_owned(), directory: directory.clone(), cgroup_parent, cgroup_levels };
            (Arc::clone(&self.launcher), place)
        });
        let ending = async {
            let (agent, _events) = launcher.reconnect(&place).await?;
            agent.order("stop the pod", request::Call::StopSandbox(StopSandbox {}), Slots::default()).await
        };
        if let Ok(Err(error)) = tokio::time::timeout(PATIENCE, ending).await {
            tracing::debug!(pod = id, %error, "no agent to ask");
        }
        let cleared = blocking(move || launcher.clear(&place, &[])).await;
        if let Ok(Err(error)) = cleared {
            tracing::warn!(pod = id, %error, "cannot clear away the cgroup of a pod that has no record");
        }
        // Its network may have lost its record, too; then at least the namespace goes.
        let network = PodNetwork { id: id.to_owned(), ..PodNetwork::default() };
        if let Err(error) = self.network.tear_down(&network).await {
            tracing::warn!(pod = id, %error, "cannot give back the network of a pod that has no record");
        }
        if let Err(error) = self.remove_tree(directory).await {
            tracing::warn!(pod = id, %error, "cannot sweep a pod that has no record");
        }
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}
