//! ListImages.

use hull_images::Image;

use crate::api::runtime::{self as cri, ImageSpec, Int64Value, ListImagesRequest};
use crate::runtime::translate::user::image_user;
use crate::runtime::{Result, Runtime};

impl Runtime {
    /// All images, or the one that the filter names.
    pub fn list_images(&self, request: &ListImagesRequest) -> Result<Vec<cri::Image>> {
        let filter = request.filter.as_ref().and_then(|filter| filter.image.as_ref());
        match filter.map(|spec| spec.image.as_str()).filter(|name| !name.is_empty()) {
            Some(name) => Ok(self.images().find(name)?.iter().map(shown).collect()),
            None => Ok(self.images().list()?.iter().map(shown).collect()),
        }
    }
}

/// An image as CRI shows it.
pub(super) fn shown(image: &Image) -> cri::Image {
    let (uid, username) = image_user(&image.config.user);
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| Int64Value { value }),
        username,
        spec: Some(ImageSpec { image: image.id.clone(), ..Default::default() }),
        pinned: image.pinned,
    }
}
