//! StreamContainerStats: ListContainerStats in pieces.

use std::sync::Arc;

use futures::stream::BoxStream;
use tonic::Status;

use super::Runtime;
use super::stream_chunks::chunks;
use crate::api::runtime::{StreamContainerStatsRequest, StreamContainerStatsResponse};

impl Runtime {
    /// The numbers of the containers that the filter lets through.
    pub fn stream_container_stats(
        self: &Arc<Self>,
        request: StreamContainerStatsRequest,
    ) -> BoxStream<'static, Result<StreamContainerStatsResponse, Status>> {
        let stats = self.list_container_stats(request.filter);
        chunks(stats, |container_stats| StreamContainerStatsResponse { container_stats })
    }
}
