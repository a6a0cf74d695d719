use std::io::{BufRead, ErrorKind};

use super::Content;
use super::header::BLOCK;
use crate::layer::error::LayerError;
use crate::layer::limits::Limits;
use crate::layer::tar_split::Recorder;

/// The archive's bytes, counted against the limit.
pub(super) struct Input<'l, R> {
    inner: R,
    pub(super) limits: &'l Limits,
    offset: u64,
    /// Hears of everything.
    pub(super) recorder: Option<Recorder<'l>>,
}

impl<'l, R: BufRead> Input<'l, R> {
    pub(super) fn new(inner: R, limits: &'l Limits, recorder: Option<Recorder<'l>>) -> Self {
        Self { inner, limits, offset: 0, recorder }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.offset
    }

    /// Reads to the end of the stream.
    pub(super) fn drain(&mut self) -> Result<(), LayerError> {
        loop {
            let length = self.fill()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length)?;
        }
    }

    /// Hands `length` bytes of the entry's content, which begin at `start` of the file, to `sink`.
    pub(super) fn content(
        &mut self,
        start: u64,
        length: u64,
        sink: &mut dyn FnMut(Content<'_>) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        if length > 0
            && let Some(recorder) = &mut self.recorder
        {
            recorder.piece(start, length).map_err(LayerError::WriteFile)?;
        }
        // The layer file will hold them: they are not written down.
        let recorder = self.recorder.take();
        let read = self.data(length, sink);
        self.recorder = recorder;
        read
    }

    /// Hands `length` bytes to `sink`.
    pub(super) fn data(
        &mut self,
        mut length: u64,
        sink: &mut dyn FnMut(Content<'_>) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        while length > 0 {
            let offset = self.offset;
            let available = self.fill()?;
            if available.is_empty() {
                return Err(LayerError::Truncated { offset, what: "an entry's content" });
            }
            let take = available.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            sink(Content::Data(&available[..take]))?;
            self.consume(take)?;
            length -= take as u64;
        }
        Ok(())
    }

    pub(super) fn skip(&mut self, length: u64) -> Result<(), LayerError> {
        self.data(length, &mut |_| Ok(()))
    }

    /// False at a clean end of the stream.
    pub(super) fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, LayerError> {
        let mut filled = 0;
        while filled < BLOCK {
            let available = self.fill()?;
            if available.is_empty() {
                return if filled == 0 { Ok(false) } else { Err(self.truncated("a header")) };
            }
            let take = available.len().min(BLOCK - filled);
            block[filled..filled + take].copy_from_slice(&available[..take]);
            self.consume(take)?;
            filled += take;
        }
        Ok(true)
    }

    fn fill(&mut self) -> Result<&[u8], LayerError> {
        loop {
            match self.inner.fill_buf() {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::ReadBlob(error)),
            }
        }
        self.inner.fill_buf().map_err(LayerError::ReadBlob)
    }

    fn consume(&mut self, length: usize) -> Result<(), LayerError> {
        if let Some(recorder) = &mut self.recorder {
            let available = self.inner.fill_buf().map_err(LayerError::ReadBlob)?;
            recorder.literal(&available[..length]).map_err(LayerError::WriteFile)?;
        }
        self.inner.consume(length);
        self.offset += length as u64;
        limit("uncompressed bytes", self.offset, self.limits.max_uncompressed)
    }

    pub(super) fn malformed(&self, reason: &'static str) -> LayerError {
        LayerError::Malformed { offset: self.offset, reason }
    }

    pub(super) fn truncated(&self, what: &'static str) -> LayerError {
        LayerError::Truncated { offset: self.offset, what }
    }
}

/// An error when there is more of something than allowed.
pub(super) fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), LayerError> {
    if value > limit { Err(LayerError::Limit { what, limit }) } else { Ok(()) }
}
