//! hull.v1 PushImage: an image to a registry.

use std::sync::Arc;

use futures::Stream;
use hull_images::store::{PushError, PushOptions, PushProgress as Step};
use tokio::sync::mpsc;
use tonic::Status;

use super::check::received;
use super::pull_image::wanted;
use super::tag::tag;
use crate::api::hull::push_progress::{Event, Sent};
use crate::api::hull::{PushImageRequest, PushProgress};
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// Begins the push; it ends with the stream.
    pub fn push_image(
        &self,
        request: PushImageRequest,
    ) -> Result<impl Stream<Item = std::result::Result<PushProgress, Status>> + Send + use<>> {
        let target = if request.target.is_empty() { &request.image } else { &request.target };
        let reference = tag(target)?;
        let (_, credentials) = wanted(target, request.auth)?;
        let (_, source_credentials) = wanted(target, request.source_auth)?;
        let options = PushOptions { credentials, exact: request.exact, source_credentials };
        let images = Arc::clone(self.images());
        let (sender, receiver) = mpsc::channel(64);
        let gone = sender.clone();
        let push = async move {
            let tell = |step| {
                let event = match step {
                    Step::Exists(layer) => Event::Exists(layer.to_string()),
                    Step::Sent(layer, bytes) => Event::Sent(Sent { layer: layer.to_string(), bytes }),
                    Step::Done(layer) => Event::LayerDone(layer.to_string()),
                };
                // Whoever reads too slowly misses a step of progress, nothing else.
                let _ = sender.try_send(Ok(PushProgress { event: Some(event) }));
            };
            let pushed = images.push(&request.image, &reference, options, tell).await;
            let last = match pushed {
                Ok(pushed) => {
                    tracing::info!(image = %reference, digest = %pushed.digest, "pushed");
                    if let Some(digest) = pushed.came_with {
                        let event = Some(Event::CameWith(digest.to_string()));
                        let _ = sender.send(Ok(PushProgress { event })).await;
                    }
                    Ok(PushProgress { event: Some(Event::Done(pushed.digest.to_string())) })
                }
                Err(error) => Err(push_error(error).into()),
            };
            let _ = sender.send(last).await;
        };
        tokio::spawn(async move {
            tokio::select! {
                () = push => {}
                // Nobody waits for it any more.
                () = gone.closed() => {}
            }
        });
        Ok(received(receiver))
    }
}

fn push_error(error: PushError) -> Error {
    match error {
        PushError::NoImage(name) => Error::NotFound { what: "image", id: name },
        PushError::Store(error) => Error::Images(error),
        PushError::Layer { .. } | PushError::NotExact { .. } => Error::FailedPrecondition(error.to_string()),
        PushError::Registry { image, source } => {
            Error::Pull(hull_images::PullError::Registry { image, source })
        }
    }
}
