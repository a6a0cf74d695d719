//! StreamPodSandboxMetrics: ListPodSandboxMetrics in pieces.

use std::sync::Arc;

use futures::stream::BoxStream;
use tonic::Status;

use super::Runtime;
use super::stream_chunks::chunks;
use crate::api::runtime::StreamPodSandboxMetricsResponse;

impl Runtime {
    /// The metrics of the pods that run.
    pub fn stream_pod_sandbox_metrics(
        self: &Arc<Self>,
    ) -> BoxStream<'static, Result<StreamPodSandboxMetricsResponse, Status>> {
        let metrics = self.list_pod_sandbox_metrics();
        chunks(metrics, |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics })
    }
}
