//! A layer's blob, compressed with gzip.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| hull_fuzz::ingest(data, "application/vnd.oci.image.layer.v1.tar+gzip"));
