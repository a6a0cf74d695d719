//! The client's side of an HTTP/2 connection (RFC 9113), as far as header blocks go.
//!
//! What is held back is bounded: one header block (64 KiB) and one chunk of input. A connection whose first header
//! block is not understood passes on untouched, for h2 to say what is wrong with it; once blocks are being rewritten,
//! what is not understood ends the connection.

use std::io;

use bytes::{Buf, BytesMut};
use http::uri::Authority;

use super::hpack::{self, Decoder, Header};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;
/// SETTINGS_MAX_FRAME_SIZE of the server, which leaves it at its initial value (RFC 9113, 6.5.2).
const MAX_FRAME: usize = 16_384;
/// Most bytes of one header block, compressed.
const MAX_BLOCK: usize = 64 << 10;
/// Most frames that one header block may come in.
const MAX_BLOCK_FRAMES: usize = 64;
/// No more input is looked at while so much output waits, so that a few bytes cannot be blown up without bound.
const MAX_READY: usize = 64 << 10;

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Until the first header block has been seen.
    Inspect,
    Rewrite,
    PassThrough,
}

#[derive(Clone, Copy, Debug)]
enum Position {
    /// So many bytes of the preface have matched.
    Preface(usize),
    /// At the start of a frame.
    Frame,
    /// So many bytes of a frame are left that concern nobody here.
    Payload(usize),
}

/// A header block that is not complete yet.
#[derive(Debug)]
struct Block {
    stream: u32,
    /// END_STREAM and PRIORITY of the HEADERS frame.
    flags: u8,
    priority: Vec<u8>,
    fragment: Vec<u8>,
    frames: usize,
}

/// What a client sends: `pending` in, `ready` out.
#[derive(Debug)]
pub(super) struct Inbound {
    mode: Mode,
    position: Position,
    decoder: Decoder,
    block: Option<Block>,
    /// Inspecting: the frames of the first header block as they came.
    held: BytesMut,
    /// Received, not looked at.
    pub(super) pending: BytesMut,
    /// For the server to read.
    pub(super) ready: BytesMut,
}

impl Inbound {
    pub(super) fn new() -> Self {
        Inbound {
            mode: Mode::Inspect,
            position: Position::Preface(0),
            decoder: Decoder::new(),
            block: None,
            held: BytesMut::new(),
            pending: BytesMut::new(),
            ready: BytesMut::new(),
        }
    }

    /// True once nothing is looked at any more; what is `ready` comes before what is read from then on.
    pub(super) fn passes_through(&self) -> bool {
        self.mode == Mode::PassThrough && self.pending.is_empty()
    }

