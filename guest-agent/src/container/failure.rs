use std::fmt;
use std::io;

/// The step of a launch that failed. The numbers travel between the child and the agent of one and the same program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Cloning the process, joining namespaces and cgroup.
    Start = 1,
    /// Layers, overlay, the root itself.
    Rootfs = 2,
    /// A mount of the request or one of the defaults, or a masked or read-only path.
    Mount = 3,
    /// Device nodes.
    Device = 4,
    /// User and groups.
    User = 5,
    /// The working directory.
    WorkingDirectory = 6,
    /// Terminal and standard streams.
    Stdio = 7,
    /// Limits, capabilities, labels, seccomp.
    Privileges = 8,
    /// Looking up and starting the program.
    Execute = 9,
}

impl Stage {
    const ALL: [Self; 9] = [
        Self::Start,
        Self::Rootfs,
        Self::Mount,
        Self::Device,
        Self::User,
        Self::WorkingDirectory,
        Self::Stdio,
        Self::Privileges,
        Self::Execute,
    ];

    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| *stage as u8 == number)
    }
}

/// Why a process could not be started: a whole sentence for people, the step, and the errno behind it (0: none).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which step failed.
    pub stage: Stage,
    /// What was being done, to which thing, why it failed.
    pub message: String,
    /// The errno behind it, 0 if there is none.
    pub errno: i32,
}

impl Failure {
    pub(super) fn new(stage: Stage, message: impl Into<String>) -> Self {
        Self { stage, message: message.into(), errno: 0 }
    }

    /// A failed system call: "`doing`: reason".
    pub(super) fn system(stage: Stage, doing: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let errno = error.raw_os_error().unwrap_or(0);
        // The kernel's own words, without Rust's "(os error 2)": the number travels beside them.
        let reason = error.to_string();
        let reason = reason.split(" (os error").next().unwrap_or(&reason);
        Self { stage, message: format!("{doing}: {}", lowercase_first(reason)), errno }
    }
}

fn lowercase_first(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_lowercase().chain(characters).collect())
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when a system call failed.
pub(super) trait During<T> {
    fn during<D: fmt::Display>(self, stage: Stage, doing: impl FnOnce() -> D) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during<D: fmt::Display>(self, stage: Stage, doing: impl FnOnce() -> D) -> Result<T, Failure> {
        self.map_err(|error| Failure::system(stage, doing(), error))
    }
}
