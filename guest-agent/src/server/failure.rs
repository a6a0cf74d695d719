//! Why a request was refused, as the protocol says it.

use std::fmt::Display;
use std::io;

use crate::cgroup::CgroupError;
use crate::container::LaunchError;
use crate::protocol::messages::{Error, error::Code, response::Outcome};

/// Longest message; what it quotes may come from an image.
const MAX_MESSAGE: usize = 4 << 10;

/// A refused request.
#[derive(Debug)]
pub(super) struct CallError(Error);

impl CallError {
    fn new(code: Code, message: impl Into<String>, errno: i32) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        Self(Error { code: code.into(), message, errno })
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message, 0)
    }

    pub(super) fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message, 0)
    }

    pub(super) fn unknown_call() -> Self {
        Self::new(Code::UnknownCall, "this agent does not know the call: it is older than its caller", 0)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message, 0)
    }

    pub(super) fn only_in_a_guest(what: impl Display) -> Self {
        Self::invalid(format!("{what} is for an agent in a guest, and this one runs on a host"))
    }

    pub(super) fn no_container(id: &str) -> Self {
        let id: String = id.chars().take(128).collect();
        Self::new(Code::NotFound, format!("the pod has no container {id:?}"), 0)
    }

    pub(super) fn not_running(id: &str) -> Self {
        Self::precondition(format!("container {id} is not running"))
    }

    /// The request names a slot that it does not have.
    pub(super) fn no_slot(what: &str, slot: u32) -> Self {
        Self::invalid(format!("the request names slot {slot} as {what}, and has no such slot"))
    }

    /// A system call failed while doing this.
    pub(super) fn system(doing: impl Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::new(Code::Internal, format!("{doing}: {error}"), error.raw_os_error().unwrap_or(0))
    }

    /// Adds what was being done.
    pub(super) fn during(self, doing: impl Display) -> Self {
        let Error { code, message, errno } = self.0;
        Self::new(Code::try_from(code).unwrap_or(Code::Internal), format!("{doing}: {message}"), errno)
    }

    /// The sentence.
    pub(super) fn message(&self) -> &str {
        &self.0.message
    }

    pub(super) fn into_outcome(self) -> Outcome {
        Outcome::Error(self.0)
    }
}

impl From<CgroupError> for CallError {
    fn from(error: CgroupError) -> Self {
        let (code, errno) = match &error {
            CgroupError::Io { source, .. } | CgroupError::Hierarchy { source, .. } => {
                (Code::Internal, source.raw_os_error().unwrap_or(0))
            }
            CgroupError::Name { .. }
            | CgroupError::MissingController { .. }
            | CgroupError::InvalidLimit { .. }
            | CgroupError::DeviceRule(_) => (Code::Invalid, 0),
            _ => (Code::Internal, 0),
        };
        Self::new(code, error.to_string(), errno)
    }
}

impl From<LaunchError> for CallError {
    fn from(error: LaunchError) -> Self {
        let code = if error.is_invalid_request() { Code::Invalid } else { Code::Internal };
        match error {
            LaunchError::Cgroup(error) => error.into(),
            other => Self::new(code, other.to_string(), other.errno()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_bounded_whatever_it_quotes() {
        let error = CallError::invalid("é".repeat(10_000));
        assert!(error.message().len() <= MAX_MESSAGE + '…'.len_utf8());
        assert!(CallError::no_container(&"x".repeat(1 << 20)).message().len() < 300);
    }
}
