//! The HTTP server: a URL with a token, an upgrade, and the session.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::event::{PollFd, PollFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::command::Client;
use super::command::Wanted;
use super::protocol::{
    COMMAND_OVER_SPDY, COMMAND_OVER_WEBSOCKET, PORT_FORWARD_OVER_SPDY, PORT_FORWARD_OVER_WEBSOCKET, Version,
    choose,
};
use super::session::Session;
use super::tls::{Identity, Tls, TlsError};
use super::token::{TokenError, Tokens};
use super::waiting::{Place, Taken, Waiting};
use super::websocket;

/// How long a client may take to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Most sessions at a time.
const MAX_SESSIONS: usize = 4096;
/// Most connections that have not begun one; with one more, the oldest of them ends.
const MAX_WAITING: usize = 1024;
/// How often a connection is looked at whose bytes nobody reads at the moment.
const LOOK: Duration = Duration::from_secs(1);
/// Pause when a connection cannot be taken for want of descriptors.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(50);

const UPGRADE_SPDY: &str = "SPDY/3.1";
const UPGRADE_WEBSOCKET: &str = "websocket";
const PROTOCOL: &str = "x-stream-protocol-version";
const ACCEPTED: &str = "x-accepted-stream-protocol-versions";

/// Why there is no streaming server.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    /// Its address cannot be had.
    #[error("cannot listen for streams on {address}: {source}")]
    Listen {
        /// Which one.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Its certificate cannot be used.
    #[error("cannot serve streams over TLS: {0}")]
    Tls(#[from] TlsError),
}

/// A server that listens.
#[derive(Debug)]
pub struct Streaming {
    address: SocketAddr,
    /// None: plain HTTP.
    tls: Option<Arc<Tls>>,
    tokens: Tokens<Session>,
    waiting: Arc<Waiting>,
    sessions: Arc<Semaphore>,
    closing: CancellationToken,
}

impl Streaming {
    /// Listens on `address` (port 0: any free one) until the token is cancelled; then every session ends too. Must be
    /// called inside the runtime.
    pub async fn open(
        address: SocketAddr,
        tls: Option<Tls>,
        closing: CancellationToken,
    ) -> Result<Arc<Self>, StreamingError> {
        let failed = |source| StreamingError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::debug!(%address, tls = tls.is_some(), "listening for streams");
        if tls.is_none() && !address.ip().is_loopback() {
            tracing::warn!(%address, "streams of exec, attach and port-forward cross the network without TLS");
        }
        let tls = tls.map(Arc::new);
        let streaming = Arc::new(Self {
            address,
            tls,
            tokens: Tokens::default(),
            waiting: Waiting::new(MAX_WAITING),
            sessions: Arc::new(Semaphore::new(MAX_SESSIONS)),
            closing,
        });
        tokio::spawn(Arc::clone(&streaming).accept(listener));
        Ok(streaming)
    }

    /// The URL of a session; it works once, for a minute.
    pub fn url(&self, session: Session) -> Result<String, TokenError> {
        let path = session.path();
        let token = self.tokens.put(session)?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}/{path}/{token}", self.address))
    }

    /// The certificate (DER) that it shows now, for clients that are to trust no other; empty without TLS.
    pub async fn certificate(&self) -> Vec<u8> {
        match self.identity().await {
            Some(identity) => identity.certificate.to_vec(),
            None => Vec::new(),
        }
    }

    /// What it shows now; None: plain HTTP.
    async fn identity(&self) -> Option<Identity> {
        let tls = Arc::clone(self.tls.as_ref()?);
        tokio::task::spawn_blocking(move || tls.identity()).await.ok()
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let everything = async {
            loop {
                match listener.accept().await {
                    Ok((socket, _)) => {
                        let place = self.waiting.enter();
                        let taken = place.taken.clone();
                        let streaming = Arc::clone(&self);
                        tokio::spawn(async move {
                            tokio::select! {
                                () = streaming.connection(socket, place) => {}
                                () = taken.cancelled() => {}
                                () = streaming.closing.cancelled() => {}
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot take a connection for streams");
                        tokio::time::sleep(OUT_OF_DESCRIPTORS).await;
                    }
                }
            }
        };
        tokio::select! {
            () = everything => {}
            () = self.closing.cancelled() => {}
        }
    }

    /// One connection: its requests, and the session that one of them begins.
    async fn connection(self: &Arc<Self>, socket: TcpStream, place: Place) {
        // A client whose machine has vanished is noticed some day.
        let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
        let _ = socket.set_nodelay(true);
        let Ok(watched) = rustix::io::fcntl_dupfd_cloexec(&socket, 3) else { return };
        if self.tls.is_none() {
            return self.requests(socket, &watched, place).await;
        }
        let Some(identity) = self.identity().await else { return };
        match tokio::time::timeout(REQUEST_TIME, identity.acceptor.accept(socket)).await {
            Ok(Ok(secured)) => self.requests(secured, &watched, place).await,
            Ok(Err(error)) => tracing::debug!(%error, "a client for streams does not come to terms over TLS"),
            Err(_) => tracing::debug!("a client for streams takes too long to come to terms over TLS"),
        }
    }

    /// The same, once it is clear how bytes pass.
    async fn requests(
        self: &Arc<Self>,
        transport: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        watched: &OwnedFd,
        place: Place,
    ) {
        let (sender, mut begun) = tokio::sync::mpsc::channel::<Begun>(1);
        let service = service_fn(|request| {
            let answer = self.answer(request, &sender, &place);
            async move { Ok::<_, Infallible>(answer) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_TIME)
            .max_headers(64)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(transport), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection for streams ends");
        }
        let Ok(Begun { session, agreed, upgrade, room: _room }) = begun.try_recv() else { return };
        match upgrade.await {
            Ok(upgraded) => {
                tokio::select! {
                    () = serve(session, agreed, TokioIo::new(upgraded)) => {}
                    () = hung_up(watched) => {}
                }
            }
            Err(error) => tracing::debug!(%error, "a connection for streams was not upgraded"),
        }
    }

    fn answer(
        &self,
        mut request: Request<Incoming>,
        begun: &tokio::sync::mpsc::Sender<Begun>,
        place: &Place,
    ) -> Response<Full<Bytes>> {
        // Before its URL is used up: the client may come again with it.
        let Ok(room) = Arc::clone(&self.sessions).try_acquire_owned() else {
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "there are too many streams at the moment");
        };
        let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (path, token) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let session = match place.show(|| self.tokens.take(token, |session| session.path() == path)) {
            Ok(Some(session)) => session,
            Ok(None) => {
                let text = "there is no such stream: a URL works once, for a minute";
                return refusal(StatusCode::NOT_FOUND, text);
            }
            // It is about to be closed, and says so where it still can.
            Err(Taken) => {
                let text = "there are too many connections at the moment";
                return refusal(StatusCode::SERVICE_UNAVAILABLE, text);
            }
        };
        match agree(&session, request.headers()) {
            Ok(agreed) => {
                let response = agreed.response(request.headers());
                let upgrade = hyper::upgrade::on(&mut request);
                match begun.try_send(Begun { session, agreed, upgrade, room }) {
                    Ok(()) => response,
                    Err(_) => refusal(StatusCode::BAD_REQUEST, "the connection has a stream already"),
                }
            }
            Err(response) => *response,
        }
    }
}

/// A session whose connection is about to be upgraded.
struct Begun {
    session: Session,
    agreed: Agreed,
    upgrade: OnUpgrade,
    /// Its place among the sessions.
    room: OwnedSemaphorePermit,
}

/// What both sides speak from here on.
#[derive(Clone, Copy, Debug)]
enum Agreed {
    CommandOverSpdy(&'static str, Version),
    PortForwardOverSpdy(&'static str),
    CommandOverWebSocket(&'static str, Version),
    PortForwardOverWebSocket(&'static str),
}

impl Agreed {
    fn response(self, request: &HeaderMap) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        match self {
            Self::CommandOverSpdy(name, _) | Self::PortForwardOverSpdy(name) => {
                headers.insert(header::UPGRADE, HeaderValue::from_static(UPGRADE_SPDY));
                headers.insert(PROTOCOL, HeaderValue::from_static(name));
            }
            Self::CommandOverWebSocket(name, _) | Self::PortForwardOverWebSocket(name) => {
                headers.insert(header::UPGRADE, HeaderValue::from_static(UPGRADE_WEBSOCKET));
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
                let key = request.get(header::SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok());
                let accept = websocket::accept_key(key.unwrap_or_default());
                if let Ok(accept) = HeaderValue::from_str(&accept) {
                    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
                }
            }
        }
        response
    }
}

fn agree(session: &Session, headers: &HeaderMap) -> Result<Agreed, Box<Response<Full<Bytes>>>> {
    let says = |name: header::HeaderName, wanted: &str| {
        texts(headers, name.as_str())
            .flat_map(|value| value.split(','))
            .any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    let upgrade = says(header::CONNECTION, "upgrade");
    if upgrade && says(header::UPGRADE, UPGRADE_WEBSOCKET) {
        return agree_websocket(session, headers);
    }
    if !upgrade || !says(header::UPGRADE, UPGRADE_SPDY) {
        let text = "streams need an upgrade of the connection to SPDY/3.1 or to a WebSocket";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, text)));
    }
    let offered = || texts(headers, PROTOCOL);
    // The first clients of all named no version.
    let silent = offered().next().is_none();
    match session {
        Session::PortForward(_) => match choose(offered(), PORT_FORWARD_OVER_SPDY) {
            Some((name, ())) => Ok(Agreed::PortForwardOverSpdy(name)),
            None if silent => Ok(Agreed::PortForwardOverSpdy(PORT_FORWARD_OVER_SPDY[0].0)),
            None => Err(Box::new(unknown_protocol(PORT_FORWARD_OVER_SPDY))),
        },
        Session::Exec(_) | Session::Attach(_) => match choose(offered(), COMMAND_OVER_SPDY) {
            Some((name, version)) => Ok(Agreed::CommandOverSpdy(name, version)),
            None if silent => Ok(Agreed::CommandOverSpdy("channel.k8s.io", Version::V1)),
            None => Err(Box::new(unknown_protocol(COMMAND_OVER_SPDY))),
        },
    }
}

fn agree_websocket(session: &Session, headers: &HeaderMap) -> Result<Agreed, Box<Response<Full<Bytes>>>> {
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    if key.is_none() || headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let text = "a WebSocket needs Sec-WebSocket-Key and Sec-WebSocket-Version: 13";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, text)));
    }
    let offered = texts(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
    match session {
        Session::PortForward(_) => match choose(offered, PORT_FORWARD_OVER_WEBSOCKET) {
            Some((name, ())) => Ok(Agreed::PortForwardOverWebSocket(name)),
            None => Err(Box::new(unknown_protocol(PORT_FORWARD_OVER_WEBSOCKET))),
        },
        Session::Exec(_) | Session::Attach(_) => match choose(offered, COMMAND_OVER_WEBSOCKET) {
            Some((name, version)) => Ok(Agreed::CommandOverWebSocket(name, version)),
            None => Err(Box::new(unknown_protocol(COMMAND_OVER_WEBSOCKET))),
        },
    }
}

fn texts<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
}

