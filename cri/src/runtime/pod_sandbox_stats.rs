//! PodSandboxStats, and the measuring that all numbers come from.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::container_stats::attributes as container_attributes;
use super::objects::{Container, Pod};
use super::{Error, Result, Runtime, blocking, now};
use crate::api::runtime::{
    ContainerStats, FilesystemIdentifier, FilesystemUsage, LinuxPodSandboxStats, PodSandboxAttributes,
    PodSandboxStats, PodSandboxStatsRequest, UInt64Value,
};
use crate::stats::disk::{self, Need};
use crate::stats::{Measured, PodUsage, Subject, convert};
use crate::store::record::{ContainerPhase, PodPhase};

impl Runtime {
    /// What one pod uses. One that does not run has its containers' writable layers only.
    pub async fn pod_sandbox_stats(
        self: &Arc<Self>,
        request: &PodSandboxStatsRequest,
    ) -> Result<PodSandboxStats> {
        let pod = self.objects.pod(&request.pod_sandbox_id)?;
        self.stats_of_pod(&pod).await
    }

    pub(super) async fn stats_of_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<PodSandboxStats> {
        let containers = pod.containers();
        let usage = self.measure(pod, &containers, true, false).await?;
        self.look_at_layers(&containers).await?;
        let mut stats: Vec<_> = containers
            .iter()
            .map(|container| self.stats_of(container, usage.containers.get(container.id())))
            .collect();
        stats.sort_by(|one, other| name_of(one).cmp(&name_of(other)));
        let whole = usage.whole.as_ref();
        let rate = whole.and_then(|whole| pod.rate.sample(whole.at, whole.usage.cpu?.usage));
        let linux = LinuxPodSandboxStats {
            cpu: whole.and_then(|whole| convert::cpu(whole, rate)),
            memory: whole.and_then(|whole| convert::memory(whole, whole.limits.memory.memory)),
            network: whole.and_then(|whole| convert::network(whole.at, &usage.interfaces)),
            process: whole.map(convert::processes),
            containers: stats,
            io: whole.and_then(convert::io),
        };
        Ok(PodSandboxStats { attributes: Some(attributes(pod)), linux: Some(linux), windows: None })
    }

    /// Measures a pod and, of these containers of its, those that run.
    pub(super) async fn measure(
        &self,
        pod: &Arc<Pod>,
        containers: &[Arc<Container>],
        whole_pod: bool,
        details: bool,
    ) -> Result<PodUsage> {
        if pod.phase() != PodPhase::Ready {
            return Ok(PodUsage::default());
        }
        let running = |container: &&Arc<Container>| container.phase() == ContainerPhase::Running;
        let (agent_pid, network_namespace) =
            pod.with_record(|record| (record.agent_pid, record.network_namespace.clone()));
        let subject = Subject {
            agent_pid,
            network_namespace: (!network_namespace.is_empty()).then(|| PathBuf::from(network_namespace)),
            containers: containers.iter().filter(running).map(|one| one.id().to_owned()).collect(),
            whole_pod,
            details,
        };
        let measured = pod.launcher.measure(&pod.place(), subject).await;
        measured.map_err(Error::sandbox(format!("cannot measure the pod sandbox {}", pod.id())))
    }

    /// The numbers of a container; `measured` of one that runs.
    pub(super) fn stats_of(
        self: &Arc<Self>,
        container: &Arc<Container>,
        measured: Option<&Measured>,
    ) -> ContainerStats {
        let rate = measured.and_then(|one| container.rate.sample(one.at, one.usage.cpu?.usage));
        ContainerStats {
            attributes: Some(container_attributes(container)),
            cpu: measured.and_then(|one| convert::cpu(one, rate)),
            memory: measured.and_then(|one| convert::memory(one, one.limits.memory.memory)),
            writable_layer: self.writable_layer(container),
            swap: measured.and_then(|one| convert::swap(one, one.limits.memory.swap)),
            io: measured.and_then(convert::io),
        }
    }

    /// Gives containers whose writable layers have never been looked at a first number.
    pub(super) async fn look_at_layers(&self, containers: &[Arc<Container>]) -> Result<()> {
        let unknown: Vec<_> = containers
            .iter()
            .filter(|container| container.disk.known().is_none())
            .map(|container| (Arc::clone(container), self.container_directory(container.id())))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        blocking(move || {
            for (container, directory) in &unknown {
                let (pod, id) = (&container.pod, container.id());
                container.disk.look(directory, now(), || pod.launcher.scratch(&pod.place(), id));
            }
        })
        .await
    }

    /// What a writable layer was known to occupy when it was last counted; has it counted again if that is due.
    fn writable_layer(self: &Arc<Self>, container: &Arc<Container>) -> Option<FilesystemUsage> {
        self.count_if_due(container);
        let (timestamp, occupied) = container.disk.known()?;
        // The same place that ImageFsInfo names: kubelet finds the filesystem by it.
        let mountpoint = self.config.root.join("images").to_string_lossy().into_owned();
        Some(FilesystemUsage {
            timestamp,
            fs_id: Some(FilesystemIdentifier { mountpoint }),
            used_bytes: Some(UInt64Value { value: occupied.bytes }),
            inodes_used: Some(UInt64Value { value: occupied.inodes }),
        })
    }

    pub(super) fn count_if_due(self: &Arc<Self>, container: &Arc<Container>) {
        let end = container
            .with_record(|record| (record.phase() == ContainerPhase::Exited).then_some(record.finished_at));
        if container.disk.need(end) == Need::Nothing {
            return;
        }
        let directory = self.container_directory(container.id());
        let (runtime, container) = (Arc::clone(self), Arc::clone(container));
        let count = {
            let container = Arc::clone(&container);
            move || {
                let elsewhere = container.pod.launcher.scratch(&container.pod.place(), container.id());
                Ok(disk::count_all(&directory)?.and(elsewhere))
            }
        };
        tokio::spawn(async move {
            // One at a time: it is disk work that nobody waits for.
            let turn = runtime.counting.acquire().await;
            let (at, begun) = (now(), Instant::now());
            let counted = match turn {
                Ok(_) => blocking(count).await,
                Err(_) => Err(Error::Unavailable("hulld stops".into())),
            };
            let result = counted.unwrap_or_else(|error| Err(io::Error::other(error.to_string())));
            container.disk.counted(at, begun.elapsed(), result);
        });
    }
}

fn name_of(stats: &ContainerStats) -> Option<&str> {
    Some(stats.attributes.as_ref()?.metadata.as_ref()?.name.as_str())
}

fn attributes(pod: &Pod) -> PodSandboxAttributes {
    pod.with_record(|record| {
        let config = record.config.clone().unwrap_or_default();
        PodSandboxAttributes {
            id: record.id.clone(),
            metadata: config.metadata,
            labels: config.labels,
            annotations: config.annotations,
        }
    })
}
