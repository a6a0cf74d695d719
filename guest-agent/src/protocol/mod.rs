//! The protocol between hulld and the agent: messages, frames, exit records. See proto/agent.proto.

mod connection;
pub mod exit_record;
mod frame;
#[cfg(test)]
mod tests;

/// Messages, generated from proto/agent.proto.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/hull.agent.v1.rs"));
}

pub use connection::BlockingConnectionOf;
pub use frame::{
    FrameError, FrameMessage, FrameOf, FrameReaderOf, FrameWriter, MAX_FRAME, MAX_FRAME_DESCRIPTORS, encode,
};

use messages::{Message, message::Body, slot};

/// A frame of the agent protocol.
pub type Frame = FrameOf<Message>;
/// Reads frames of the agent protocol.
pub type FrameReader = FrameReaderOf<Message>;
/// A connection of the agent protocol, for code that may wait.
pub type BlockingConnection = BlockingConnectionOf<Message>;

impl FrameMessage for Message {
    fn named_descriptors(&self) -> usize {
        let Some(Body::Request(request)) = &self.body else { return 0 };
        let numbers = request.slots.iter().map(|slot| match slot.kind {
            Some(slot::Kind::Descriptor(number)) => (number as usize).saturating_add(1),
            _ => 0,
        });
        numbers.max().unwrap_or(0)
    }
}

/// Longest container or sandbox id.
const MAX_ID: usize = 128;

/// Whether `id` may name a container or a sandbox: 1 to 128 letters, digits, `-`, `_` and `.`, not starting with a dot,
/// so that it can be part of a file name and of a line of text.
pub fn is_valid_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_ID).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(allowed)
}
