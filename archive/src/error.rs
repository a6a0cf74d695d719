use std::io;

/// Why a tree could not be written as an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The tree could not be read.
    #[error("cannot {action} {path} for the archive: {source}")]
    Tree {
        /// What was being done.
        action: &'static str,
        /// Path in the tree, with what is not printable replaced.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The archive's reader went away or has no room.
    #[error("cannot write the archive: {0}")]
    Output(#[source] io::Error),
    /// Nothing that reads archives would take the entry.
    #[error("{path} cannot be in an archive: {reason}")]
    Unrepresentable {
        /// Path in the tree, with what is not printable replaced.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More than the caller allows.
    #[error("the tree has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
}

/// For messages: what terminals and logs can show.
pub(crate) fn printable(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}
