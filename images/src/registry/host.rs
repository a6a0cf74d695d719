//! Requests to one host: authentication, redirects, retries.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Mutex as AsyncMutex;
use url::Url;

use super::authorization;
use super::challenge;
use super::credentials::Credentials;
use super::error::RegistryError;
use super::hosts::{HostConfig, is_loopback};
use super::pace::Pace;
use super::text::{error_detail, reasons};

/// Attempts at one request when the host is overloaded or the connection breaks.
const MAX_ATTEMPTS: u32 = 5;
/// Attempts when no connection can be made.
const MAX_CONNECT_ATTEMPTS: u32 = 3;
/// Wait before the second attempt; doubles each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait, also when the host asks for more.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Bytes a second that content is sent with at the least; a line that is slower is given up.
const MIN_UPLOAD_RATE: u64 = 16 << 10;
/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;
/// How long connecting may take where nothing is configured.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one HTTP/2 stream under way; the protocol's default of 64 KiB is slow over distance.
const STREAM_WINDOW: u32 = 2 << 20;
/// Bytes of all streams of one connection under way.
const CONNECTION_WINDOW: u32 = 8 << 20;

/// One host of a registry, for the duration of one pull.
pub(super) struct Host {
    config: HostConfig,
    client: reqwest::Client,
    /// Host and port, for messages.
    name: String,
    /// How long it may send nothing, or next to nothing. Zero: for ever.
    progress_timeout: Duration,
    headers: HeaderMap,
    credentials: Option<Credentials>,
    /// What is done with the repository.
    scope: String,
    /// The registry that a mirror is asked about (`ns`, containerd docs/hosts.md, "Registry Mirrors").
    namespace: Option<String>,
    /// Requests carry content, so that it may take long until an answer begins.
    uploads: bool,
    /// The header that worked last.
    authorization: Mutex<Option<HeaderValue>>,
    /// Only one request at a time asks for a token.
    authenticating: AsyncMutex<()>,
    /// No connection could be made; in this pull other hosts are preferred from then on.
    away: AtomicBool,
}

/// What to ask for.
#[derive(Clone)]
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    /// Path below the API's base, without leading slash.
    pub(super) path: &'a str,
    pub(super) accept: Option<&'static str>,
    /// First byte wanted, and the one after the last if not all of the rest is wanted; None: everything.
    pub(super) range: Option<(u64, Option<u64>)>,
    /// What it is, for messages.
    pub(super) what: &'a str,
    /// What is sent, and where to if not to `path`.
    pub(super) upload: Option<Upload<'a>>,
}

/// What a request carries to the registry.
#[derive(Clone)]
pub(super) struct Upload<'a> {
    /// An address that the registry gave; None: the request's path.
    pub(super) to: Option<&'a Url>,
    /// Parameters beyond those of the address.
    pub(super) query: &'a [(&'a str, &'a str)],
    pub(super) content_type: &'a str,
    pub(super) bytes: Bytes,
    /// Where the bytes begin in the whole; None: they are the whole.
    pub(super) range: Option<u64>,
}

/// Why one attempt failed, and whether another may help.
struct Failure {
    error: RegistryError,
    attempts: u32,
    /// The host's own wish.
    wait: Option<Duration>,
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self { error, attempts: 1, wait: None }
    }
}

