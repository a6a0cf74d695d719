//! Layers against the kernel's EROFS, `fsck.erofs` and GNU tar.

mod archive;
mod conversion;
mod hostile;
mod memory;
mod mounted;
mod pipeline;
mod python_times;
mod random_stacks;
mod random_trees;
mod stack;
mod tar_split;
mod whiteouts;

use std::fs::File;
use std::io;

use super::{Converted, LayerError, Limits, RebuildError, Target, archive_size, convert, rebuild};

// Converts to an unnamed file that is then checked by fsck.erofs, and turned back.
fn converted(tar: &[u8]) -> (File, Converted) {
    let (file, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let target = Target { layer: &file, scratch: Some(&scratch) };
    let converted = convert(tar, target, &Limits::default()).unwrap();
    mounted::fsck(&file);
    let size = archive_size(&file, converted.size, converted.tar_split).unwrap();
    assert_eq!(size, tar.len() as u64);
    assert!(turned_back(&file, &converted).unwrap() == tar, "the layer does not lead back to its archive");
    (file, converted)
}

fn turned_back(file: &File, converted: &Converted) -> Result<Vec<u8>, RebuildError> {
    let mut tar = Vec::new();
    rebuild(file, converted.size, converted.tar_split, &mut tar).map(|()| tar)
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
