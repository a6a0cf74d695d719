//! Frames: a little-endian u32 length and one message; descriptors ride on the frame's bytes.
//!
//! The codec knows nothing of the message but how many descriptors it names: the VMM's control protocol uses it too.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::descriptor::{recv_with_fds, send_with_fds};

/// Longest message in bytes, without the length before it.
pub const MAX_FRAME: usize = 4 << 20;
/// Most descriptors on one frame.
pub const MAX_FRAME_DESCRIPTORS: usize = 1000;

/// Descriptors in one sendmsg; the kernel takes 253 (SCM_MAX_FD).
const DESCRIPTORS_IN_A_PIECE: usize = 250;
const LENGTH: usize = size_of::<u32>();
/// What one [`FrameReader::receive_from`] takes at most; on the stack.
const CHUNK: usize = 8 << 10;
/// Most bytes that may wait in a [`FrameWriter`].
const MAX_QUEUED: usize = 2 * (MAX_FRAME + LENGTH);
/// Buffers larger than this are given back as soon as they are empty.
const KEPT_CAPACITY: usize = 4 << 10;

/// Why a frame could not be read or made. The stream it came from is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is above the limit.
    #[error("a frame of {length} bytes is longer than the {limit} that are allowed")]
    TooLong {
        /// Announced or needed length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The bytes are not a message.
    #[error("a frame is not a message of the protocol: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// The message names more descriptors than came with the frame, or more than a frame may have.
    #[error("a frame names {named} descriptors and {arrived} came with it")]
    MissingDescriptors {
        /// How many the slots name.
        named: usize,
        /// How many are there.
        arrived: usize,
    },
    /// Descriptors came that no frame names.
    #[error("{0} descriptors came that no frame names")]
    StrayDescriptors(usize),
    /// The peer does not read what is sent to it.
    #[error("{0} bytes wait already to be sent to a peer that does not read them")]
    QueueFull(usize),
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// A message that travels in frames.
pub trait FrameMessage: prost::Message + Default {
    /// How many descriptors must come with the message: the highest number that it names, and one.
    fn named_descriptors(&self) -> usize;
}

/// A message and the descriptors that it numbers.
#[derive(Debug)]
pub struct FrameOf<M> {
    /// The message.
    pub message: M,
    /// A descriptor's number is an index into this.
    pub fds: Vec<OwnedFd>,
}

/// The message as it goes over the wire, length first.
pub fn encode(message: &impl FrameMessage) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    if length > MAX_FRAME {
        return Err(FrameError::TooLong { length, limit: MAX_FRAME });
    }
    let mut bytes = Vec::with_capacity(LENGTH + length);
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    message.encode_raw(&mut bytes);
    Ok(bytes)
}

/// Puts frames together from the bytes and descriptors of a stream.
///
/// Never holds more than one announced frame and one chunk; memory grows with bytes that came, not with a length that
/// was claimed.
#[derive(Debug)]
pub struct FrameReaderOf<M> {
    bytes: Vec<u8>,
    /// Start of what was not consumed yet in `bytes`.
    start: usize,
    fds: VecDeque<OwnedFd>,
    limit: usize,
    message: PhantomData<fn() -> M>,
}

impl<M: FrameMessage> Default for FrameReaderOf<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: FrameMessage> FrameReaderOf<M> {
    /// Reads frames of up to [`MAX_FRAME`] bytes.
    pub const fn new() -> Self {
        Self::with_limit(MAX_FRAME)
    }

    /// Reads frames of up to `limit` bytes, at most [`MAX_FRAME`]. Decoded, a hostile message can need some forty
    /// times its size, so a reader that expects only small ones should say so.
    pub const fn with_limit(limit: usize) -> Self {
        let limit = if limit < MAX_FRAME { limit } else { MAX_FRAME };
        Self { bytes: Vec::new(), start: 0, fds: VecDeque::new(), limit, message: PhantomData }
    }

