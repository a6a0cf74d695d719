//! ImageStatus.

use std::collections::BTreeMap;

use hull_images::Image;
use serde_json::{Value, json};

use super::list_images::shown;
use crate::api::runtime::{ImageStatusRequest, ImageStatusResponse};
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// Everything about one image; an image that is not there is an answer without one, as CRI asks.
    pub fn image_status(&self, request: &ImageStatusRequest) -> Result<ImageStatusResponse> {
        let name = request.image.as_ref().map_or("", |spec| spec.image.as_str());
        if name.is_empty() {
            return Err(Error::Invalid("the request names no image".into()));
        }
        let found = self.images().find(name)?;
        let info = match &found {
            Some(image) if request.verbose => verbose(image),
            _ => BTreeMap::new(),
        };
        Ok(ImageStatusResponse { image: found.as_ref().map(shown), info })
    }
}

fn verbose(image: &Image) -> BTreeMap<String, String> {
    let spec: Value = serde_json::from_slice(&image.config.raw).unwrap_or_default();
    let info = json!({
        "layers": image.layers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "pulledAt": image.pulled_at,
        "imageSpec": spec,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}
