//! StreamPodSandboxStats: ListPodSandboxStats in pieces.

use std::sync::Arc;

use futures::stream::BoxStream;
use tonic::Status;

use super::Runtime;
use super::stream_chunks::chunks;
use crate::api::runtime::{StreamPodSandboxStatsRequest, StreamPodSandboxStatsResponse};

impl Runtime {
    /// The numbers of the pods that run and that the filter lets through.
    pub fn stream_pod_sandbox_stats(
        self: &Arc<Self>,
        request: StreamPodSandboxStatsRequest,
    ) -> BoxStream<'static, Result<StreamPodSandboxStatsResponse, Status>> {
        let stats = self.list_pod_sandbox_stats(request.filter);
        chunks(stats, |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }
}
