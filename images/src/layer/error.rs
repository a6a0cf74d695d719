use std::fmt;
use std::io;

use super::compression::Compression;

/// Why a layer could not be turned into a layer file. Nothing of the output may be used after one of these.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The source of the compressed bytes failed (network, disk).
    #[error("reading the layer blob failed: {0}")]
    ReadBlob(#[source] io::Error),
    /// The layer file could not be written or read back: a full disk ends here.
    #[error("writing the layer file failed: {0}")]
    WriteFile(#[source] io::Error),
    /// The bytes are not those that the manifest names.
    #[error("the layer blob has digest {actual}, its manifest says {expected}")]
    DigestMismatch {
        /// What the manifest says.
        expected: String,
        /// What arrived.
        actual: String,
    },
    /// The blob ended before its size.
    #[error("the layer blob ended after {actual} bytes, its manifest says {expected}")]
    BlobTooShort {
        /// Bytes, by the manifest.
        expected: u64,
        /// Bytes that arrived.
        actual: u64,
    },
    /// The blob went on after its size; reading stopped there.
    #[error("the layer blob is longer than the {expected} bytes its manifest says")]
    BlobTooLong {
        /// Bytes, by the manifest.
        expected: u64,
    },
    /// The uncompressed bytes are not those that the image configuration names.
    #[error("the uncompressed layer has the digest {actual}, the image configuration says diffID {expected}")]
    DiffIdMismatch {
        /// What the image configuration says.
        expected: String,
        /// What the stream gave.
        actual: String,
    },
    /// A digest that is not `sha256:` or `sha512:` with as many lower-case hex digits as it needs.
    #[error("the digest {0:?} is not one that can be checked (sha256 or sha512 in lower-case hex)")]
    UnsupportedDigest(String),
    /// A media type that is no kind of layer known here.
    #[error("the layer's media type {0:?} is not supported (tar, tar+gzip and tar+zstd are)")]
    UnsupportedMediaType(String),
    /// The first bytes contradict the media type.
    #[error("the layer's media type {media_type:?} says {declared}, but its bytes are {found}")]
    CompressionMismatch {
        /// The media type in the manifest.
        media_type: String,
        /// What it means.
        declared: Compression,
        /// What the first bytes are.
        found: &'static str,
    },
    /// The compressed stream is damaged or ends early.
    #[error("decompressing the {compression} layer failed: {source}")]
    Decompress {
        /// How the layer is compressed.
        compression: Compression,
        /// What the decompressor said.
        source: io::Error,
    },
    /// A bound of [`Limits`](super::Limits) was reached.
    #[error("the layer exceeds a limit: {what} (at most {limit})")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// The stream ends inside the archive.
    #[error("the layer's archive is truncated at byte {offset}: {what}")]
    Truncated {
        /// Uncompressed bytes read before.
        offset: u64,
        /// What is missing.
        what: &'static str,
    },
    /// The stream is not a tar archive, or is one that readers would understand differently.
    #[error("the layer's archive is malformed at byte {offset}: {reason}")]
    Malformed {
        /// Uncompressed bytes read before.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// One entry of the archive is refused.
    #[error("the layer's entry \"{name}\" is refused: {problem}")]
    Entry {
        /// The entry's path, shortened and with control characters escaped.
        name: String,
        /// Why.
        problem: EntryProblem,
    },
}

impl LayerError {
    /// Whether damage on the way could have caused this, so that the digest, once known, is the better answer.
    pub(super) fn may_be_damage(&self) -> bool {
        matches!(
            self,
            Self::Decompress { .. } | Self::Truncated { .. } | Self::Malformed { .. } | Self::Entry { .. }
        )
    }

    pub(super) fn entry(name: &[u8], problem: EntryProblem) -> Self {
        Self::Entry { name: printable(name), problem }
    }
}

/// Why one entry is refused.
#[derive(Debug, thiserror::Error)]
pub enum EntryProblem {
    /// `..` anywhere in a path: it could climb out of the image's root.
    #[error("its path contains \"..\"")]
    ClimbsOut,
    /// No name at all, or a file in the place of the root.
    #[error("its path is empty or names the root")]
    EmptyPath,
    /// A path longer than the limit.
    #[error("its path is longer than {0} bytes")]
    PathTooLong(u64),
    /// A component that no file system takes.
    #[error("a component of its path is longer than 255 bytes")]
    NameTooLong,
    /// A NUL byte from a PAX record.
    #[error("its {0} contains a NUL byte")]
    Nul(&'static str),
    /// `.wh.` without a name, with `.` or `..`, or as a directory on the way.
    #[error("it is not a valid whiteout")]
    BadWhiteout,
    /// An earlier entry on the way is a file.
    #[error("a parent of its path is not a directory")]
    ParentNotDirectory,
    /// Symbolic links on the way that lead in a circle.
    #[error("too many symbolic links in its path")]
    SymlinkLoop,
    /// A hard link whose target is not in this layer.
    #[error("it is a hard link to \"{0}\", which is not in this layer")]
    LinkToNowhere(String),
    /// A hard link to a directory.
    #[error("it is a hard link to \"{0}\", which is a directory")]
    LinkToDirectory(String),
    /// A hard link whose target contains `..`.
    #[error("it is a hard link to \"{0}\", which climbs out of the image")]
    LinkClimbsOut(String),
    /// A hard link to its own path.
    #[error("it is a hard link to itself")]
    LinkToItself,
    /// A symbolic link without a target, or with one of 4096 bytes or more.
    #[error("its symbolic link target is empty or longer than 4095 bytes")]
    BadSymlinkTarget,
    /// An owner that Linux cannot have.
    #[error("its {0} {1} is not a valid id")]
    BadId(&'static str, i128),
    /// A device number that Linux cannot have.
    #[error("its device number {0}:{1} is out of range")]
    BadDevice(i64, i64),
    /// A type of entry that means nothing in an image.
    #[error("its type {0:?} is not supported")]
    UnsupportedType(char),
    /// A size on an entry that has no content: readers disagree whether data follows.
    #[error("it has a size of {0} bytes but its type has no content")]
    UnexpectedContent(u64),
    /// The PAX size and the header's contradict each other (CVE-2025-62518).
    #[error("its sizes disagree: {pax} bytes by the PAX record, {header} by the header")]
    SizesDisagree {
        /// PAX record.
        pax: u64,
        /// ustar field.
        header: u64,
    },
    /// Long names in both the PAX and the GNU manner, or twice.
    #[error("it has more than one extended header of the same meaning")]
    AmbiguousHeaders,
    /// A sparse map that is out of order, too long, or does not add up.
    #[error("its sparse map is invalid: {0}")]
    BadSparseMap(&'static str),
    /// An extended attribute that cannot be stored.
    #[error("its extended attribute \"{0}\" has a name longer than 255 bytes or a value that is too large")]
    XattrTooLarge(String),
    /// All extended attributes together are too large, or too many.
    #[error("its extended attributes exceed {0} bytes or 200 in number")]
    TooManyXattrs(u64),
}

/// Bytes from an image as text for a message: control characters escaped, at most 200 characters.
pub(super) fn printable(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(800)])
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .take(200)
        .collect();
    if bytes.len() > 200 { format!("{text}…") } else { text }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}
