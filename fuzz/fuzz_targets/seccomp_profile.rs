//! A seccomp profile of a file: JSON to a program.
#![no_main]

use hull_cri::security::seccomp::compile_text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = compile_text(data, 0xa804_25fb);
});
