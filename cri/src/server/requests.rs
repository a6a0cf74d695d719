//! One line for each request, with its method, duration and result.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tonic::body::Body;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span};

/// Requests that this process has received, which also numbers them.
static RECEIVED: AtomicU64 = AtomicU64::new(0);

/// How many requests have been received so far.
pub fn received() -> u64 {
    RECEIVED.load(Ordering::Relaxed)
}

/// Gives each request a number, which is part of every line logged on its behalf, and logs how it ended: at `debug`,
/// or at `warn` where hull itself is at fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestLog;

impl<S> Layer<S> for RequestLog {
    type Service = LoggedRequests<S>;

    fn layer(&self, inner: S) -> Self::Service {
        LoggedRequests { inner }
    }
}

/// See [`RequestLog`].
#[derive(Clone, Debug)]
pub struct LoggedRequests<S> {
    inner: S,
}

type ResponseFuture<E> = Pin<Box<dyn Future<Output = Result<http::Response<LoggedBody>, E>> + Send>>;

impl<S, B> Service<http::Request<B>> for LoggedRequests<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<LoggedBody>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let record = Record::new(&request);
        let span = record.span.clone();
        let response = self.inner.call(request);
        let logged = async move {
            let mut record = record;
            let response = response.await?;
            // A call that fails at once has its status in the headers; all others have it in the trailers.
            if let Some(status) = Status::from_header_map(response.headers()) {
                record.finish(&status);
            }
            Ok(response.map(|body| LoggedBody { body, record }))
        };
        Box::pin(logged.instrument(span))
    }
}

/// A response whose end is logged.
#[derive(Debug)]
pub struct LoggedBody {
    body: Body,
    record: Record,
}

impl HttpBody for LoggedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let span = self.record.span.clone();
        let _entered = span.enter();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let trailers = match &frame {
            Some(Ok(frame)) => frame.trailers_ref(),
            _ => None,
        };
        if let Some(status) = trailers.and_then(Status::from_header_map) {
            self.record.finish(&status);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What will be logged of a request.
#[derive(Debug)]
struct Record {
    span: Span,
    client: Option<i32>,
    started: Instant,
    finished: bool,
}

impl Record {
    fn new<B>(request: &http::Request<B>) -> Self {
        let number = RECEIVED.fetch_add(1, Ordering::Relaxed) + 1;
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let credentials = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        // At the level of errors so that every line has it, whatever is logged.
        let span = tracing::error_span!("request", number, method);
        Record {
            span,
            client: credentials.and_then(|credentials| credentials.pid()),
            started: Instant::now(),
            finished: false,
        }
    }

    fn finish(&mut self, status: &Status) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let (code, message) = (status.code(), status.message());
        let (duration, client) = (self.started.elapsed(), self.client);
        let _entered = self.span.enter();
        match code {
            Code::Ok => tracing::debug!(?duration, client, ?code, "answered"),
            Code::Internal | Code::DataLoss => {
                tracing::warn!(?duration, client, ?code, message, "failed");
            }
            _ => tracing::debug!(?duration, client, ?code, message, "refused"),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            let _entered = self.span.enter();
            tracing::debug!(duration = ?self.started.elapsed(), client = self.client, "given up by the client");
        }
    }
}
