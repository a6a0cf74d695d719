//! A writer of EROFS images, made for one pass: file data and inodes go out as they come, directories at the end.
//!
//! ```text
//! block 0          super block (written last), root inode
//! blocks 1…        file data, and between it runs of blocks with inodes, attributes and the tails of files
//! then             directory inodes with small directories inline, blocks of larger directories
//! then             shared extended attributes
//! ```
//! Inode numbers count 32-byte slots from the start of the file (the format's metadata start is block 0), so inodes may
//! lie anywhere.

mod directories;
mod directory;
mod format;
mod image;
mod metadata;
mod output;
mod reader;
mod xattr;

pub(crate) use directories::{Directory, DirectoryWriter, PlannedDirectories, Unsealed};
pub(crate) use directory::DirEntry;
pub(crate) use format::{
    S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, Timestamp, encode_device, file_type,
};
pub(crate) use image::{Attributes, ImageWriter};
pub(crate) use output::check_access;
pub(crate) use reader::{ImageReader, Node};
pub(crate) use xattr::{MAX_NAME, MAX_VALUE, suffix_length};
