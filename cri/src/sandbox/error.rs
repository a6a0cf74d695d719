//! What can go wrong between hulld and the place in which a pod runs.

use std::io;
use std::path::PathBuf;

use hull_agent::protocol::messages;

/// Why something could not be done to a pod's sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The agent refused or failed; its own sentence.
    #[error("{message}")]
    Refused {
        /// What kind of failure.
        code: messages::error::Code,
        /// The agent's sentence.
        message: String,
        /// The errno behind it, 0 if there is none.
        errno: i32,
    },
    /// The agent is gone, or the connection to it broke.
    #[error("the pod's agent is gone: {0}")]
    Lost(String),
    /// The agent did not answer in time.
    #[error("the pod's agent did not {0} in time")]
    Silent(&'static str),
    /// An answer of another kind than the question.
    #[error("the pod's agent gave an answer that does not fit {0}")]
    Unexpected(&'static str),
    /// The agent's program could not be started.
    #[error("cannot start the agent {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A request that cannot be put into a frame.
    #[error("the request does not fit the agent protocol: {0}")]
    Encode(String),
    /// Something on the host that the pod needs could not be opened or made.
    #[error("cannot {action} {path}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The image's layers could not be mounted.
    #[error("cannot mount the image's layers: {0}")]
    Layers(String),
    /// A host path that cannot be given to the pod in the way that was asked.
    #[error("{0}")]
    Source(String),
    /// The machine of a microVM pod.
    #[error("cannot {action} the pod's machine: {reason}")]
    Machine {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// What a pod or a container asks for cannot be in a machine, or no machine can be here.
    #[error("{0}")]
    Unsupported(String),
    /// A cgroup operation failed.
    #[error("cannot {action} the pod's cgroup: {reason}")]
    Cgroup {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl SandboxError {
    /// For `map_err`: wraps an error of the host's filesystem.
    pub(crate) fn host(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { action, path, source }
    }
}

impl SandboxError {
    /// For `map_err`: wraps whatever went wrong with a machine.
    pub(crate) fn machine<E: ToString>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Machine { action, reason: error.to_string() }
    }
}

/// Most characters of an agent's own words that are passed on: an agent in a guest says what it likes.
const WORDS: usize = 4096;

impl From<messages::Error> for SandboxError {
    fn from(error: messages::Error) -> Self {
        let words = error.message.chars().filter(|letter| !letter.is_control() || *letter == '\n');
        Self::Refused { code: error.code(), errno: error.errno, message: words.take(WORDS).collect() }
    }
}
