//! One error for all calls, and the one place in which errors become gRPC codes.

use hull_agent::protocol::messages::error::Code as AgentCode;
use hull_images::PullError;
use hull_images::policy::PolicyError;
use hull_images::store::PullErrorKind;
use hull_network::NetworkError;
use tonic::{Code, Status};

use crate::sandbox::SandboxError;
use crate::security::selinux::SELinuxError;
use crate::store::StoreError;

/// Why a call failed. The message is a sentence for people; the variant decides the gRPC code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such pod, container or image.
    #[error("{what} {id:?} does not exist")]
    NotFound {
        /// "pod sandbox", "container" or "image".
        what: &'static str,
        /// As it was asked for.
        id: String,
    },
    /// The request itself cannot be right.
    #[error("{0}")]
    Invalid(String),
    /// The name belongs to something that differs from what is asked for.
    #[error("{0}")]
    AlreadyExists(String),
    /// It cannot be done in the present state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// It took longer than the caller allowed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// hull cannot do this (yet).
    #[error("{0}")]
    Unimplemented(String),
    /// As many as there may be are there.
    #[error("{0}")]
    ResourceExhausted(String),
    /// It may work later.
    #[error("{0}")]
    Unavailable(String),
    /// Something failed that should not.
    #[error("{0}")]
    Internal(String),
    /// A pod's sandbox failed or refused.
    #[error("{doing}: {source}")]
    Sandbox {
        /// What was being done, to which thing.
        doing: String,
        /// Why it failed.
        source: SandboxError,
    },
    /// A record could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The pod's network failed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The image store failed.
    #[error(transparent)]
    Images(#[from] hull_images::StoreError),
    /// The image policy does not accept what is to be pulled. kubelet knows the first word and shows it as the reason.
    #[error("SignatureValidationFailed: {0}")]
    Policy(PolicyError),
    /// A pull failed.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// Another caller's attempt at the same thing failed, and this one had joined it.
    #[error("{0}")]
    Joined(String, Code),
}

/// What every call returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Labels that cannot be are the request's fault, a kernel that does not answer is nobody's.
    pub(super) fn selinux(error: SELinuxError) -> Self {
        match error {
            SELinuxError::Ask { .. } => Self::Internal(error.to_string()),
            SELinuxError::Exhausted => Self::Unavailable(error.to_string()),
            _ => Self::Invalid(error.to_string()),
        }
    }

    /// The gRPC code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::FailedPrecondition(_) => Code::FailedPrecondition,
            Self::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::ResourceExhausted(_) => Code::ResourceExhausted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Internal(_) | Self::Store(_) => Code::Internal,
            Self::Sandbox { source, .. } => sandbox_code(source),
            Self::Network(error) => network_code(error),
            Self::Images(error) => image_code(error),
            // Of an unknown error kubelet shows the message alone, and looks for words that it knows in it.
            Self::Policy(_) => Code::Unknown,
            Self::Pull(error) => pull_code(error),
            Self::Joined(_, code) => *code,
        }
    }

    /// For `map_err` on what a sandbox answers: `doing` completes "cannot …".
    pub(crate) fn sandbox(doing: impl Into<String>) -> impl FnOnce(SandboxError) -> Self {
        let doing = doing.into();
        move |source| Self::Sandbox { doing, source }
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::Refused { code, .. } => match code {
            AgentCode::NotFound => Code::NotFound,
            // As other runtimes answer for a container that cannot start: kubelet shows the message.
            AgentCode::Invalid => Code::Unknown,
            AgentCode::FailedPrecondition => Code::FailedPrecondition,
            AgentCode::UnknownCall => Code::Unimplemented,
            AgentCode::Internal => Code::Internal,
        },
        SandboxError::Lost(_) => Code::Unavailable,
        SandboxError::Silent(_) => Code::DeadlineExceeded,
        SandboxError::Source(_) | SandboxError::Encode(_) => Code::InvalidArgument,
        SandboxError::Unsupported(_) => Code::FailedPrecondition,
        SandboxError::Host { .. } | SandboxError::Layers(_) => Code::Unknown,
        _ => Code::Internal,
    }
}

fn network_code(error: &NetworkError) -> Code {
    match error {
        NetworkError::NotReady(_) => Code::Unavailable,
        NetworkError::Invalid { .. } => Code::InvalidArgument,
        NetworkError::NoAddress { .. } => Code::ResourceExhausted,
        NetworkError::PortInUse { .. } => Code::FailedPrecondition,
        _ => Code::Unknown,
    }
}

fn image_code(error: &hull_images::StoreError) -> Code {
    match error {
        hull_images::StoreError::Ambiguous(_) => Code::InvalidArgument,
        error if error.is_out_of_space() => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

fn pull_code(error: &PullError) -> Code {
    match error.kind() {
        PullErrorKind::NotFound => Code::NotFound,
        PullErrorKind::Unauthorized => Code::Unauthenticated,
        PullErrorKind::Unavailable => Code::Unavailable,
        PullErrorKind::Invalid => Code::Unknown,
        PullErrorKind::OutOfSpace => Code::ResourceExhausted,
        PullErrorKind::Storage => Code::Internal,
        PullErrorKind::Cancelled => Code::Cancelled,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
