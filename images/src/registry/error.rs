use std::path::PathBuf;

use crate::digest::Digest;
use crate::store::PullErrorKind;

use super::credentials::CredentialsError;

/// Why a registry did not give what was asked. Texts that come from the registry are shortened and printable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// `hosts.toml` or a certificate it names cannot be used.
    #[error("registry configuration {path}: {reason}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line where the parser knows it.
        reason: String,
    },
    /// The credentials cannot be sent.
    #[error("credentials: {0}")]
    Credentials(#[from] CredentialsError),
    /// No connection, or it broke, after all retries.
    #[error("{host}: {reason}")]
    Unreachable {
        /// Registry host.
        host: String,
        /// The chain of causes.
        reason: String,
    },
    /// The registry answered with an error status.
    #[error("{host} answered {status} for {what}{detail}")]
    Status {
        /// Registry host.
        host: String,
        /// HTTP status code.
        status: u16,
        /// What was asked for.
        what: String,
        /// The registry's own words with a leading separator, or empty.
        detail: String,
    },
    /// Authentication failed at the registry or at its token service.
    #[error("{host}: authentication failed: {reason}")]
    Unauthorized {
        /// Registry host.
        host: String,
        /// Why.
        reason: String,
    },
    /// More bytes than announced or allowed.
    #[error("{host} sent more than {limit} bytes for {what}")]
    TooLarge {
        /// Registry host.
        host: String,
        /// What was asked for.
        what: String,
        /// The bound in bytes.
        limit: u64,
    },
    /// The content is not what its digest promises.
    #[error("{host} sent {what} with digest {actual}, expected {expected}")]
    Digest {
        /// Registry host.
        host: String,
        /// What was asked for.
        what: String,
        /// Digest of what was sent.
        actual: Digest,
        /// Digest that was asked for.
        expected: Digest,
    },
    /// A manifest or index that does not follow its specification.
    #[error("{what}: {reason}")]
    Manifest {
        /// Which document.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The index has nothing for this machine.
    #[error("the image has no variant for {wanted} (it has {available})")]
    Platform {
        /// This machine's platform.
        wanted: String,
        /// What the index offers.
        available: String,
    },
    /// An answer that breaks the protocol (redirect loops, wrong ranges, unreadable tokens).
    #[error("{host}: {reason}")]
    Protocol {
        /// Registry host.
        host: String,
        /// What is wrong.
        reason: String,
    },
}

impl RegistryError {
    /// The kind of this failure.
    pub fn kind(&self) -> PullErrorKind {
        match self {
            RegistryError::Status { status: 404, .. } => PullErrorKind::NotFound,
            RegistryError::Status { status: 401 | 403, .. } | RegistryError::Unauthorized { .. } => {
                PullErrorKind::Unauthorized
            }
            RegistryError::Status { .. }
            | RegistryError::Unreachable { .. }
            | RegistryError::Protocol { .. } => PullErrorKind::Unavailable,
            RegistryError::Configuration { .. } => PullErrorKind::Storage,
            RegistryError::Credentials(_) => PullErrorKind::Unauthorized,
            RegistryError::TooLarge { .. }
            | RegistryError::Digest { .. }
            | RegistryError::Manifest { .. }
            | RegistryError::Platform { .. } => PullErrorKind::Invalid,
        }
    }
}
