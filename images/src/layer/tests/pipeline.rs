//! Blobs: compression, digests and sizes.

use std::fs::File;
use std::io::{self, Read, Write};

use super::archive::Archive;
use super::mounted::{fsck, snapshot, with_mounted};
use crate::digest::{Algorithm, Digest};
use crate::layer::{BlobExpectation, Converted, LayerError, Limits, ingest};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn archive() -> Vec<u8> {
    let noise: Vec<u8> = (0..1_500_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    Archive::new().file("a", "text").file("noise", noise).directory("d").end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}

fn expectation(blob: &[u8], tar: &[u8], media_type: &str) -> BlobExpectation {
    BlobExpectation {
        digest: Digest::sha256(blob),
        size: blob.len() as u64,
        diff_id: Digest::sha256(tar).to_string().parse().unwrap(),
        media_type: media_type.to_owned(),
    }
}

fn try_ingest(blob: impl Read + Send, expected: &BlobExpectation) -> (File, Result<Converted, LayerError>) {
    let file = tempfile::tempfile().unwrap();
    let result = ingest(blob, expected, &file, &Limits::default());
    if result.is_err() {
        let mut start = vec![0; 4096];
        let read = std::os::unix::fs::FileExt::read_at(&file, &mut start, 0).unwrap();
        assert!(start[..read].iter().all(|byte| *byte == 0), "a refused layer has a super block");
    }
    (file, result)
}

fn error(blob: impl Read + Send, expected: &BlobExpectation) -> LayerError {
    try_ingest(blob, expected).1.unwrap_err()
}

#[test]
fn every_compression_gives_the_same_layer() {
    let tar = archive();
    let (start, end) = tar.split_at(tar.len() / 3);
    let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let blobs = [
        (PLAIN, tar.clone()),
        (GZIP, gzip(&tar)),
        (GZIP, [gzip(start), gzip(end), gzip(b"")].concat()),
        (ZSTD, zstd(&tar)),
        (ZSTD, [zstd(start), skippable.clone(), zstd(end)].concat()),
        (ZSTD, [skippable, zstd(&tar)].concat()),
    ];
    let mut sizes = Vec::new();
    for (media_type, blob) in blobs {
        let (file, result) = try_ingest(blob.as_slice(), &expectation(&blob, &tar, media_type));
        let converted = result.unwrap();
        assert_eq!(converted.diff_id.as_str(), Digest::sha256(&tar).to_string());
        fsck(&file);
        sizes.push(converted.size);
        assert_eq!(with_mounted(&[&file], snapshot).len(), 4);
    }
    assert!(sizes.iter().all(|size| *size == sizes[0]));
}

#[test]
fn a_sha512_digest_is_checked_too() {
    let tar = archive();
    let mut expected = expectation(&tar, &tar, PLAIN);
    expected.digest = Digest::of(Algorithm::Sha512, &tar);
    try_ingest(tar.as_slice(), &expected).1.unwrap();
    expected.digest = Digest::of(Algorithm::Sha512, b"other");
    assert!(matches!(error(tar.as_slice(), &expected), LayerError::DigestMismatch { .. }));
}

#[test]
fn a_reader_that_trickles_is_read_to_its_end() {
    struct Trickle<'b>(&'b [u8]);
    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(buffer.len()).min(1021);
            buffer[..length].copy_from_slice(&self.0[..length]);
            self.0 = &self.0[length..];
            Ok(length)
        }
    }
    let tar = archive();
    let blob = gzip(&tar);
    try_ingest(Trickle(&blob), &expectation(&blob, &tar, GZIP)).1.unwrap();
}

#[test]
fn wrong_bytes_are_a_wrong_digest_whatever_else_they_break() {
    let tar = archive();
    for (media_type, blob) in [(PLAIN, tar.clone()), (GZIP, gzip(&tar)), (ZSTD, zstd(&tar))] {
        let expected = expectation(&blob, &tar, media_type);
        for at in [20, 600, blob.len() / 2, blob.len() - 3] {
            let mut wrong = blob.clone();
            wrong[at] ^= 0x10;
            let error = error(wrong.as_slice(), &expected);
            assert!(matches!(error, LayerError::DigestMismatch { .. }), "{media_type} at {at}: {error}");
        }
    }
}

