//! Entrances for the fuzz targets; no API.

use std::fs::File;

use super::convert::Converted;
use super::erofs::ImageReader;
use super::stack::{StackLayer, overlaid};

/// The content of a PAX extended header.
pub fn pax(content: &[u8]) {
    let _ = super::tar::read_extended_header(content);
}

/// Reads a converted layer's directories: whatever the archive was, they must be there.
#[expect(clippy::expect_used, reason = "for fuzzing only: a failure is to be seen")]
pub fn read_back(file: File, layer: &Converted) {
    let lower = file.try_clone().and_then(ImageReader::new).expect("a super block");
    let upper = ImageReader::new(file).expect("a super block");
    for path in &layer.implied_directories {
        let names = path.split(|byte| *byte == b'/');
        let found = names.fold(upper.root().expect("a root"), |directory, name| {
            upper.lookup(&directory, name).expect("a sound directory").expect("the implied directory")
        });
        assert!(found.is_directory());
    }
    let layers = [
        StackLayer { image: lower, implied: Vec::new() },
        StackLayer { image: upper, implied: layer.implied_directories.clone() },
    ];
    overlaid(&layers).expect("sound layers");
}
