//! How fast layer blobs become layer files: `cargo bench -p hull-images --bench convert`.
//!
//! Makes an archive like a distribution's (many small files, some large ones, all compressible to some degree), then times
//! `ingest` for each compression beside the decompressor alone. MB are a million bytes of the uncompressed archive.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use hull_images::digest::Digest;
use hull_images::layer::{BlobExpectation, Limits, ingest};

const ARCHIVE: usize = 500 << 20;
const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tar = archive();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar)?;
    let gzip = encoder.finish()?;
    let zstd = zstd::stream::encode_all(tar.as_slice(), 3)?;
    println!("archive {} MB, gzip {} MB, zstd {} MB", mb(tar.len()), mb(gzip.len()), mb(zstd.len()));

    let rate = |time: Duration| tar.len() as f64 / 1e6 / time.as_secs_f64();
    let alone = best(|| drain(flate2::read::MultiGzDecoder::new(gzip.as_slice())))?;
    println!("gzip, decompressor alone {:5.0} MB/s", rate(alone));
    let alone = best(|| drain(zstd::stream::read::Decoder::new(zstd.as_slice())?))?;
    println!("zstd, decompressor alone {:5.0} MB/s", rate(alone));

    let diff_id = Digest::sha256(&tar).to_string();
    for (suffix, blob) in [("+gzip", &gzip), ("+zstd", &zstd), ("", &tar)] {
        let expected = BlobExpectation {
            digest: Digest::sha256(blob),
            size: blob.len() as u64,
            diff_id: diff_id.parse()?,
            media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        };
        let time = best(|| {
            let out = tempfile::tempfile()?;
            ingest(blob.as_slice(), &expected, &out, &Limits::default()).map_err(io::Error::other)?;
            Ok(())
        })?;
        println!("tar{suffix:5} to layer file    {:5.0} MB/s", rate(time));
    }
    println!("fsync of the last file {:?}", fsync(&tar, &diff_id)?);
    Ok(())
}

fn fsync(tar: &[u8], diff_id: &str) -> Result<Duration, Box<dyn std::error::Error>> {
    let out: File = tempfile::tempfile()?;
    let expected = BlobExpectation {
        digest: Digest::sha256(tar),
        size: tar.len() as u64,
        diff_id: diff_id.parse()?,
        media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
    };
    ingest(tar, &expected, &out, &Limits::default())?;
    let start = Instant::now();
    out.sync_all()?;
    Ok(start.elapsed())
}

fn best(mut work: impl FnMut() -> io::Result<()>) -> io::Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn drain(mut reader: impl Read) -> io::Result<()> {
    let mut buffer = vec![0; 512 << 10];
    while reader.read(&mut buffer)? > 0 {}
    Ok(())
}

fn mb(bytes: usize) -> usize {
    bytes / 1_000_000
}

// Sizes follow a rough power law from 100 bytes to 8 MiB.
fn archive() -> Vec<u8> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut tar = Vec::with_capacity(ARCHIVE + (16 << 20));
    let mut number = 0;
    while tar.len() < ARCHIVE {
        let size = 100_usize << (next() % 17).min(next() % 17);
        tar.extend_from_slice(&header(&format!("usr/lib/package-{}/file-{number}", number / 50), size));
        for word in 0..size.div_ceil(8) {
            // Bytes of 6 bits, and in between text that repeats.
            let noise = next() & 0x3f3f_3f3f_3f3f_3f3f;
            let bytes = if word / 32 % 2 == 0 { noise.to_le_bytes() } else { *b"fn main(" };
            tar.extend_from_slice(&bytes);
        }
        tar.truncate(tar.len() - size.next_multiple_of(8) + size);
        tar.resize(tar.len().next_multiple_of(512), 0);
        number += 1;
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn header(path: &str, size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "14371174000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\u{0}00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
