//! Seccomp profiles: from a name or a file to the BPF program that hull-agent installs.
//!
//! Compiling takes milliseconds and happens once: programs are kept by the profile's content and the capabilities that
//! it depends on. The agent gets bytes and needs no library.

mod cache;
mod compile;
mod default;
mod instruction;
mod json;
mod optimize;
mod profile;
mod prologue;
mod recent;

#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use cache::{Cache, Key};
use json::Circumstances;

/// Largest profile file; Docker's own has 14 KiB.
const MAX_FILE: u64 = 1 << 20;

/// Which profile a container has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile<'a> {
    /// hull's own, equivalent to the default of containerd and Docker.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A file on the node, in the JSON format of OCI or Docker.
    Localhost(&'a Path),
}

/// A compiled profile, for the agent's `Process.seccomp` and `seccomp_flags`.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// An array of struct sock_filter, in native byte order, of at most 4096 instructions.
    pub bpf: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_* for seccomp(2).
    pub flags: u32,
}

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The profile's file cannot be read.
    #[error("cannot read the seccomp profile {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something about the file's own profile, with its path.
    #[error("the seccomp profile {path} cannot be used: {source}")]
    InFile {
        /// The file.
        path: String,
        /// What is wrong.
        source: Box<SeccompError>,
    },
    /// The file is not a profile.
    #[error("it is not a valid profile: {0}")]
    Format(String),
    /// The profile wants another process to decide.
    #[error("it uses SCMP_ACT_NOTIFY or a listener, which hull does not support")]
    Notify,
    /// libseccomp refused a part of it.
    #[error("libseccomp could not {action}: {reason}")]
    Compile {
        /// What was tried.
        action: String,
        /// Its answer.
        reason: String,
    },
    /// The kernel takes 4096 instructions.
    #[error("it compiles to {0} instructions; the kernel takes at most 4096")]
    TooLong(usize),
    /// No memory file for the program.
    #[error("cannot hold the compiled program in memory: {0}")]
    Memory(io::Error),
}

/// The program for a container with `caps` as its bounding set; `None` for an unconfined one. Blocks for a few
/// milliseconds the first time and, for a file, as long as reading it takes.
pub fn compile(profile: Profile<'_>, caps: u64) -> Result<Option<Arc<Program>>, SeccompError> {
    match profile {
        Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault => runtime_default(caps).map(Some),
        Profile::Localhost(path) => {
            let in_file =
                |source| SeccompError::InFile { path: path.display().to_string(), source: Box::new(source) };
            let text = Arc::from(read(path)?);
            of_file(&text, caps).map(Some).map_err(in_file)
        }
    }
}

/// Reads and compiles the text of a profile, past the cache. Public for its fuzz target.
#[doc(hidden)]
pub fn compile_text(text: &[u8], caps: u64) -> Result<Program, SeccompError> {
    compile::compile(&json::parse(text, &Circumstances::here(caps))?)
}

static CACHE: Cache = Cache::new();

fn runtime_default(caps: u64) -> Result<Arc<Program>, SeccompError> {
    // Capabilities that change nothing must not cost another compilation.
    let caps = caps & default::relevant_capabilities();
    CACHE.get_or_make(Key::RuntimeDefault { caps }, || compile::compile(&default::profile(caps)))
}

fn of_file(text: &Arc<[u8]>, caps: u64) -> Result<Arc<Program>, SeccompError> {
    CACHE.get_or_make(Key::File { text: text.clone(), caps }, || compile_text(text, caps))
}

fn read(path: &Path) -> Result<Vec<u8>, SeccompError> {
    let fail = |source| SeccompError::Read { path: path.display().to_string(), source };
    if !path.is_absolute() {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute")));
    }
    // Not to wait for ever at a pipe.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(fail)?;
    if !file.metadata().map_err(fail)?.is_file() {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(fail)?;
    if text.len() as u64 > MAX_FILE {
        return Err(fail(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB")));
    }
    Ok(text)
}
