//! WebSocket (RFC 6455), as far as channels of bytes need it: no extensions, no text but base64.

mod accept;
mod channels;
mod frame;
mod tunnel;

pub use accept::{accept_key, base64};
pub use channels::{ChannelWriter, Channels, Coding, Role};
pub use tunnel::tunnel;
