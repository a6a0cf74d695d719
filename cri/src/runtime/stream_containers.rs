//! StreamContainers: ListContainers in pieces.

use futures::stream::{self, BoxStream};
use tonic::Status;

use super::Runtime;
use super::stream_chunks::chunks;
use crate::api::runtime::{ListContainersRequest, StreamContainersRequest, StreamContainersResponse};

impl Runtime {
    /// The containers that the filter lets through, newest first.
    pub fn stream_containers(
        &self,
        request: StreamContainersRequest,
    ) -> BoxStream<'static, Result<StreamContainersResponse, Status>> {
        let containers = self.list_containers(&ListContainersRequest { filter: request.filter });
        chunks(stream::iter(containers), |containers| StreamContainersResponse { containers })
    }
}
