//! Records of pods and containers in hulld's state directory.
#![no_main]

use hull_cri::store::frame::{decode, decode_last, encode};
use hull_cri::store::record::{ContainerRecord, SandboxRecord};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = decode::<SandboxRecord>(data);
    // With the right header, to get at what is behind it.
    let mut framed = b"HULL\x01\0\0\0".to_vec();
    framed.extend_from_slice(&(data.len() as u32).to_le_bytes());
    framed.extend_from_slice(&crc32fast::hash(data).to_le_bytes());
    framed.extend_from_slice(data);
    if let Ok(record) = decode::<SandboxRecord>(&framed) {
        let again = encode(&record).expect("what was decoded can be encoded");
        assert_eq!(decode::<SandboxRecord>(&again).as_ref(), Ok(&record));
        // Behind it what was added: a record that counts, or garbage that does not.
        if let Ok((last, end)) = decode_last::<SandboxRecord>(&[&again[..], data].concat()) {
            assert!(end > again.len() || (end == again.len() && last == record));
        }
    }
    let _ = decode::<ContainerRecord>(&framed);
});
