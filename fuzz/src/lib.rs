//! What fuzz targets have in common.

/// The driver's side of virtio queues.
pub mod ring;
/// A root for threads that serve volumes.
pub mod volumes;

use hull_images::Digest;
use hull_images::layer::{BlobExpectation, Limits, ingest as ingest_blob};

/// Small enough that no input takes long.
pub fn limits() -> Limits {
    Limits {
        max_uncompressed: 4 << 20,
        max_content: 16 << 20,
        max_entries: 10_000,
        max_zstd_window_log: 20,
        ..Limits::default()
    }
}

/// The archive with the checksums that its headers should have.
pub fn sealed(archive: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + 512) {
        if header.iter().all(|byte| *byte == 0) {
            at += 512;
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = str::from_utf8(&header[124..136]).unwrap_or_default().trim_matches(['\0', ' ']);
        let size = usize::from_str_radix(digits, 8).unwrap_or(0).min(1 << 30);
        at += 512 + size.next_multiple_of(512);
    }
    archive
}

/// Takes a blob in as a pull does. The diffID never fits, which is found out last.
pub fn ingest(blob: &[u8], media_type: &str) {
    let expected = BlobExpectation {
        digest: Digest::sha256(blob),
        size: blob.len() as u64,
        diff_id: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
        media_type: media_type.to_owned(),
    };
    let out = tempfile::tempfile_in("/dev/shm").unwrap();
    ingest_blob(blob, &expected, &out, &limits()).unwrap_err();
}
