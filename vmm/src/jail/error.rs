use std::io;

use crate::protocol::DescriptorError;

/// Why a process could not be confined. It must end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Standard input is not the socket to hulld.
    #[error("standard input is not a socket: hulld starts this program, one for each pod")]
    NotStarted,
    /// The first frame could not be read.
    #[error("cannot read the first request: {0}")]
    Connection(io::Error),
    /// The first frame is something else.
    #[error("the first request is not the one that this program is started with")]
    NotBoot,
    /// The request lacks a part or has an impossible one.
    #[error("the first request is wrong: {0}")]
    Request(String),
    /// A descriptor is missing or is not what it should be.
    #[error("the first request is wrong: {0}")]
    Descriptor(#[from] DescriptorError),
    /// A step of the way in failed.
    #[error("cannot {doing}: {source}")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The other process of the birth ended before its part was done.
    #[error("the first process ended before it had let this one in")]
    Abandoned,
}

/// Says what was being done when a system call failed.
pub(crate) trait Doing<T> {
    /// The step, as in "cannot …".
    fn doing(self, doing: &'static str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, JailError> {
        self.map_err(|error| JailError::Step { doing, source: error.into() })
    }
}
