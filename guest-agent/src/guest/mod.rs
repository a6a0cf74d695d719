//! What an agent in a guest has that one on a host has not: it is the machine's first process.
//!
//! It mounts what programs expect, gives the machine clock, entropy, name and network, maps ranges of the disks that
//! the machine was born with, keeps the pod's volumes, and speaks over vsock. Containers run exactly as on a host: a
//! slot of a request leads to a mount or a connection here, where it leads to a descriptor of the caller's there.

pub mod boot;
pub(crate) mod clock;
pub(crate) mod disks;
pub(crate) mod files;
pub(crate) mod hello;
pub(crate) mod machine;
pub(crate) mod measure;
mod netlink;
mod network;
pub(crate) mod place;
pub(crate) mod ranges;
pub(crate) mod slots;
pub(crate) mod streams;
pub(crate) mod volumes;

use std::io;

/// Port of the agent in the guest.
pub const AGENT_PORT: u32 = 1024;
/// Port of the host that takes what containers write.
pub const LOG_PORT: u32 = 1025;
/// Longest frame on a control connection, both ways.
pub const MAX_FRAME: usize = 1 << 20;

/// Why something in a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// What was asked for cannot be.
    #[error("{0}")]
    Invalid(String),
    /// It is not in the state that this needs.
    #[error("{0}")]
    Precondition(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// A system call failed.
    #[error("cannot {doing}: {error}")]
    System {
        /// What was being done.
        doing: String,
        /// Why it failed.
        error: io::Error,
    },
}

impl GuestError {
    fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }

    fn precondition(message: impl Into<String>) -> Self {
        Self::Precondition(message.into())
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self::NotFound(message.into())
    }

    fn system(doing: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Self::System { doing: doing.into(), error: error.into() }
    }
}

/// Says what was being done when a system call failed.
trait Doing<T> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, GuestError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, GuestError> {
        self.map_err(|error| GuestError::system(doing(), error))
    }
}
