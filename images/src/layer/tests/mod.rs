//! Layers against the kernel's EROFS, `fsck.erofs` and GNU tar.

mod archive;
mod conversion;
mod hostile;
mod memory;
mod mounted;
mod pipeline;
mod random_trees;
mod stack;
mod whiteouts;

use std::fs::File;
use std::io;

use super::{Converted, LayerError, Limits, convert};

// Converts to an unnamed file that is then checked by fsck.erofs.
fn converted(tar: &[u8]) -> (File, Converted) {
    let file = tempfile::tempfile().unwrap();
    let converted = convert(tar, &file, &Limits::default()).unwrap();
    mounted::fsck(&file);
    (file, converted)
}

fn refused(tar: &[u8]) -> LayerError {
    refused_with(tar, &Limits::default())
}

fn refused_with(tar: impl io::Read, limits: &Limits) -> LayerError {
    let file = tempfile::tempfile().unwrap();
    let error = convert(tar, &file, limits).unwrap_err();
    // Nothing that is refused can be mounted: the super block comes last.
    let mut start = vec![0; 4096];
    let read = std::os::unix::fs::FileExt::read_at(&file, &mut start, 0).unwrap();
    assert!(start[..read].iter().all(|byte| *byte == 0), "a refused layer has a super block");
    error
}
