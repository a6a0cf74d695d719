//! A span of a blob as a stream of bytes that survives cut connections: it continues where it was, at the same host or
//! the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{Method, Response, StatusCode};

use super::error::RegistryError;
use super::host::{Ask, Host, backoff};
use super::pace::Pace;

/// Cuts in a row without a single new byte before a host is given up.
const MAX_FRUITLESS: u32 = 4;
/// Cuts in total: a host that breaks after every few bytes is not worth more.
const MAX_CUTS: u32 = 100;
/// What an answer that came too slowly counts: it gives new bytes too, but next to none in all of the progress timeout.
const SLOW: u32 = MAX_CUTS / 3;

/// Where a blob comes from.
pub(super) struct Source {
    pub(super) hosts: Vec<Arc<Host>>,
    /// Below the API's base.
    pub(super) path: String,
    pub(super) size: u64,
    /// The first of the hosts that bytes came from.
    used: AtomicUsize,
}

impl Source {
    pub(super) fn new(hosts: Vec<Arc<Host>>, path: String, size: u64) -> Self {
        Self { hosts, path, size, used: AtomicUsize::new(usize::MAX) }
    }

    /// The hosts after the first one that bytes came from; nobody if none came, for then all have been asked.
    pub(super) fn others(&self) -> &[Arc<Host>] {
        let next = self.used.load(Ordering::Relaxed).checked_add(1);
        next.and_then(|next| self.hosts.get(next..)).unwrap_or_default()
    }
}

/// Bytes of a blob in order. Their digest is not verified here.
pub(super) struct Span {
    source: Arc<Source>,
    /// Which host is asked.
    host: usize,
    offset: u64,
    /// Where it ends; may be moved while it is read.
    pub(super) end: u64,
    /// Part of a blob of which others are fetched at the same time: worth nothing if the host does not serve ranges.
    is_part: bool,
    current: Option<Response>,
    /// Bytes at the start of the current answer that were received before: its host does not serve ranges.
    skip: u64,
    pace: Option<Pace>,
    fruitless: u32,
    cuts: u32,
}

impl Span {
    /// From `offset` to the blob's end, beginning with the hosts' number `host`.
    pub(super) fn rest(source: Arc<Source>, host: usize, offset: u64) -> Self {
        let end = source.size;
        Self {
            source,
            host,
            offset,
            end,
            is_part: false,
            current: None,
            skip: 0,
            pace: None,
            fruitless: 0,
            cuts: 0,
        }
    }

    /// Exactly these bytes, in ranges only.
    pub(super) fn part(source: Arc<Source>, host: usize, offset: u64, end: u64) -> Self {
        Self { end, is_part: true, ..Self::rest(source, host, offset) }
    }

    /// The number of the host that is asked.
    pub(super) fn host(&self) -> usize {
        self.host
    }

    /// Asks for the first byte, so that it is known whether there is one. Only for parts.
    pub(super) async fn connect(&mut self) -> Result<(), RegistryError> {
        let host = self.asked()?;
        self.current = self.open(&host).await?;
        Ok(())
    }

