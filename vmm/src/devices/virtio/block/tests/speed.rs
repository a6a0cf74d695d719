//! Numbers, not promises: `cargo test --release -p hull-vmm speed -- --ignored --nocapture`.

use std::time::Instant;

use super::*;
use crate::devices::virtio::driver::activation;

const FILE: u64 = 256 << 20;

/// Keeps `depth` reads of `length` bytes in the ring until `count` are done; requests per second.
fn run(threads: usize, file: &File, depth: u64, length: u32, count: u64, sequential: bool) -> (f64, u64) {
    let confine: Confine = Arc::new(|| Ok(()));
    let group = BlockThreads::start("speed", threads, &confine).unwrap();
    let (mut device, handle) = images(&group, no_faults());
    let extent = handle.add("file", for_reading(file), FILE).unwrap();
    let memory = memory(16 << 20);
    let line = crate::devices::virtio::driver::interrupt();
    let mut driver = Driver::new(&memory, &line, 0, 128);
    device.activate(activation(&memory, &line, device.features(), std::slice::from_ref(&driver))).unwrap();
    let (mut offered, mut seen, mut place) = (0, 0, 1_u64);
    let start = Instant::now();
    while seen < count {
        while offered < count && offered - seen < depth {
            place = if sequential {
                offered
            } else {
                place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
            };
            let block = (place >> if sequential { 0 } else { 20 }) % (FILE / u64::from(length));
            let header = HEADER + 0x40 * (offered % 42);
            let sector = (extent.offset + block * u64::from(length)) / 512;
            driver.write(header, &[[0; 8], sector.to_le_bytes()].concat());
            let data = DATA + u64::from(length) * (offered % depth);
            let chain = [(header, 16, 0), (data, length, WRITE), (header + 32, 1, WRITE)];
            let head = driver.chain(&chain);
            driver.offer(head);
            offered += 1;
        }
        match driver.used() {
            Some((_, written)) => {
                assert_eq!(written, length + 1);
                seen += 1;
            }
            None => std::thread::yield_now(),
        }
    }
    (count as f64 / start.elapsed().as_secs_f64(), device.stats().waited)
}

#[test]
#[ignore = "a measurement"]
fn speed_of_reads_by_threads_and_depth() {
    use rustix::fs::Advice;
    let path = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    let block = pattern(1 << 20);
    (0..FILE >> 20).for_each(|_| std::io::Write::write_all(&mut path.as_file(), &block).unwrap());
    path.as_file().sync_all().unwrap();
    for (what, depth, length, count, sequential, cold) in [
        ("cached, 4 KiB, one at a time", 1, 4096, 50_000, false, false),
        ("cached, 4 KiB, 32 at a time", 32, 4096, 200_000, false, false),
        ("cached, 128 KiB in order, 8 at a time", 8, 128 << 10, 10_000, true, false),
        ("cold, 4 KiB, 8 at a time", 8, 4096, 2000, false, true),
        ("cold, 128 KiB in order, 8 at a time", 8, 128 << 10, 2048, true, true),
    ] {
        for threads in [1, 3, 8] {
            if cold {
                rustix::fs::fadvise(path.as_file(), 0, None, Advice::DontNeed).unwrap();
            }
            let (rate, waited) = run(threads, path.as_file(), depth, length, count, sequential);
            let mib = rate * f64::from(length) / f64::from(1 << 20);
            println!("{what}, {threads} threads: {rate:.0}/s, {mib:.0} MiB/s, {waited} waited");
        }
    }
}
