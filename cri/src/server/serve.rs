//! gRPC on a unix listener.

use std::io;
use std::time::Duration;

use futures::Stream;
use tokio::net::UnixListener;
use tonic::transport::Server;

use super::authority::AuthorityShim;
use super::requests::RequestLog;
use crate::api::MAX_MESSAGE;
use crate::api::hull::hull_server::{Hull, HullServer};
use crate::api::runtime::image_service_server::{ImageService, ImageServiceServer};
use crate::api::runtime::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use crate::local_stream::LocalStream;

/// Pause after a connection could not be accepted, usually for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers on `listener` until `stop` is done and the requests under way have ended.
///
/// Messages up to [`MAX_MESSAGE`] are accepted. Answers are not bounded here: one that its client finds too large fails
/// there all the same, and ExecSync's two streams of 16 MiB are hull's own client's to read.
pub async fn serve<S>(
    server: S,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error>
where
    S: RuntimeService + ImageService + Hull + Clone,
{
    Server::builder()
        .layer(RequestLog)
        .add_service(RuntimeServiceServer::new(server.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(ImageServiceServer::new(server.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(HullServer::new(server).max_decoding_message_size(MAX_MESSAGE))
        .serve_with_incoming_shutdown(connections(listener), stop)
        .await
}

fn connections(listener: UnixListener) -> impl Stream<Item = io::Result<AuthorityShim<LocalStream>>> {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            let accepted = listener.accept().await;
            match accepted.and_then(|(stream, _)| LocalStream::accepted(stream)) {
                Ok(stream) => return Some((Ok(AuthorityShim::new(stream)), listener)),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests;
