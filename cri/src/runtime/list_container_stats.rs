//! ListContainerStats.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream};

use super::list_pod_sandbox_stats::AT_ONCE;
use super::objects::{Container, Pod};
use super::{Runtime, selector};
use crate::api::runtime::{ContainerStats, ContainerStatsFilter};

impl Runtime {
    /// The numbers of the containers that the filter lets through, pod by pod. Those that do not run are among them, as
    /// what their writable layers occupy counts for evictions.
    pub fn list_container_stats(
        self: &Arc<Self>,
        filter: Option<ContainerStatsFilter>,
    ) -> impl Stream<Item = ContainerStats> + Send + 'static {
        let filter = Arc::new(filter.unwrap_or_default());
        let runtime = Arc::clone(self);
        let mut pods = self.objects.pods();
        pods.retain(|pod| pod.id().starts_with(&filter.pod_sandbox_id));
        pods.sort_by_key(|pod| pod.with_record(|record| record.created_at));
        let measured = stream::iter(pods).map(move |pod| {
            let (runtime, filter) = (Arc::clone(&runtime), Arc::clone(&filter));
            async move { stream::iter(runtime.stats_of_containers(&pod, &filter).await) }
        });
        measured.buffered(AT_ONCE).flatten()
    }

    async fn stats_of_containers(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        filter: &ContainerStatsFilter,
    ) -> Vec<ContainerStats> {
        let mut containers = pod.containers();
        containers.retain(|container| fits(container, filter));
        if containers.is_empty() {
            return Vec::new();
        }
        let usage = self.measure(pod, &containers, false, false).await;
        // A pod that ended meanwhile must not hide the others.
        let usage = usage
            .inspect_err(|error| tracing::debug!(pod = pod.id(), %error, "not measured"))
            .unwrap_or_default();
        if let Err(error) = self.look_at_layers(&containers).await {
            tracing::debug!(pod = pod.id(), %error, "its writable layers were not looked at");
        }
        let stats = |container| self.stats_of(container, usage.containers.get(container.id()));
        containers.iter().map(stats).collect()
    }
}

fn fits(container: &Container, filter: &ContainerStatsFilter) -> bool {
    container.id().starts_with(&filter.id)
        && container.with_record(|record| {
            let labels = record.config.as_ref().map(|config| &config.labels);
            labels.map_or(filter.label_selector.is_empty(), |labels| {
                selector::matches(labels, &filter.label_selector)
            })
        })
}
