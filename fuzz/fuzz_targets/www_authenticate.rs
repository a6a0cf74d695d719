//! The header with which a registry asks for authentication.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| hull_images::fuzzing::challenge(text));