    /// Looks at what is pending as long as there is room for the result.
    pub(super) fn advance(&mut self) -> io::Result<()> {
        while self.ready.len() < MAX_READY && !self.pending.is_empty() {
            if self.mode == Mode::PassThrough {
                self.ready.unsplit(self.pending.split());
                break;
            }
            match self.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) if self.mode == Mode::Inspect => self.step_aside(),
                Err(reason) => return Err(io::Error::new(io::ErrorKind::InvalidData, reason)),
            }
        }
        Ok(())
    }

    /// The client sends no more. True if that leaves nothing to read.
    pub(super) fn end(&mut self) -> bool {
        self.step_aside();
        self.ready.unsplit(self.pending.split());
        self.ready.is_empty()
    }

    fn step_aside(&mut self) {
        self.mode = Mode::PassThrough;
        self.ready.unsplit(self.held.split());
        self.block = None;
        self.decoder = Decoder::new();
    }

    /// Takes one more piece of what is pending; false if there is not enough of it yet.
    fn step(&mut self) -> Result<bool, &'static str> {
        match self.position {
            Position::Preface(matched) => {
                let length = (PREFACE.len() - matched).min(self.pending.len());
                if self.pending[..length] != PREFACE[matched..matched + length] {
                    return Err("this is not HTTP/2");
                }
                self.pass(length);
                self.position = match matched + length {
                    whole if whole == PREFACE.len() => Position::Frame,
                    part => Position::Preface(part),
                };
                Ok(true)
            }
            Position::Payload(left) => {
                let length = left.min(self.pending.len());
                self.pass(length);
                self.position =
                    if left == length { Position::Frame } else { Position::Payload(left - length) };
                Ok(true)
            }
            Position::Frame => self.frame(),
        }
    }

    fn pass(&mut self, length: usize) {
        let passed = self.pending.split_to(length);
        self.ready.extend_from_slice(&passed);
    }

    fn frame(&mut self) -> Result<bool, &'static str> {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *match self.pending.first_chunk::<FRAME_HEADER>() {
            Some(header) => header,
            None => return Ok(false),
        };
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        let stream = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
        let in_block = self.block.is_some();
        if kind != HEADERS && kind != CONTINUATION {
            if in_block {
                return Err("another frame came within a header block");
            }
            self.pass(FRAME_HEADER);
            self.position = if length == 0 { Position::Frame } else { Position::Payload(length) };
            return Ok(true);
        }
        if length > MAX_FRAME {
            return Err("a header frame is too large");
        }
        if in_block != (kind == CONTINUATION) {
            return Err("header frames are out of order");
        }
        if self.pending.len() < FRAME_HEADER + length {
            return Ok(false);
        }
        let frame = self.pending.split_to(FRAME_HEADER + length);
        if self.mode == Mode::Inspect {
            self.held.extend_from_slice(&frame);
        }
        self.add_to_block(stream, kind, flags, &frame[FRAME_HEADER..])?;
        if flags & END_HEADERS != 0 {
            self.finish_block()?;
        }
        Ok(true)
    }

    fn add_to_block(&mut self, stream: u32, kind: u8, flags: u8, payload: &[u8]) -> Result<(), &'static str> {
        let block = match &mut self.block {
            Some(block) if block.stream == stream => {
                block.frames += 1;
                block
            }
            Some(_) => return Err("a header block goes on on another stream"),
            none => none.insert(Block {
                stream,
                flags: flags & (END_STREAM | PRIORITY),
                priority: Vec::new(),
                fragment: Vec::new(),
                frames: 1,
            }),
        };
        let mut fragment = payload;
        if kind == HEADERS {
            fragment = without_padding(fragment, flags)?;
            if flags & PRIORITY != 0 {
                let (priority, rest) = fragment.split_at_checked(5).ok_or("a HEADERS frame is too short")?;
                block.priority = priority.to_vec();
                fragment = rest;
            }
        }
        if block.fragment.len() + fragment.len() > MAX_BLOCK || block.frames > MAX_BLOCK_FRAMES {
            return Err("a header block is too large");
        }
        block.fragment.extend_from_slice(fragment);
        Ok(())
    }

    fn finish_block(&mut self) -> Result<(), &'static str> {
        let Some(block) = self.block.take() else { return Ok(()) };
        let mut headers = self.decoder.decode(&block.fragment)?;
        let replaced = headers.iter_mut().filter_map(name_localhost).last();
        if self.mode == Mode::Inspect {
            let Some(authority) = replaced else {
                self.step_aside();
                return Ok(());
            };
            tracing::debug!(%authority, "the client names no host as authority; localhost is put in its place");
            self.held = BytesMut::new();
            self.mode = Mode::Rewrite;
        }
        let mut payload = block.priority;
        hpack::encode(&headers, &mut payload);
        self.write_block(block.stream, block.flags, &payload);
        Ok(())
    }

    fn write_block(&mut self, stream: u32, flags: u8, mut payload: &[u8]) {
        let (mut kind, mut flags) = (HEADERS, flags);
        loop {
            let length = payload.len().min(MAX_FRAME);
            if length == payload.len() {
                flags |= END_HEADERS;
            }
            self.ready.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
            self.ready.extend_from_slice(&[kind, flags]);
            self.ready.extend_from_slice(&stream.to_be_bytes());
            self.ready.extend_from_slice(&payload[..length]);
            payload.advance(length);
            if payload.is_empty() {
                return;
            }
            (kind, flags) = (CONTINUATION, 0);
        }
    }
}

fn without_padding(payload: &[u8], flags: u8) -> Result<&[u8], &'static str> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    let (padding, rest) = payload.split_first().ok_or("a HEADERS frame is too short")?;
    let length = rest.len().checked_sub(usize::from(*padding)).ok_or("a HEADERS frame is all padding")?;
    Ok(&rest[..length])
}

/// Puts a real authority in place of what is none, and returns what was there.
fn name_localhost(header: &mut Header) -> Option<String> {
    if header.name != ":authority" || Authority::try_from(&header.value[..]).is_ok() {
        return None;
    }
    let was = String::from_utf8_lossy(&header.value).into_owned();
    header.value = "localhost".into();
    Some(was)
}

#[cfg(test)]
mod tests;