impl Host {
    /// Prepares the client. `domain` is the registry of the image; `scope` what is to be done there, as token services
    /// name it.
    pub(super) fn new(
        config: HostConfig,
        domain: &str,
        credentials: Option<&Credentials>,
        progress_timeout: Duration,
        scope: String,
    ) -> Result<Self, RegistryError> {
        let name = authority(&config.base);
        let uploads = authorization::is_for_push(&scope);
        // The client counts the time in which a request is sent as silence.
        let silence = Some(progress_timeout).filter(|timeout| !uploads && !timeout.is_zero());
        let client = client(&config, &name, silence)?;
        let mut headers = HeaderMap::new();
        for (key, value) in &config.headers {
            let key = HeaderName::from_bytes(key.as_bytes());
            let value = HeaderValue::from_str(value);
            let (Ok(key), Ok(mut value)) = (key, value) else {
                return Err(configuration(
                    &name,
                    "a configured header has an invalid name or value".to_owned(),
                ));
            };
            value.set_sensitive(true);
            headers.append(key, value);
        }
        // A client's credentials are for the image's registry. A mirror gets them only when they name the mirror.
        let credentials = credentials.filter(|credentials| match credentials.are_for(&name) {
            Some(named) => named || (config.is_server && credentials.are_for(domain) == Some(true)),
            None => config.is_server,
        });
        let is_mirror = !config.is_server && !crate::reference::same_registry(&name, domain);
        let token = credentials.map(|credentials| credentials.registry_token.as_str()).unwrap_or_default();
        let authorization =
            headers.remove(AUTHORIZATION).or_else(|| authorization::with_registry_token(token));
        Ok(Self {
            client,
            headers,
            credentials: credentials.cloned(),
            scope,
            namespace: is_mirror.then(|| domain.to_owned()),
            uploads,
            authorization: Mutex::new(authorization),
            authenticating: AsyncMutex::new(()),
            away: AtomicBool::new(false),
            config,
            name,
            progress_timeout,
        })
    }

    /// Host and port.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The pace that an answer of this host must keep.
    pub(super) fn pace(&self) -> Pace {
        Pace::new(self.progress_timeout)
    }

    /// Whether tags may be resolved here.
    pub(super) fn resolves(&self) -> bool {
        self.config.resolve
    }

    /// Whether content may be fetched here.
    pub(super) fn serves(&self) -> bool {
        self.config.pull
    }

    /// Whether no connection could be made.
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Asks until there is an answer of status 2xx, an error that stays, or no attempt left.
    pub(super) async fn request(&self, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let mut attempt = 1;
        loop {
            let failure = match self.authenticated(ask).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if attempt >= failure.attempts {
                return Err(failure.error);
            }
            let wait = failure.wait.unwrap_or(backoff(attempt));
            tracing::debug!(host = self.name, what = ask.what, error = %failure.error, ?wait, "trying again");
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// One attempt, with a second request when the host asks for authentication.
    async fn authenticated(&self, ask: &Ask<'_>) -> Result<Response, Failure> {
        let used = self.current_authorization();
        let response = self.redirected(ask, used.as_ref()).await?;
        // Whoever a redirect led to has not been sent what authenticates, and does not say where secrets are to go.
        if response.status() != StatusCode::UNAUTHORIZED || !same_origin(response.url(), &self.config.base) {
            return self.judge(ask, response).await;
        }
        let challenges: Vec<_> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .take(16)
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let renewed = {
            let _one = self.authenticating.lock().await;
            match self.current_authorization() {
                // Another request got a new one meanwhile.
                Some(current) if Some(&current) != used.as_ref() => current,
                _ => {
                    let secure = self.config.base.scheme() == "https";
                    let credentials = self.credentials.as_ref();
                    let answer = authorization::answer(
                        &self.client,
                        &self.name,
                        secure,
                        &self.scope,
                        credentials,
                        &challenges,
                    );
                    let answer = answer.await.map_err(|error| self.token_failure(error))?;
                    *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer.clone());
                    answer
                }
            }
        };
        let response = self.redirected(ask, Some(&renewed)).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let detail = error_detail(response).await;
            let reason = match self.credentials {
                Some(_) => format!("it does not accept the credentials for {}{detail}", ask.what),
                None => format!("it wants credentials for {}{detail}", ask.what),
            };
            return Err(RegistryError::Unauthorized { host: self.name.clone(), reason }.into());
        }
        self.judge(ask, response).await
    }

    /// A token service that is overloaded or away is worth another attempt like the registry itself.
    fn token_failure(&self, error: RegistryError) -> Failure {
        let attempts = match &error {
            RegistryError::Unreachable { .. } => MAX_CONNECT_ATTEMPTS,
            RegistryError::Status { status, .. } if is_transient(*status) => MAX_ATTEMPTS,
            _ => 1,
        };
        Failure { error, attempts, wait: None }
    }

