//! RemoveImage.

use std::sync::Arc;

use crate::api::runtime::RemoveImageRequest;
use crate::runtime::{Error, Result, Runtime, blocking};

impl Runtime {
    /// Removes an image with all its names. That it is gone already is no error; containers keep the layers they use.
    pub async fn remove_image(&self, request: RemoveImageRequest) -> Result<()> {
        let name = request.image.map(|spec| spec.image).unwrap_or_default();
        if name.is_empty() {
            return Err(Error::Invalid("the request names no image".into()));
        }
        let images = Arc::clone(self.images());
        let removed = blocking(move || images.remove(&name)).await??;
        tracing::info!(?removed, "removed an image");
        Ok(())
    }
}
