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

pub use connection::BlockingConnection;
pub use frame::{Frame, FrameError, FrameReader, FrameWriter, MAX_FRAME, MAX_FRAME_DESCRIPTORS, encode};

/// Longest container or sandbox id.
const MAX_ID: usize = 128;

/// Whether `id` may name a container or a sandbox: 1 to 128 letters, digits, `-`, `_` and `.`, not starting with a dot,
/// so that it can be part of a file name and of a line of text.
pub fn is_valid_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_ID).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(allowed)
}
