//! A blob as a stream of bytes that survives cut connections: it continues where it was, at the same host or the next.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{Method, Response, StatusCode};

use super::error::RegistryError;
use super::host::{Ask, Host, backoff};

/// Cuts in a row without a single new byte before a host is given up.
const MAX_FRUITLESS: u32 = 4;
/// Cuts in total: a host that breaks after every few bytes is not worth more.
const MAX_CUTS: u32 = 100;

/// A blob being read. Its digest is not verified here: the reader does that.
pub(crate) struct Blob {
    hosts: Vec<Arc<Host>>,
    path: String,
    size: u64,
    offset: u64,
    current: Option<Response>,
    /// Bytes at the start of the current answer that were received before: its host does not serve ranges.
    skip: u64,
    fruitless: u32,
    cuts: u32,
}

impl Blob {
    pub(super) fn new(hosts: Vec<Arc<Host>>, path: String, size: u64) -> Self {
        Self { hosts, path, size, offset: 0, current: None, skip: 0, fruitless: 0, cuts: 0 }
    }

    /// The next bytes; None at the end, which may come before the expected size. Fails when more bytes come than
    /// expected, or when no host can continue.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let Some(host) = self.hosts.first().cloned() else {
                return Err(RegistryError::Configuration {
                    path: self.path.as_str().into(),
                    reason: "no configured host has the capability to serve blobs".to_owned(),
                });
            };
            let response = match self.current.take() {
                Some(response) => response,
                None if self.size == 0 || self.offset < self.size => match self.open(&host).await {
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
            if self.offset >= self.size {
                return Ok(None);
            }
        }
    }

    /// Reads from an open answer. None: nothing new came, because it ended or broke or repeats what is known.
    async fn read(&mut self, host: &Host, mut response: Response) -> Result<Option<Bytes>, RegistryError> {
        match response.chunk().await {
            Ok(Some(mut chunk)) => {
                let known = self.skip.min(chunk.len() as u64);
                self.skip -= known;
                let chunk = chunk.split_off(known as usize);
                if chunk.is_empty() {
                    self.current = Some(response);
                    return Ok(None);
                }
                if self.offset + chunk.len() as u64 > self.size {
                    return Err(self.too_large(host));
                }
                self.offset += chunk.len() as u64;
                self.fruitless = 0;
                self.current = Some(response);
                Ok(Some(chunk))
            }
            Ok(None) if self.offset >= self.size => Ok(None),
            Ok(None) => {
                let reason = format!("the stream ended after {} of {} bytes", self.offset, self.size);
                self.cut(RegistryError::Unreachable { host: host.name().to_owned(), reason }).await?;
                Ok(None)
            }
            Err(error) => {
                self.cut(host.unreachable(error)).await?;
                Ok(None)
            }
        }
    }

    /// Asks for the rest of the blob. None: the host says that there is no rest.
    async fn open(&mut self, host: &Host) -> Result<Option<Response>, RegistryError> {
        let ask = Ask {
            method: Method::GET,
            path: &self.path,
            accept: None,
            offset: self.offset,
            what: "the blob",
            upload: None,
        };
        let response = match host.request(&ask).await {
            Ok(response) => response,
            Err(RegistryError::Status { status: 416, .. }) if self.offset > 0 => return Ok(None),
            Err(error) => return Err(error),
        };
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => range_start(response.headers())
                .ok_or_else(|| host.protocol("it answered a range request without a valid Content-Range"))?,
            _ => 0,
        };
        if start > self.offset {
            return Err(host.protocol("it answered a range request with another range"));
        }
        if response.content_length().is_some_and(|length| start.saturating_add(length) > self.size) {
            return Err(self.too_large(host));
        }
        self.skip = self.offset - start;
        Ok(Some(response))
    }

    /// Counts a cut and waits a moment, or gives the host up.
    async fn cut(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.cuts += 1;
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
        if self.hosts.len() <= 1 {
            return Err(error);
        }
        tracing::warn!(%error, "a mirror failed");
        self.hosts.remove(0);
        (self.fruitless, self.cuts) = (0, 0);
        Ok(())
    }

    fn too_large(&self, host: &Host) -> RegistryError {
        RegistryError::TooLarge {
            host: host.name().to_owned(),
            what: "the blob".to_owned(),
            limit: self.size,
        }
    }
}

/// The first byte of a `Content-Range: bytes FIRST-LAST/SIZE`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    value.split('-').next()?.trim().parse().ok()
}
