//! The connection to the daemon.

use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::error::CliError;
use crate::api::hull::InfoRequest;
use crate::api::hull::hull_client::HullClient;
use crate::api::runtime::image_service_client::ImageServiceClient;
use crate::api::runtime::runtime_service_client::RuntimeServiceClient;
use crate::streaming::dial::Place;

/// Largest answer: both streams of ExecSync at their limit of 16 MiB, and room for the rest.
const MAX_ANSWER: usize = 40 << 20;
/// How long most calls may take. RunPodSandbox with CNI plugins is the slowest of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// All services of one daemon. Clones share the connection.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) runtime: RuntimeServiceClient<Channel>,
    pub(super) image: ImageServiceClient<Channel>,
    pub(super) hull: HullClient<Channel>,
    timeout: Option<Duration>,
}

impl Client {
    /// Connects to the socket at `path`; `timeout` bounds each call.
    pub(super) async fn connect(path: &Path, timeout: Option<Duration>) -> Result<Self, CliError> {
        let failed = |source| CliError::Connect { path: path.into(), source };
        // Connected to here rather than by tonic, for an error that can be explained.
        let mut first = Some(UnixStream::connect(path).await.map_err(failed)?);
        let path = path.to_owned();
        let connector = tower::service_fn(move |_| {
            let (first, path) = (first.take(), path.clone());
            async move {
                let stream = match first {
                    Some(stream) => stream,
                    None => UnixStream::connect(path).await?,
                };
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        // The address only names the authority; the connector knows where to go.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        Ok(Client {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER),
            image: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER),
            hull: HullClient::new(channel).max_decoding_message_size(MAX_ANSWER),
            timeout,
        })
    }

    /// Where the stream at `url` is, and by which certificate it is known. hulld's socket says so, which only root and
    /// those whom root lets in can use: no authority need be trusted.
    pub(super) async fn place(&mut self, url: String) -> Result<Place, CliError> {
        if !url.starts_with("https://") {
            return Ok(Place { url, certificate: Vec::new() });
        }
        let patience = self.patience();
        let info =
            answer("ask for the certificate of streams", patience, self.hull.info(InfoRequest {})).await?;
        Ok(Place { url, certificate: info.streaming_certificate })
    }

    /// How long one call may take.
    pub(super) fn patience(&self) -> Option<Duration> {
        Some(self.timeout.unwrap_or(PATIENCE))
    }

    /// How long a call may take whose work has no usual duration.
    pub(super) fn endless(&self) -> Option<Duration> {
        self.timeout
    }
}

/// Awaits a call for at most `patience`; `doing` completes the sentence "cannot …".
pub(super) async fn answer<T>(
    doing: impl Into<String>,
    patience: Option<Duration>,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CliError> {
    let result = match patience {
        Some(after) => match tokio::time::timeout(after, call).await {
            Ok(result) => result,
            Err(_) => return Err(CliError::Timeout { doing: doing.into(), after }),
        },
        None => call.await,
    };
    result
        .map(Response::into_inner)
        .map_err(|status| CliError::Call { doing: doing.into(), status: Box::new(status) })
}