    /// How long a request of a push may take with its answer, which is short. None: as long as something comes.
    fn patience(&self, bytes: usize) -> Option<Duration> {
        let sending = Duration::from_secs(bytes as u64 / MIN_UPLOAD_RATE);
        (self.uploads && !self.progress_timeout.is_zero())
            .then(|| self.progress_timeout.saturating_add(sending))
    }

    /// Sends the request and follows redirects. What authenticates goes to the host itself only, never to another one.
    async fn redirected(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let upload = ask.upload.as_ref();
        let mut url = upload.and_then(|upload| upload.to).cloned().unwrap_or_else(|| self.url(ask.path));
        for (key, value) in upload.map_or(&[][..], |upload| upload.query) {
            url.query_pairs_mut().append_pair(key, value);
        }
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.request(ask.method.clone(), url.clone());
            if same_origin(&url, &self.config.base) {
                request = request.headers(self.headers.clone());
                if let Some(authorization) = authorization {
                    request = request.header(AUTHORIZATION, authorization.clone());
                }
            }
            if let Some(accept) = ask.accept {
                request = request.header(ACCEPT, accept);
            }
            request = request.header(ACCEPT_ENCODING, "identity");
            if let Some(patience) = self.patience(upload.map_or(0, |upload| upload.bytes.len())) {
                request = request.timeout(patience);
            }
            if let Some((start, end)) = ask.range {
                let last = end.map(|end| end.saturating_sub(1).to_string()).unwrap_or_default();
                request = request.header(RANGE, format!("bytes={start}-{last}"));
            }
            if let Some(upload) = upload {
                request = request.header(CONTENT_TYPE, upload.content_type).body(upload.bytes.clone());
                if let Some(start) = upload.range {
                    let end = start + (upload.bytes.len() as u64).saturating_sub(1);
                    request = request.header(CONTENT_RANGE, format!("{start}-{end}"));
                }
            }
            let response = request.send().await.map_err(|error| self.cut(error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = target.and_then(|target| url.join(target).ok());
            let target = target.ok_or_else(|| self.protocol("it redirects to an invalid address"))?;
            match (url.scheme(), target.scheme()) {
                (_, "https") | ("http", "http") => url = target,
                _ => {
                    return Err(self
                        .protocol("it redirects from https to an address without encryption")
                        .into());
                }
            }
        }
        Err(self.protocol("it redirects without end").into())
    }

    /// Splits answers into good ones and failures.
    async fn judge(&self, ask: &Ask<'_>, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let wait =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(retry_after);
        let error = RegistryError::Status {
            host: self.name.clone(),
            status: status.as_u16(),
            what: ask.what.to_owned(),
            detail: error_detail(response).await,
        };
        let attempts = if is_transient(status.as_u16()) { MAX_ATTEMPTS } else { 1 };
        Err(Failure { error, attempts, wait })
    }

    /// A request that got no answer.
    fn cut(&self, error: reqwest::Error) -> Failure {
        let attempts = match error.is_connect() {
            // There is somebody else to ask instead of a mirror.
            true if !self.config.is_server => 1,
            true => MAX_CONNECT_ATTEMPTS,
            false => MAX_ATTEMPTS,
        };
        if error.is_connect() {
            self.away.store(true, Ordering::Relaxed);
        }
        Failure { error: self.unreachable(error), attempts, wait: None }
    }

    /// The error for a broken connection.
    pub(super) fn unreachable(&self, error: reqwest::Error) -> RegistryError {
        // Addresses of redirects hold signatures; they do not belong in messages.
        self.broke(reasons(&error.without_url()))
    }

    /// The error for an answer that broke off.
    pub(super) fn broke(&self, reason: String) -> RegistryError {
        RegistryError::Unreachable { host: self.name.clone(), reason }
    }

    /// The error for an answer that breaks the protocol.
    pub(super) fn protocol(&self, reason: &str) -> RegistryError {
        RegistryError::Protocol { host: self.name.clone(), reason: reason.to_owned() }
    }

    /// The address that an answer names, if it may be used: whoever is reached by https is not left for http.
    pub(super) fn location(&self, response: &Response) -> Result<Url, RegistryError> {
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let url = location.and_then(|location| response.url().join(location).ok());
        let url = url.ok_or_else(|| self.protocol("it names no valid address for an upload"))?;
        match (self.config.base.scheme(), url.scheme()) {
            (_, "https") | ("http", "http") => Ok(url),
            _ => Err(self.protocol("it names an address without encryption for an upload")),
        }
    }

    /// Whether it is the registry itself, where images are pushed to.
    pub(super) fn is_server(&self) -> bool {
        self.config.is_server
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.config.base.clone();
        // Paths are made of repository names, tags and digests, whose grammar has nothing to escape.
        url.set_path(&format!("{}/{path}", self.config.base.path().trim_end_matches('/')));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    fn current_authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The wait before attempt `attempt` + 1.
pub(super) fn backoff(attempt: u32) -> Duration {
    let wait = FIRST_BACKOFF.saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(MAX_BACKOFF);
    // Spread those who were thrown out together over a quarter of the time.
    let noise = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    wait + wait.mul_f64(f64::from(noise % 1000) / 4000.0)
}

fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// `Retry-After` in seconds. The date form is rare and then the usual backoff serves.
fn retry_after(value: &str) -> Option<Duration> {
    let seconds: u64 = value.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_BACKOFF))
}

fn same_origin(one: &Url, other: &Url) -> bool {
    one.scheme() == other.scheme()
        && one.host_str() == other.host_str()
        && one.port_or_known_default() == other.port_or_known_default()
}

/// Host with port where it is not the scheme's own.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn client(
    config: &HostConfig,
    name: &str,
    silence: Option<Duration>,
) -> Result<reqwest::Client, RegistryError> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(config.dial_timeout.unwrap_or(DIAL_TIMEOUT))
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .danger_accept_invalid_certs(config.skip_verify);
    if let Some(silence) = silence {
        builder = builder.read_timeout(silence);
    }
    if is_loopback(name) {
        builder = builder.no_proxy();
    }
    if config.base.scheme() == "http" && config.authorities.is_empty() {
        // Reading the system's authorities takes some 10 ms, and a redirect from here rarely needs them: the ones
        // built in serve it.
        builder = builder.tls_built_in_native_certs(false);
    }
    for pem in &config.authorities {
        let certificates = reqwest::Certificate::from_pem_bundle(pem).map_err(|error| {
            configuration(name, format!("a ca file has no certificates: {}", reasons(&error)))
        })?;
        if certificates.is_empty() {
            return Err(configuration(name, "a ca file has no certificates".to_owned()));
        }
        builder = certificates.into_iter().fold(builder, reqwest::ClientBuilder::add_root_certificate);
    }
    if let Some(pem) = &config.identity {
        let identity = reqwest::Identity::from_pem(pem).map_err(|error| {
            configuration(name, format!("the client certificate is unusable: {}", reasons(&error)))
        })?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| configuration(name, reasons(&error)))
}

fn configuration(host: &str, reason: String) -> RegistryError {
    RegistryError::Configuration { path: host.into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        assert!(backoff(1) >= FIRST_BACKOFF && backoff(1) < FIRST_BACKOFF * 2);
        assert!(backoff(3) >= FIRST_BACKOFF * 4);
        assert!(backoff(1000) <= MAX_BACKOFF * 2);
        assert_eq!(retry_after("3"), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("99999999"), Some(MAX_BACKOFF));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), None);
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(same_origin(&url("https://a/x"), &url("https://a:443/y")));
        for other in ["http://a/x", "https://a:444/x", "https://b/x", "https://a.b/x"] {
            assert!(!same_origin(&url("https://a/x"), &url(other)), "{other}");
        }
    }
}
