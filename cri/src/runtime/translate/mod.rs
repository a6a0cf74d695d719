//! From CRI's requests and an image's configuration to the agent's protocol. Pure functions: what must be read from
//! the host (device numbers, seccomp programs) is read by the callers and handed in.

pub mod container;
pub mod devices;
#[cfg(test)]
mod effort;
pub mod etc;
pub mod mounts;
pub mod pod;
pub mod process;
pub mod profile;
pub mod resources;
pub mod signal;
pub mod user;
pub mod user_namespace;

use crate::runtime::Error;

/// Shorthand for what all translations answer to a request that cannot be right.
pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::Invalid(message.into())
}

/// Values that end up in files or arguments of the kernel's hold no line breaks and no zero bytes.
pub(crate) fn check_text(what: &str, text: &str) -> Result<(), Error> {
    if text.chars().any(char::is_control) {
        return Err(invalid(format!("{what} {text:?} contains a control character")));
    }
    Ok(())
}
