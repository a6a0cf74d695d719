//! Indexes, and the choice of an image for a machine.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| hull_images::fuzzing::index(data));
