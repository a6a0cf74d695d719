use std::os::fd::AsFd;
use std::sync::Arc;

use futures::Stream;
use hull_archive::list_upper;
use tokio::sync::mpsc;
use tonic::Status;

use super::export::apart;
use super::merged::{exists, with_merged};
use crate::api::hull::difference::Kind;
use crate::api::hull::{ContainerRequest, Difference};
use crate::image::check::received;
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// What a container has added to its image, changed and deleted.
    pub fn diff_container(
        self: &Arc<Self>,
        request: &ContainerRequest,
    ) -> Result<impl Stream<Item = std::result::Result<Difference, Status>> + Send + use<>> {
        let (container, place) = self.files_of(&request.container)?;
        let runtime = Arc::clone(self);
        let (sender, receiver) = mpsc::channel(64);
        tokio::task::spawn_blocking(move || {
            let compare = || -> Result<()> {
                // A container that never ran has changed nothing.
                let Some(upper) = runtime.upper(&container, &place)? else { return Ok(()) };
                let upper = upper.root().map_err(|error| apart(&container, &error))?;
                let trees = runtime.layers_of(&container)?;
                let listed = with_merged(&trees, None, &runtime.config().state, |image| {
                    list_upper(upper.as_fd(), |name| {
                        let kind = match name.is_whiteout {
                            true => Kind::Deleted,
                            false if exists(image, &name.path) => Kind::Changed,
                            false => Kind::Added,
                        };
                        let path = [b"/", name.path.as_slice()].concat();
                        sender.blocking_send(Ok(Difference { kind: kind.into(), path })).is_ok()
                    })
                });
                let listed = listed.map_err(|error| apart(&container, &error))?;
                listed.map_err(|error| Error::Internal(error.to_string()))
            };
            if let Err(error) = compare() {
                // Whoever asked may be gone.
                let _ = sender.blocking_send(Err(error.into()));
            }
        });
        Ok(received(receiver))
    }
}
