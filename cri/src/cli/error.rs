//! What went wrong, and what to do next.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use thiserror::Error;
use tonic::{Code, Status};

/// Exit status when hull or hulld failed, so that it cannot be taken for that of a container; docker's choice too.
pub(super) const FAILED: u8 = 125;

/// Why a command failed; printed to standard error.
#[derive(Debug, Error)]
pub(super) enum CliError {
    #[error("cannot connect to hulld at {}: {source}\n{}", path.display(), connect_hint(source))]
    Connect { path: PathBuf, source: io::Error },
    #[error("{}", failed_call(doing, status))]
    Call { doing: String, status: Box<Status> },
    #[error("cannot {doing}: no answer within {}\nhulld may be busy: its log says more. A longer --timeout waits longer.",
            crate::config::value::format_duration(*after))]
    Timeout { doing: String, after: Duration },
    #[error("there is no {kind} \"{name}\"\n{hint}")]
    NotFound { kind: &'static str, name: String, hint: &'static str },
    #[error("\"{name}\" could be any of these {kind}s; give more of the id:\n{candidates}")]
    Ambiguous { kind: &'static str, name: String, candidates: String },
    #[error("cannot {doing}: {source}")]
    Local { doing: String, source: io::Error },
    #[error("{0}")]
    Refused(String),
}

impl CliError {
    pub(super) fn local(doing: impl Into<String>, source: io::Error) -> Self {
        CliError::Local { doing: doing.into(), source }
    }

    /// Says what went wrong on standard error and gives the exit status for it.
    pub(super) fn report(&self) -> ExitCode {
        // `hull … | head` is no failure to tell of.
        if !matches!(self, CliError::Local { source, .. } if source.kind() == io::ErrorKind::BrokenPipe) {
            eprintln!("hull: {self}");
        }
        ExitCode::from(FAILED)
    }
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "Is hulld running? Start it as root, or name its socket with --socket or HULL_SOCKET."
        }
        io::ErrorKind::PermissionDenied => "Only root and the socket's group may connect. Try again as root.",
        io::ErrorKind::ConnectionRefused => "Nobody answers: hulld has ended. Start it again; pods are kept.",
        _ => "Is this the socket of hulld?",
    }
}

/// hulld's errors are whole sentences that name what was being done; saying it once is enough.
fn failed_call(doing: &str, status: &Status) -> String {
    match status.message() {
        sentence if sentence.starts_with("cannot ") => sentence.into(),
        _ => format!("cannot {doing}: {}", said(status)),
    }
}

fn said(status: &Status) -> String {
    match status.code() {
        Code::Unimplemented if status.message().is_empty() => "this daemon does not know the call".into(),
        Code::Unavailable => format!("the connection to hulld broke ({})", status.message()),
        code if status.message().is_empty() => code.description().into(),
        _ => status.message().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(status: Status) -> String {
        CliError::Call { doing: "stop the pod web".into(), status: Box::new(status) }.to_string()
    }

    #[test]
    fn an_error_says_once_what_was_being_done() {
        assert_eq!(shown(Status::internal("disk full")), "cannot stop the pod web: disk full");
        assert_eq!(shown(Status::internal("cannot stop web: disk full")), "cannot stop web: disk full");
        assert!(
            shown(Status::unavailable("broken pipe")).contains("the connection to hulld broke (broken pipe)")
        );
        assert!(shown(Status::unimplemented("")).contains("this daemon does not know the call"));
    }

    #[test]
    fn a_missing_socket_comes_with_a_way_on() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = CliError::Connect { path: "/run/hull/hull.sock".into(), source }.to_string();
        assert!(error.contains("/run/hull/hull.sock") && error.contains("Is hulld running?"), "{error}");
    }
}
