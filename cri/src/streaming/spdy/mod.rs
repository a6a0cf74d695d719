//! SPDY/3.1 as kubectl, kubelet and crictl speak it: the server's side of one connection.
//!
//! Flow control is left out on purpose: Go's implementation neither sends nor honours WINDOW_UPDATE, so whoever waits
//! for one hangs after 64 KiB. What holds a sender back is TCP: a stream whose reader is slow stops the reading of its
//! connection, and with it the connection's other streams. Memory is bounded by [`connection::QUEUE`] for each stream.

mod connection;
mod dictionary;
pub mod error;
mod frame;
mod headers;

pub use connection::{Connection, Stream, StreamWriter, Transport, start};
pub use error::SpdyError;
pub use frame::Reset;
pub use headers::Headers;
