//! The file that says how a container ended.
#![no_main]

use hull_agent::protocol::exit_record::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = parse(data);
    // With the right checksum, to get at what is behind it.
    let sum = crc32fast::hash(data).to_le_bytes();
    let _ = parse(&[b"HULLEXIT", sum.as_slice(), data].concat());
});
