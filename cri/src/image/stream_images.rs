//! StreamImages: ListImages in pieces.

use futures::stream::{self, BoxStream};
use tonic::Status;

use crate::api::runtime::{ListImagesRequest, StreamImagesRequest, StreamImagesResponse};
use crate::runtime::stream_chunks::chunks;
use crate::runtime::{Result, Runtime};

impl Runtime {
    /// All images, or the one that the filter names.
    pub fn stream_images(
        &self,
        request: StreamImagesRequest,
    ) -> Result<BoxStream<'static, std::result::Result<StreamImagesResponse, Status>>> {
        let images = self.list_images(&ListImagesRequest { filter: request.filter })?;
        Ok(chunks(stream::iter(images), |images| StreamImagesResponse { images }))
    }
}
