//! What hulld reads from an agent, and an agent from whoever connects.
#![no_main]

use std::fs::File;

use hull_agent::protocol::{FrameReader, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    let mut reader = FrameReader::with_limit(1 << 16);
    // Pieces of a length that the input decides, with a descriptor at the first ones.
    let length = usize::from(first >> 2) + 1;
    for (number, piece) in bytes.chunks(length).enumerate() {
        let has_descriptor = number < usize::from(first & 3);
        let fds = has_descriptor.then(|| File::open("/dev/null").unwrap().into()).into_iter().collect();
        reader.push(piece, fds);
        loop {
            match reader.next() {
                Ok(Some(frame)) => {
                    encode(&frame.message).expect("what was decoded can be encoded");
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
