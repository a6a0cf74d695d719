use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use hull_archive::{ArchiveError, Options, write_tree};
use hull_images::LayerId;
use tonic::Status;

use super::Upper;
use super::merged::with_merged;
use crate::api::hull::{Chunk, ContainerRequest};
use crate::image::files::chunks;
use crate::runtime::objects::Container;
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// All files of a container, as it sees them, without those of its volumes.
    pub fn export_container(
        self: &Arc<Self>,
        request: &ContainerRequest,
    ) -> Result<BoxStream<'static, std::result::Result<Chunk, Status>>> {
        let (container, place) = self.files_of(&request.container)?;
        let runtime = Arc::clone(self);
        let stream = chunks(move |out: &mut (dyn Write + Send)| {
            let mut trees = runtime.layers_of(&container)?;
            // A container that never ran has changed nothing.
            let upper = match runtime.upper(&container, &place)? {
                Some(Upper::Mount(mount)) => {
                    trees.push(mount);
                    None
                }
                Some(Upper::Directory(upper)) => Some(upper),
                None => None,
            };
            let written = with_merged(&trees, upper.as_deref(), &runtime.config().state, |root| {
                write_tree(root.as_fd(), out, &Options::default())
            });
            match written.map_err(|error| apart(&container, &error))? {
                Ok(_) => Ok(()),
                Err(error @ ArchiveError::Output(_)) => Err(Error::Unavailable(error.to_string())),
                Err(error) => Err(Error::Internal(error.to_string())),
            }
        });
        Ok(stream.boxed())
    }

    /// Clones of the trees of the container's layers, lowest first. Blocking.
    pub(super) fn layers_of(&self, container: &Container) -> Result<Vec<std::os::fd::OwnedFd>> {
        let image = container.with_record(|record| record.image.clone()).unwrap_or_default();
        let layers: Vec<LayerId> = image.layers.iter().filter_map(|layer| layer.parse().ok()).collect();
        let trees = self.images().layer_trees(&layers);
        trees.map_err(|error| {
            Error::Internal(format!("cannot mount the layers of {}: {error}", container.id()))
        })
    }
}

/// The layers cannot be put together.
pub(super) fn apart(container: &Container, error: &std::io::Error) -> Error {
    Error::Internal(format!("cannot put the files of {} together: {error}", container.id()))
}