    /// Adds what was received. Call [`Self::next`] until it gives `None` before adding more.
    pub fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// Receives once from a unix socket and adds that; the number of bytes, 0 at the end of the stream. `WouldBlock`
    /// passes through.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut chunk = [0; CHUNK];
        let mut fds = Vec::new();
        let length = recv_with_fds(socket, &mut chunk, &mut fds)?;
        self.push(&chunk[..length], fds);
        Ok(length)
    }

    /// The next complete frame, `None` if more bytes are needed. After an error the stream is out of step and must be
    /// closed.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: None means not yet")]
    pub fn next(&mut self) -> Result<Option<FrameOf<M>>, FrameError> {
        let pending = &self.bytes[self.start..];
        if self.fds.len() > MAX_FRAME_DESCRIPTORS + DESCRIPTORS_IN_A_PIECE {
            return Err(FrameError::StrayDescriptors(self.fds.len()));
        }
        let Some((length, rest)) = pending.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(body)?;
        let named = message.named_descriptors();
        if named > MAX_FRAME_DESCRIPTORS || named > self.fds.len() {
            return Err(FrameError::MissingDescriptors { named, arrived: self.fds.len() });
        }
        let fds = self.fds.drain(..named).collect();
        self.start += LENGTH + length;
        self.forget_consumed()?;
        Ok(Some(FrameOf { message, fds }))
    }

    /// True in the middle of a frame: an end of the stream here has lost something.
    pub fn is_within_frame(&self) -> bool {
        self.start < self.bytes.len()
    }

    fn forget_consumed(&mut self) -> Result<(), FrameError> {
        if self.start < self.bytes.len() {
            // Only now and then, so that many small frames in one chunk cost no copy each.
            if self.start >= CHUNK {
                self.bytes.drain(..self.start);
                self.start = 0;
            }
            return Ok(());
        }
        self.start = 0;
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_CAPACITY);
        if self.fds.is_empty() {
            self.fds.shrink_to(0);
            return Ok(());
        }
        Err(FrameError::StrayDescriptors(self.fds.len()))
    }
}

/// Frames that wait to be sent, with their descriptors, for sockets that do not block.
#[derive(Debug, Default)]
pub struct FrameWriter {
    bytes: Vec<u8>,
    /// Start of what was not sent yet in `bytes`.
    start: usize,
    /// Position in `bytes` at or after which the descriptors are due, in order.
    fds: VecDeque<(usize, Vec<OwnedFd>)>,
}

impl FrameWriter {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, fds: VecDeque::new() }
    }

    /// Bytes that wait.
    pub fn queued(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Queues a frame. Refused if two of the longest frames wait already, or if there are too many descriptors.
    pub fn push(&mut self, message: &impl FrameMessage, fds: Vec<OwnedFd>) -> Result<(), FrameError> {
        if fds.len() > MAX_FRAME_DESCRIPTORS {
            return Err(FrameError::MissingDescriptors { named: fds.len(), arrived: MAX_FRAME_DESCRIPTORS });
        }
        let frame = encode(message)?;
        if self.queued() + frame.len() > MAX_QUEUED {
            return Err(FrameError::QueueFull(self.queued()));
        }
        let position = self.bytes.len();
        if self.bytes.is_empty() {
            self.bytes = frame;
        } else {
            self.bytes.extend_from_slice(&frame);
        }
        // Each piece needs a byte to ride on, and a frame has at least the four of its length.
        let mut fds = fds.into_iter().peekable();
        for piece in 0.. {
            if fds.peek().is_none() {
                break;
            }
            self.fds.push_back((position + piece, fds.by_ref().take(DESCRIPTORS_IN_A_PIECE).collect()));
        }
        Ok(())
    }

    /// Sends as much as the socket takes. True if nothing waits any more; false if the socket would block.
    pub fn write_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.start < self.bytes.len() {
            match self.write_piece(socket) {
                Ok(sent) => self.start += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_CAPACITY);
        self.start = 0;
        Ok(true)
    }

    fn write_piece(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let due = self.fds.front().is_some_and(|(position, _)| *position <= self.start);
        // Up to where the next descriptors are due, so that they ride on a byte of their own frame.
        let end = self.fds.get(usize::from(due)).map_or(self.bytes.len(), |(position, _)| *position);
        let piece = &self.bytes[self.start..end];
        if !due {
            return send_with_fds(socket, piece, &[]);
        }
        let fds: Vec<BorrowedFd<'_>> =
            self.fds.front().into_iter().flat_map(|(_, fds)| fds).map(|fd| fd.as_fd()).collect();
        let sent = send_with_fds(socket, piece, &fds)?;
        self.fds.pop_front();
        Ok(sent)
    }
}
