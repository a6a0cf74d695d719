//! What can be wrong with a connection.

use std::io;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    /// The transport failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// A control frame is longer than hull takes.
    #[error("a control frame has {0} bytes; hull takes {max}", max = super::frame::MAX_CONTROL)]
    FrameTooLong(u32),
    /// A frame has not the length of its kind.
    #[error("a frame of type {0} is cut off")]
    CutOff(u16),
    /// Another version of SPDY.
    #[error("a frame is of version {0}; hull speaks 3")]
    Version(u16),
    /// A header block is longer than hull takes.
    #[error("headers have more than {max} bytes or too many names", max = super::headers::MAX_BLOCK)]
    HeadersTooLong,
    /// Headers that are none.
    #[error("headers cannot be read: {0}")]
    Headers(&'static str),
    /// Stream numbers of a client are odd and grow.
    #[error("stream {0} cannot be opened: a client's streams have odd numbers, each greater than the last")]
    StreamNumber(u32),
}
