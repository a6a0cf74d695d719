//! What can go wrong with a cgroup, in sentences for people.

use std::io;

/// Why an operation on cgroups failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of a cgroup could not be used.
    #[error("cannot {action} of cgroup {cgroup}: {source}")]
    Io {
        /// What was tried, e.g. `write "max" to memory.max`.
        action: String,
        /// Path of the cgroup below the hierarchy's root.
        cgroup: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The hierarchies could not be found or opened.
    #[error("cannot use the cgroup hierarchy at {mount_point}: {source}")]
    Hierarchy {
        /// Where it is mounted.
        mount_point: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The mount table names no usable hierarchy, or could not be read.
    #[error("cannot find the cgroup hierarchies of this machine: {0}")]
    Discover(String),
    /// The name of a leaf, or a level of a parent path, is not one that a cgroup may have.
    #[error("{name:?} cannot be a cgroup's name: {reason}")]
    Name {
        /// The name as it came, shortened if it is very long.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A limit was asked for whose controller this machine does not offer there.
    #[error(
        "cannot set {limit} of cgroup {cgroup}: the machine offers no {controller} controller there (missing from \
         the kernel, from its command line, or from cgroup.subtree_control of a parent)"
    )]
    MissingController {
        /// e.g. `memory`.
        controller: String,
        /// What was to be set, e.g. `memory.max`.
        limit: String,
        /// Path of the cgroup below the hierarchy's root.
        cgroup: String,
    },
    /// A limit has a value that means nothing.
    #[error("cannot set {limit}: {reason}")]
    InvalidLimit {
        /// Which limit.
        limit: String,
        /// What is wrong.
        reason: String,
    },
    /// On v2 a cgroup with processes of its own cannot hand controllers to its children.
    #[error(
        "cannot enable controllers below cgroup {cgroup}: processes live in it directly, which cgroup v2 forbids for \
         a parent; move them into a child of their own"
    )]
    InternalProcesses {
        /// Path of the cgroup below the hierarchy's root.
        cgroup: String,
    },
    /// A device rule is malformed.
    #[error(transparent)]
    DeviceRule(#[from] super::DeviceRuleError),
    /// Processes stayed alive in it, or it could not be emptied in time.
    #[error("cannot remove cgroup {cgroup}: it is still in use after {waited_ms} ms")]
    Busy {
        /// Path of the cgroup below the hierarchy's root.
        cgroup: String,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
}
