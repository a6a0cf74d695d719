//! hull.v1 CheckImages: every layer against its digest.

use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use tokio::sync::mpsc;
use tonic::Status;

use crate::api::hull::check_images_progress::{Done, Event, Problem};
use crate::api::hull::{CheckImagesProgress, CheckImagesRequest};
use crate::runtime::{Error, Runtime};

impl Runtime {
    /// Begins the check; it ends with the stream.
    pub fn check_images(
        &self,
        request: CheckImagesRequest,
    ) -> impl Stream<Item = Result<CheckImagesProgress, Status>> + Send + use<> {
        let images = Arc::clone(self.images());
        let (sender, receiver) = mpsc::channel(8);
        tokio::task::spawn_blocking(move || {
            let tell = |event| sender.blocking_send(Ok(CheckImagesProgress { event: Some(event) }));
            let report = images.check(request.repair, |layer| tell(Event::Layer(layer.to_string())).is_ok());
            // Nobody listening any more is how a check is given up.
            let _ = match report {
                Err(error) => sender.blocking_send(Err(Error::from(error).into())),
                Ok(report) => report
                    .problems
                    .into_iter()
                    .map(|problem| {
                        Event::Problem(Problem {
                            subject: problem.subject,
                            reason: problem.reason,
                            image_ids: problem.images,
                        })
                    })
                    .chain([Event::Done(Done {
                        layers: report.layers,
                        blobs: report.blobs,
                        bytes: report.bytes,
                        unverifiable: report.unverifiable.iter().map(ToString::to_string).collect(),
                    })])
                    .try_for_each(tell),
            };
        });
        received(receiver)
    }
}

/// What a thread sends, as a stream.
pub(super) fn received<T: Send + 'static>(
    receiver: mpsc::Receiver<Result<T, Status>>,
) -> impl Stream<Item = Result<T, Status>> + Send + use<T> {
    unfold(receiver, |mut receiver| async move { receiver.recv().await.map(|item| (item, receiver)) })
}
