//! StreamPodSandboxes: ListPodSandbox in pieces.

use futures::stream::{self, BoxStream};
use tonic::Status;

use super::Runtime;
use super::stream_chunks::chunks;
use crate::api::runtime::{ListPodSandboxRequest, StreamPodSandboxesRequest, StreamPodSandboxesResponse};

impl Runtime {
    /// The pods that the filter lets through, newest first.
    pub fn stream_pod_sandboxes(
        &self,
        request: StreamPodSandboxesRequest,
    ) -> BoxStream<'static, Result<StreamPodSandboxesResponse, Status>> {
        let pods = self.list_pod_sandbox(&ListPodSandboxRequest { filter: request.filter });
        chunks(stream::iter(pods), |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes })
    }
}
