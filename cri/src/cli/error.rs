//! What went wrong, and what to do next.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use thiserror::Error;
use tonic::{Code, Status};

use super::output::short_id;

/// Exit status when hull or hulld failed, so that it cannot be taken for that of a container; docker's choice too.
pub(super) const FAILED: u8 = 125;
/// Exit status when a command is there and cannot be executed; a shell's choice, as the next one.
const NOT_EXECUTABLE: u8 = 126;
/// Exit status when there is no such command.
const NO_SUCH_COMMAND: u8 = 127;

/// Why a command failed; printed to standard error.
#[derive(Debug, Error)]
pub(super) enum CliError {
    #[error("cannot connect to hulld at {}: {}\n{}", path.display(), reason(source), connect_hint(source))]
    Connect { path: PathBuf, source: io::Error },
    #[error("{}", failed_call(doing, status))]
    Call { doing: String, status: Box<Status> },
    #[error("{error}\n{hint}")]
    Hinted { error: Box<CliError>, hint: String },
    #[error("cannot {doing}: no answer within {}\nhulld may be busy: its log says more. A longer --timeout waits longer.",
            crate::config::value::format_duration(*after))]
    Timeout { doing: String, after: Duration },
    #[error("there is no {kind} \"{name}\"\n{hint}")]
    NotFound { kind: &'static str, name: String, hint: &'static str },
    #[error("\"{name}\" could be any of these {kind}s; give more of the id:\n{candidates}")]
    Ambiguous { kind: &'static str, name: String, candidates: String },
    #[error("cannot {doing}: {}", reason(source))]
    Local { doing: String, source: io::Error },
    #[error("{0}")]
    Refused(String),
}

impl CliError {
    pub(super) fn local(doing: impl Into<String>, source: io::Error) -> Self {
        CliError::Local { doing: doing.into(), source }
    }

    /// The code of a call that failed.
    pub(super) fn code(&self) -> Option<Code> {
        match self {
            CliError::Call { status, .. } => Some(status.code()),
            CliError::Hinted { error, .. } => error.code(),
            _ => None,
        }
    }

    /// Adds what to do next, where a call failed with this code.
    pub(super) fn hint(self, code: Code, hint: impl Into<String>) -> Self {
        match self {
            CliError::Call { .. } if self.code() == Some(code) => {
                CliError::Hinted { error: Box::new(self), hint: hint.into() }
            }
            other => other,
        }
    }

    /// The exit status of a command in a container that failed like this before it ran.
    pub(super) fn exit_status(&self) -> u8 {
        match self {
            CliError::Call { status, .. } => execution(status.message()).unwrap_or(FAILED),
            _ => FAILED,
        }
    }

    /// Says what went wrong on standard error and gives the exit status for it.
    pub(super) fn report(&self) -> ExitCode {
        // `hull … | head` is no failure to tell of.
        if !matches!(self, CliError::Local { source, .. } if source.kind() == io::ErrorKind::BrokenPipe) {
            eprintln!("hull: {self}");
        }
        ExitCode::from(self.exit_status())
    }
}

/// 126 or 127 if the agent's sentence tells of a command that could not be executed: `… exec: "NAME": REASON`.
fn execution(sentence: &str) -> Option<u8> {
    let (_, reason) = sentence.split_once(": exec: \"").or_else(|| sentence.split_once(": exec /"))?;
    let missing =
        reason.contains("executable file not found") || reason.ends_with("no such file or directory");
    Some(if missing { NO_SUCH_COMMAND } else { NOT_EXECUTABLE })
}

/// The kernel's words without Rust's number for them.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).into()
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
        sentence if sentence.starts_with("cannot ") => with_short_ids(innermost(sentence)),
        _ => with_short_ids(&format!("cannot {doing}: {}", said(status))),
    }
}

/// hulld quotes the agent, whose sentence names the same container again: the last one of these says it all.
fn innermost(sentence: &str) -> &str {
    match sentence.rsplit_once(": cannot ") {
        Some((outer, inner)) if words(inner).any(|word| is_id(word) && outer.contains(word)) => {
            &sentence[sentence.len() - inner.len() - "cannot ".len()..]
        }
        _ => sentence,
    }
}

/// Ids as tables show them; they can be used like that.
fn with_short_ids(sentence: &str) -> String {
    let mut text = sentence.to_owned();
    for word in words(sentence).filter(|word| is_id(word)) {
        // A digest is given in full.
        if !sentence.contains(&format!("sha256:{word}")) {
            text = text.replace(word, short_id(word));
        }
    }
    text
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric())
}

fn is_id(word: &str) -> bool {
    word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
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
    fn a_quoted_sentence_is_said_once_and_ids_are_short() {
        let id = "9ad30674199f41240a757ce7df421dd7703ac9d5bfdd6f8f99442092d47e0fd1";
        let said = format!("cannot start the container {id}: cannot start container {id}: the disk is full");
        assert_eq!(shown(Status::unknown(said)), "cannot start container 9ad30674199f4: the disk is full");
        let other = "cannot start the container a: cannot open /srv: not found";
        assert_eq!(shown(Status::unknown(other)), other);
        let digest = format!("cannot find sha256:{id}");
        assert_eq!(shown(Status::unknown(&digest)), digest, "a digest is given in full");
    }

    #[test]
    fn what_cannot_be_executed_has_a_shells_exit_status() {
        let status = |message: &str| {
            CliError::Call { doing: "x".into(), status: Box::new(Status::unknown(message)) }.exit_status()
        };
        for (reason, wanted) in [
            ("exec: \"nosuch\": executable file not found in $PATH", 127),
            ("exec: \"/a\": stat /a: no such file or directory", 127),
            ("exec: \"/etc/passwd\": permission denied", 126),
            ("exec /bin/x: exec format error", 126),
            ("exec /x: no such file or directory (the file is there: its interpreter is not)", 126),
            ("cannot use the working directory /x: no such file or directory", 125),
        ] {
            assert_eq!(status(&format!("cannot start container c: {reason}")), wanted, "{reason}");
        }
    }

    #[test]
    fn a_missing_socket_comes_with_a_way_on() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = CliError::Connect { path: "/run/hull/hull.sock".into(), source }.to_string();
        assert!(error.contains("/run/hull/hull.sock") && error.contains("Is hulld running?"), "{error}");
    }
}
