//! hull.v1 Pull: a pull that tells of its progress.

use std::sync::Arc;

use futures::Stream;
use hull_images::{Image, PullProgress as Step};
use tokio::sync::mpsc;
use tonic::Status;

use super::pull_image::wanted;
use crate::api::hull::PullProgress;
use crate::api::hull::PullRequest;
use crate::api::hull::pull_progress::{Done, Downloaded, Event, Layer, LayerDone, LayerExists, Resolved};
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// Pulls an image; the stream ends with `done` or a failure. Dropping it gives up the pull.
    pub fn pull_with_progress(
        &self,
        request: PullRequest,
    ) -> Result<impl Stream<Item = std::result::Result<PullProgress, Status>> + Send + use<>> {
        let (reference, credentials) = wanted(&request.image, request.auth)?;
        self.accept_for_pull(&reference)?;
        let images = Arc::clone(self.images());
        let (sender, steps) = mpsc::unbounded_channel();
        let pull = async move { images.pull(&reference, credentials, Some(sender)).await };
        let state = Some((Box::pin(pull), steps));
        Ok(futures::stream::unfold(state, |state| async move {
            let (mut pull, mut steps) = state?;
            let result = tokio::select! {
                biased;
                Some(step) = steps.recv() => return Some((Ok(message(step)), Some((pull, steps)))),
                result = &mut pull => result,
            };
            // The last steps may have come together with the end; `done` says it all.
            Some((result.map(|image| done(&image)).map_err(|error| Error::from(error).into()), None))
        }))
    }
}

fn event(event: Event) -> PullProgress {
    PullProgress { event: Some(event) }
}

fn message(step: Step) -> PullProgress {
    event(match step {
        Step::Resolved { digest, layers } => Event::Resolved(Resolved {
            digest: digest.to_string(),
            layers: layers
                .into_iter()
                .map(|(digest, size)| Layer { digest: digest.to_string(), size })
                .collect(),
        }),
        Step::Downloaded { layer, bytes } => {
            Event::Downloaded(Downloaded { layer: layer.to_string(), bytes })
        }
        Step::LayerDone { layer } => Event::LayerDone(LayerDone { layer: layer.to_string() }),
        Step::LayerExists { layer } => Event::LayerExists(LayerExists { layer: layer.to_string() }),
    })
}

fn done(image: &Image) -> PullProgress {
    event(Event::Done(Done {
        image_id: image.id.clone(),
        repo_digest: image.repo_digests.first().cloned().unwrap_or_default(),
        size: image.size,
    }))
}
