//! ListPodSandboxMetrics.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream};

use super::list_pod_sandbox_stats::AT_ONCE;
use super::objects::{Container, Pod};
use super::{Result, Runtime, blocking};
use crate::api::runtime::{ContainerMetrics, PodSandboxMetrics};
use crate::stats::metrics::{self, Labels, Layer};
use crate::stats::{Filesystem, Measured};

impl Runtime {
    /// The metrics of the pods that run and of their running containers, oldest pod first.
    pub fn list_pod_sandbox_metrics(
        self: &Arc<Self>,
    ) -> impl Stream<Item = PodSandboxMetrics> + Send + 'static {
        let runtime = Arc::clone(self);
        let measured = stream::iter(self.ready_pods(|_| true)).map(move |pod| {
            let runtime = Arc::clone(&runtime);
            async move {
                let metrics = runtime.metrics_of(&pod).await;
                metrics.inspect_err(|error| tracing::debug!(pod = pod.id(), %error, "not measured")).ok()
            }
        });
        measured.buffered(AT_ONCE).filter_map(|metrics| async { metrics })
    }

    async fn metrics_of(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<PodSandboxMetrics> {
        let containers = pod.containers();
        let usage = self.measure(pod, &containers, true, true).await?;
        self.look_at_layers(&containers).await?;
        let root = self.config.root.clone();
        let filesystem = blocking(move || Filesystem::of(&root)).await?.unwrap_or_default();
        let labels = labels_of_pod(pod);
        let of_container = |container: &Arc<Container>, measured: &Measured| {
            self.count_if_due(container);
            let layer = Layer {
                occupied: container.disk.known().map(|(_, occupied)| occupied),
                filesystem: filesystem.clone(),
            };
            let labels = labels_of(container, &labels, &measured.cgroup);
            let started_at = container.with_record(|record| record.started_at);
            ContainerMetrics {
                container_id: container.id().to_owned(),
                metrics: metrics::container(&labels, measured, &layer, started_at),
            }
        };
        let container_metrics = containers
            .iter()
            .filter_map(|container| Some(of_container(container, usage.containers.get(container.id())?)))
            .collect();
        Ok(PodSandboxMetrics {
            pod_sandbox_id: pod.id().to_owned(),
            metrics: metrics::pod(&labels, &usage),
            container_metrics,
        })
    }
}

fn labels_of_pod(pod: &Pod) -> Labels {
    pod.with_record(|record| {
        let metadata = record.config.as_ref().and_then(|config| config.metadata.clone()).unwrap_or_default();
        Labels {
            id: record.cgroup_parent.clone(),
            namespace: metadata.namespace,
            pod: metadata.name,
            ..Labels::default()
        }
    })
}

fn labels_of(container: &Container, pod: &Labels, cgroup: &str) -> Labels {
    container.with_record(|record| {
        let metadata = record.config.as_ref().and_then(|config| config.metadata.as_ref());
        let image = record.image.clone().unwrap_or_default();
        let names = [image.repo_tag, image.repo_digest, image.id];
        Labels {
            id: cgroup.to_owned(),
            name: record.id.clone(),
            image: names.into_iter().find(|name| !name.is_empty()).unwrap_or_default(),
            container: metadata.map(|metadata| metadata.name.clone()).unwrap_or_default(),
            ..pod.clone()
        }
    })
}
