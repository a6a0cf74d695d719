//! How the layers of an image lie on each other.

use std::collections::BTreeMap;

use crate::layer::{ImageReader, LayerId, Overlaid, StackLayer, overlaid};

use super::ImageStore;
use super::error::StoreError;
use super::files::failed;
use super::index::{Change, LayerRecord};

/// Those of an image's layers that a container mounts: overlayfs ignores an opaque mark on a layer's root, so what is
/// below the uppermost layer with one is left out.
pub(super) fn mounted(layers: &[LayerId], is_opaque: impl Fn(&LayerId) -> bool) -> &[LayerId] {
    &layers[layers.iter().rposition(is_opaque).unwrap_or(0)..]
}

impl ImageStore {
    /// Finds out what containers of the images in `change` need in their writable directories. All layer files have
    /// their final names by now. Reads a few blocks of them, and nothing at all for images whose layers name all
    /// directories.
    pub(super) fn add_upper_directories(&self, change: &mut Change) -> Result<(), StoreError> {
        let put: BTreeMap<&LayerId, LayerRecord> =
            change.put_layers.iter().map(|(layer, record)| (layer, *record)).collect();
        for (id, image) in &mut change.put_images {
            let (layers, implying): (Vec<LayerId>, Vec<bool>) = {
                let catalogue = self.read();
                let record = |id: &LayerId| put.get(id).or_else(|| catalogue.layers.get(id)).copied();
                let is_opaque = |id: &LayerId| record(id).is_some_and(|record| record.opaque_root);
                let implies = |id: &LayerId| record(id).is_some_and(|record| record.implied > 0);
                mounted(&image.layers, is_opaque).iter().map(|id| (id.clone(), implies(id))).unzip()
            };
            if !implying.iter().skip(1).any(|implies| *implies) {
                continue;
            }
            let mut stack = Vec::with_capacity(layers.len());
            for (layer, implies) in layers.iter().zip(implying) {
                let path = self.files.layer(layer);
                let file = ImageReader::open(&path).map_err(failed("read", &path))?;
                let implied = match change.put_implied.iter().find(|(fresh, _)| fresh == layer) {
                    Some((_, implied)) => implied.clone(),
                    None if implies => self.index.implied(layer)?,
                    None => Vec::new(),
                };
                stack.push(StackLayer { image: file, implied });
            }
            let path = self.files.layers();
            let Overlaid { directories, hidden_links } =
                overlaid(&stack).map_err(failed("read the layers in", path))?;
            if !hidden_links.is_empty() {
                let paths: Vec<_> = hidden_links.iter().map(|path| String::from_utf8_lossy(path)).collect();
                tracing::warn!(
                    image = %id,
                    ?paths,
                    "a layer has files in directories that it does not name, where layers below have symbolic links: \
                     the directories hide the links"
                );
            }
            image.upper_directories = directories;
        }
        Ok(())
    }
}
