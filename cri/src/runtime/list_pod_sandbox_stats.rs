//! ListPodSandboxStats.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream};

use super::objects::Pod;
use super::{Runtime, selector};
use crate::api::runtime::{PodSandboxStats, PodSandboxStatsFilter};
use crate::store::record::PodPhase;

/// Pods that are measured at the same time.
pub(super) const AT_ONCE: usize = 4;

impl Runtime {
    /// The numbers of the pods that run and that the filter lets through, oldest pod first.
    pub fn list_pod_sandbox_stats(
        self: &Arc<Self>,
        filter: Option<PodSandboxStatsFilter>,
    ) -> impl Stream<Item = PodSandboxStats> + Send + 'static {
        let filter = filter.unwrap_or_default();
        let runtime = Arc::clone(self);
        let pods = self.ready_pods(|pod| fits(pod, &filter));
        let measured = stream::iter(pods).map(move |pod| {
            let runtime = Arc::clone(&runtime);
            async move {
                let stats = runtime.stats_of_pod(&pod).await;
                // One that ended meanwhile must not hide the others.
                stats.inspect_err(|error| tracing::debug!(pod = pod.id(), %error, "not measured")).ok()
            }
        });
        measured.buffered(AT_ONCE).filter_map(|stats| async { stats })
    }

    /// The pods that run and that `wanted` lets through, oldest first.
    pub(super) fn ready_pods(&self, wanted: impl Fn(&Pod) -> bool) -> Vec<Arc<Pod>> {
        let mut pods = self.objects.pods();
        pods.retain(|pod| pod.phase() == PodPhase::Ready && wanted(pod));
        pods.sort_by_key(|pod| pod.with_record(|record| record.created_at));
        pods
    }
}

fn fits(pod: &Pod, filter: &PodSandboxStatsFilter) -> bool {
    pod.id().starts_with(&filter.id)
        && pod.with_record(|record| {
            let labels = record.config.as_ref().map(|config| &config.labels);
            labels.map_or(filter.label_selector.is_empty(), |labels| {
                selector::matches(labels, &filter.label_selector)
            })
        })
}