fn refusal(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn unknown_protocol<V>(known: &'static [(&'static str, V)]) -> Response<Full<Bytes>> {
    let mut response = refusal(StatusCode::FORBIDDEN, "none of the offered stream protocols is known");
    for (name, _) in known {
        response.headers_mut().append(ACCEPTED, HeaderValue::from_static(name));
    }
    response
}

async fn serve(session: Session, agreed: Agreed, transport: TokioIo<hyper::upgrade::Upgraded>) {
    match (session, agreed) {
        (Session::PortForward(session), Agreed::PortForwardOverWebSocket(_)) => {
            session.serve(websocket::tunnel(transport, websocket::Role::Server)).await;
        }
        (Session::PortForward(session), _) => session.serve(transport).await,
        (Session::Exec(session), agreed) => {
            if let Some(client) = client(session.wanted, agreed, transport).await {
                session.serve(client).await;
            }
        }
        (Session::Attach(session), agreed) => {
            if let Some(client) = client(session.wanted, agreed, transport).await {
                session.serve(client).await;
            }
        }
    }
}

async fn client(
    wanted: Wanted,
    agreed: Agreed,
    transport: TokioIo<hyper::upgrade::Upgraded>,
) -> Option<Client> {
    match agreed {
        Agreed::CommandOverSpdy(_, version) => Client::over_spdy(transport, wanted, version).await,
        Agreed::CommandOverWebSocket(_, version) => {
            Some(Client::over_websocket(transport, wanted, version).await)
        }
        // Agreed upon for another kind of session only.
        Agreed::PortForwardOverSpdy(_) | Agreed::PortForwardOverWebSocket(_) => None,
    }
}

/// Waits until the client has closed its side, also while nobody reads what it sent before: a command that does not
/// read its input must not outlive its client.
async fn hung_up(socket: &OwnedFd) {
    loop {
        tokio::time::sleep(LOOK).await;
        let mut look = [PollFd::new(socket, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::event::poll(&mut look, Some(&now)).is_ok_and(|ready| ready > 0) {
            // What it sent last is on its way through.
            tokio::time::sleep(LOOK).await;
            return;
        }
    }
}