    /// The next bytes; None at the end, which may come before the expected one. Fails when more bytes come than the blob
    /// has, or when no host can continue.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let size = self.source.size;
        loop {
            if self.offset >= self.end && self.end < size {
                return Ok(None);
            }
            let host = self.asked()?;
            let response = match self.current.take() {
                Some(response) => response,
                None if size == 0 || self.offset < size => match self.open(&host).await {
                    Ok(Some(response)) => response,
                    Ok(None) => return Ok(None),
                    Err(error) => {
                        self.next_host(error)?;
                        continue;
                    }
                },
                None => return Ok(None),
            };
            if let Some(chunk) = self.read(&host, response).await? {
                return Ok(Some(chunk));
            }
            if self.offset >= size {
                return Ok(None);
            }
        }
    }

    fn asked(&self) -> Result<Arc<Host>, RegistryError> {
        self.source.hosts.get(self.host).cloned().ok_or_else(|| RegistryError::Configuration {
            path: self.source.path.as_str().into(),
            reason: "no configured host has the capability to serve blobs".to_owned(),
        })
    }

    /// Reads from an open answer. None: nothing new came, because it ended or broke or repeats what is known.
    async fn read(&mut self, host: &Host, mut response: Response) -> Result<Option<Bytes>, RegistryError> {
        let size = self.source.size;
        let pace = self.pace.get_or_insert_with(|| host.pace());
        match pace.chunk(&mut response).await {
            Ok(Some(mut chunk)) => {
                let known = self.skip.min(chunk.len() as u64);
                self.skip -= known;
                let mut chunk = chunk.split_off(known as usize);
                if chunk.is_empty() {
                    self.current = Some(response);
                    return Ok(None);
                }
                if self.offset + chunk.len() as u64 > size {
                    return Err(self.too_large(host));
                }
                if self.end < size {
                    // What is beyond it comes from elsewhere.
                    chunk.truncate(usize::try_from(self.end - self.offset).unwrap_or(usize::MAX));
                }
                self.offset += chunk.len() as u64;
                self.fruitless = 0;
                self.source.used.fetch_min(self.host, Ordering::Relaxed);
                // Read to its end even when all is here, so that the connection can be used again.
                self.current = Some(response).filter(|_| self.offset < self.end || self.end == size);
                Ok(Some(chunk))
            }
            Ok(None) if self.offset >= self.end => Ok(None),
            Ok(None) => {
                let reason = format!("the stream ended after {} of {size} bytes", self.offset);
                self.cut(host.broke(reason), 1).await?;
                Ok(None)
            }
            Err(broken) => {
                self.cut(host.broke(broken.reason), if broken.is_slow { SLOW } else { 1 }).await?;
                Ok(None)
            }
        }
    }

    /// Asks for the rest of the span. None: the host says that there is no rest.
    async fn open(&mut self, host: &Host) -> Result<Option<Response>, RegistryError> {
        let end = self.is_part.then_some(self.end);
        let ask = Ask {
            method: Method::GET,
            path: &self.source.path,
            accept: None,
            range: (self.offset > 0 || end.is_some()).then_some((self.offset, end)),
            what: "the blob",
            upload: None,
        };
        self.pace = None;
        let size = self.source.size;
        let response = match host.request(&ask).await {
            Ok(response) => response,
            Err(RegistryError::Status { status: 416, .. }) if self.offset > 0 && !self.is_part => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let invalid = || host.protocol("it answered a range request without a valid Content-Range");
                let (start, total) = range(response.headers()).ok_or_else(invalid)?;
                if total.is_some_and(|total| total != size) {
                    return Err(host.protocol("it answered a range request for a blob of another size"));
                }
                start
            }
            _ if self.is_part => return Err(host.protocol("it does not serve ranges")),
            _ => 0,
        };
        if start > self.offset || (self.is_part && start < self.offset) {
            return Err(host.protocol("it answered a range request with another range"));
        }
        let most = if self.is_part { self.end } else { size };
        if response.content_length().is_some_and(|length| start.saturating_add(length) > most) {
            return Err(self.too_large(host));
        }
        self.skip = self.offset - start;
        Ok(Some(response))
    }

    /// Counts a cut and waits a moment, or gives the host up.
    async fn cut(&mut self, error: RegistryError, weight: u32) -> Result<(), RegistryError> {
        self.cuts += weight;
        self.fruitless += 1;
        if self.fruitless > MAX_FRUITLESS || self.cuts > MAX_CUTS {
            return self.next_host(error);
        }
        tracing::debug!(%error, offset = self.offset, "continuing a blob");
        tokio::time::sleep(backoff(self.fruitless)).await;
        Ok(())
    }

    /// Moves on to the next host; the last one's failure is final.
    fn next_host(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        if self.host + 1 >= self.source.hosts.len() {
            return Err(error);
        }
        tracing::warn!(%error, "a mirror failed");
        self.host += 1;
        (self.fruitless, self.cuts) = (0, 0);
        Ok(())
    }

    fn too_large(&self, host: &Host) -> RegistryError {
        RegistryError::TooLarge {
            host: host.name().to_owned(),
            what: "the blob".to_owned(),
            limit: self.source.size,
        }
    }
}

/// The first byte and the whole size of a `Content-Range: bytes FIRST-LAST/SIZE`; the size may be unknown (`*`).
fn range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, size) = value.split_once('/').unwrap_or((value, "*"));
    let first = range.split('-').next()?.trim().parse().ok()?;
    Some((first, size.trim().parse().ok()))
}
