//! A blob as a stream of bytes in order. A large one whose host serves ranges is read over several connections at once,
//! as long as that is what it waits for.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::downloads::RegistryDownloads;
use super::error::RegistryError;
use super::host::Host;
use super::part::{Part, PartState};
use super::span::{Source, Span};

/// Bytes of one part: long enough that asking for it costs little beside it, short enough to be held in memory.
const PART: u64 = 2 << 20;
/// Parts fetched before their turn, for one blob.
const MAX_PARTS: usize = 3;
/// Blobs smaller than this come over one connection.
const MIN_SIZE: u64 = 16 << 20;

/// A blob being read. Its digest is not verified here: the reader does that.
pub(crate) struct Blob {
    source: Arc<Source>,
    head: Head,
    /// Bytes handed out.
    position: u64,
    /// In order, without gaps, the first one where the head ends.
    ahead: VecDeque<Part>,
    /// A part that shows whether there will be others.
    probe: Option<Part>,
    ranges: Ranges,
}

/// Where the next bytes come from.
enum Head {
    Span(Span),
    Part(Part),
}

/// Whether the hosts serve ranges.
#[derive(Clone, Copy, PartialEq)]
enum Ranges {
    Unknown,
    Served,
    Refused,
}

impl Blob {
    pub(super) fn new(hosts: Vec<Arc<Host>>, path: String, size: u64) -> Self {
        let source = Arc::new(Source::new(hosts, path, size));
        Self {
            head: Head::Span(Span::rest(source.clone(), 0, 0)),
            source,
            position: 0,
            ahead: VecDeque::new(),
            probe: None,
            ranges: if size < MIN_SIZE { Ranges::Refused } else { Ranges::Unknown },
        }
    }

    /// The blob from its beginning, without the first host that has given bytes of this one: they were wrong. None if
    /// no other host is left.
    pub(crate) fn elsewhere(&self) -> Option<Blob> {
        let hosts = self.source.others();
        (!hosts.is_empty()).then(|| Blob::new(hosts.to_vec(), self.source.path.clone(), self.source.size))
    }

    /// The next bytes; None at the end, which may come before the expected size. Fails when more bytes come than
    /// expected, or when no host can continue.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            self.look_at_probe();
            let chunk = match &mut self.head {
                Head::Span(span) => span.chunk().await?,
                Head::Part(part) => match part.piece().await {
                    Ok(None) if self.position < part.end => {
                        self.go_on_alone("a part ended early");
                        continue;
                    }
                    Ok(piece) => piece,
                    Err(error) => {
                        self.go_on_alone(&error.to_string());
                        continue;
                    }
                },
            };
            if let Some(chunk) = chunk {
                self.position += chunk.len() as u64;
                return Ok(Some(chunk));
            }
            let is_short = match &self.head {
                Head::Span(span) => self.position < span.end,
                Head::Part(_) => false,
            };
            match self.ahead.pop_front() {
                Some(part) if !is_short => self.head = Head::Part(part),
                _ if is_short || self.position >= self.source.size => return Ok(None),
                _ => self.head = Head::Span(self.rest()),
            }
        }
    }

    /// Tells that the bytes are wanted faster than they come: more of them are fetched at the same time, if the permits
    /// and the host allow that.
    pub(crate) fn hurry(&mut self, downloads: &RegistryDownloads) {
        if self.ranges == Ranges::Refused || self.probe.is_some() || self.ahead.len() >= MAX_PARTS {
            return;
        }
        let start = match (self.ahead.back(), &self.head) {
            (Some(part), _) => part.end,
            (None, Head::Part(part)) => part.end,
            // Until an answer to the first request for a part is here, the head goes on.
            (None, Head::Span(_)) => self.position + 2 * PART,
        };
        let end = (start + PART).min(self.source.size);
        if start >= end {
            return;
        }
        let Some(permit) = downloads.try_ahead() else { return };
        let host = self.host();
        let part = Part::fetch(Span::part(self.source.clone(), host, start, end), start, end, permit);
        match (&mut self.head, self.ranges) {
            (Head::Span(span), Ranges::Served) if self.ahead.is_empty() => {
                span.end = start;
                self.ahead.push_back(part);
            }
            (_, Ranges::Served) => self.ahead.push_back(part),
            _ => self.probe = Some(part),
        }
    }

    fn look_at_probe(&mut self) {
        let Some(state) = self.probe.as_ref().map(Part::state) else { return };
        let part = match state {
            PartState::Asked => return,
            PartState::Open => {
                self.ranges = Ranges::Served;
                // One that came too late is of no use.
                self.probe.take().filter(|part| self.position < part.start)
            }
            PartState::Failed => {
                self.ranges = Ranges::Refused;
                self.probe = None;
                None
            }
        };
        // Parts become the head only after the probe.
        if let (Some(part), Head::Span(span)) = (part, &mut self.head) {
            span.end = part.start;
            self.ahead.push_back(part);
        }
    }

    /// Gives reading ahead up. What is wrong with the host is found out by reading on.
    fn go_on_alone(&mut self, reason: &str) {
        tracing::debug!(reason, path = self.source.path, "reading a blob over one connection");
        self.ranges = Ranges::Refused;
        self.ahead.clear();
        self.head = Head::Span(self.rest());
    }

    fn rest(&self) -> Span {
        Span::rest(self.source.clone(), self.host(), self.position)
    }

    /// The host that serves the blob now.
    fn host(&self) -> usize {
        match &self.head {
            Head::Span(span) => span.host(),
            Head::Part(part) => part.host,
        }
    }
}
