//! hull.v1 TagImage and UntagImage: names of images that are here.

use std::sync::Arc;

use hull_images::Reference;

use crate::api::hull::{TagImageReply, TagImageRequest, UntagImageReply, UntagImageRequest};
use crate::runtime::{Error, Result, Runtime, blocking};

impl Runtime {
    /// One more name for an image.
    pub async fn tag_image(&self, request: TagImageRequest) -> Result<TagImageReply> {
        let name = tag(&request.name)?;
        let images = Arc::clone(self.images());
        let image = request.image;
        let found = {
            let image = image.clone();
            blocking(move || images.tag(&image, &name)).await??
        };
        let image_id = found.ok_or(Error::NotFound { what: "image", id: image })?;
        Ok(TagImageReply { image_id })
    }

    /// One name less.
    pub async fn untag_image(&self, request: UntagImageRequest) -> Result<UntagImageReply> {
        let name = reference(&request.name)?;
        let images = Arc::clone(self.images());
        let removed = blocking(move || images.remove_name(&name)).await??;
        Ok(UntagImageReply { removed })
    }
}

fn reference(name: &str) -> Result<Reference> {
    name.parse().map_err(|error: hull_images::ReferenceError| Error::Invalid(error.to_string()))
}

/// A name that can be chosen.
pub(super) fn tag(name: &str) -> Result<Reference> {
    let reference = reference(name)?;
    match reference.digest() {
        Some(_) => Err(Error::Invalid(format!("{name} has a digest, which cannot be chosen: give it a tag"))),
        None => Ok(reference),
    }
}