#[test]
fn sizes_are_exact() {
    let tar = archive();
    for (media_type, blob) in [(PLAIN, tar.clone()), (GZIP, gzip(&tar)), (ZSTD, zstd(&tar))] {
        let expected = expectation(&blob, &tar, media_type);
        for short in [0, 1, 100, blob.len() / 2, blob.len() - 1] {
            let error = error(&blob[..short], &expected);
            assert!(matches!(error, LayerError::BlobTooShort { .. }), "{media_type} {short}: {error}");
        }
        let endless = error(blob.as_slice().chain(io::repeat(0)), &expected);
        assert!(matches!(endless, LayerError::BlobTooLong { .. }), "{media_type}: {endless}");
    }
}

#[test]
fn a_wrong_diff_id_is_refused() {
    let tar = archive();
    for (media_type, blob) in [(PLAIN, tar.clone()), (GZIP, gzip(&tar))] {
        let expected = expectation(&blob, b"another archive", media_type);
        assert!(matches!(error(blob.as_slice(), &expected), LayerError::DiffIdMismatch { .. }));
    }
}

#[test]
fn damage_that_the_digest_covers_is_the_images_own() {
    let tar = archive();
    // Right digest, but the stream in it is cut or followed by garbage.
    let whole = gzip(&tar);
    for blob in [whole[..whole.len() - 10].to_vec(), [whole, b"garbage".to_vec()].concat()] {
        let error = error(blob.as_slice(), &expectation(&blob, &tar, GZIP));
        assert!(matches!(error, LayerError::Decompress { .. }), "{error}");
    }
    let frames = zstd(&tar);
    let blob = &frames[..frames.len() - 10];
    assert!(matches!(error(blob, &expectation(blob, &tar, ZSTD)), LayerError::Decompress { .. }));
    let climbing = gzip(&Archive::new().file("../x", "").end());
    let error = error(climbing.as_slice(), &expectation(&climbing, b"", GZIP));
    assert!(matches!(error, LayerError::Entry { .. }), "{error}");
}

#[test]
fn media_types_must_be_known_and_true() {
    let tar = archive();
    for (media_type, blob) in [
        (GZIP, tar.clone()),
        (GZIP, zstd(&tar)),
        (ZSTD, gzip(&tar)),
        (PLAIN, gzip(&tar)),
        (PLAIN, zstd(&tar)),
    ] {
        let error = error(blob.as_slice(), &expectation(&blob, &tar, media_type));
        assert!(matches!(error, LayerError::CompressionMismatch { .. }), "{error}");
    }
    let expected = expectation(&tar, &tar, "application/vnd.oci.image.layer.v1.tar+xz");
    assert!(matches!(error(tar.as_slice(), &expected), LayerError::UnsupportedMediaType(_)));
}

#[test]
fn a_bomb_ends_at_the_limit() {
    let zeros = vec![0; 64 << 20];
    for (media_type, blob) in [(GZIP, gzip(&zeros)), (ZSTD, zstd(&zeros))] {
        let limits = Limits { max_uncompressed: 8 << 20, ..Limits::default() };
        let file = tempfile::tempfile().unwrap();
        let error =
            ingest(blob.as_slice(), &expectation(&blob, &zeros, media_type), &file, &limits).unwrap_err();
        assert!(matches!(error, LayerError::Limit { .. }), "{error}");
    }
}

#[test]
fn a_zstd_window_beyond_the_limit_is_refused() {
    let tar = archive();
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(25).unwrap();
    encoder.write_all(&tar).unwrap();
    let blob = encoder.finish().unwrap();
    let expected = expectation(&blob, &tar, ZSTD);
    let file = tempfile::tempfile().unwrap();
    let limits = Limits { max_zstd_window_log: 23, ..Limits::default() };
    let error = ingest(blob.as_slice(), &expected, &file, &limits).unwrap_err();
    assert!(matches!(error, LayerError::Decompress { .. }), "{error}");
}

#[test]
fn a_failing_source_is_told_from_a_failing_disk() {
    struct Failing<'b>(&'b [u8]);
    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::ErrorKind::ConnectionReset.into()),
                length => Ok(length),
            }
        }
    }
    let tar = archive();
    let blob = gzip(&tar);
    let expected = expectation(&blob, &tar, GZIP);
    match error(Failing(&blob[..1000]), &expected) {
        LayerError::ReadBlob(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        other => panic!("{other}"),
    }
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let result = ingest(blob.as_slice(), &expected, &full, &Limits::default());
    assert!(matches!(result, Err(LayerError::WriteFile(_))));
}
