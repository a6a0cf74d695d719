//! The content of a PAX extended header, without the archive around it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| hull_images::layer::fuzzing::pax(data));
