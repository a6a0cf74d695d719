//! A layer's archive, uncompressed.
#![no_main]

use hull_fuzz::{limits, sealed};
use hull_images::layer::convert;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    // With right checksums most of the time: else hardly any input gets past the first header.
    let archive = if first & 3 == 0 { bytes.to_vec() } else { sealed(bytes) };
    let out = tempfile::tempfile_in("/dev/shm").unwrap();
    if let Ok(layer) = convert(archive.as_slice(), &out, &limits()) {
        assert_eq!(out.metadata().unwrap().len(), layer.size);
        hull_images::layer::fuzzing::read_back(out, &layer);
    }
});
