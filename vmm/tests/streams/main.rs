//! vsock, logs and network with a real guest on a real KVM. Where /dev/kvm cannot run one, the tests say so and do nothing;
//! `hack/node` has one that can. The guest's program (guest.rs) is compiled first in any case, since inside the node there
//! may be no compiler: run the tests natively once before.
//!
//! The kernel is HULL_GUEST_KERNEL, else target-guest/vmlinux.
#![cfg(feature = "machine")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

/// The machine, its files and its peer on the host.
mod machine;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use machine::{Guest, MAC, PATIENCE, on_own_network, pattern, wish};

const STREAMS: u64 = 100;

#[test]
fn a_hundred_streams_carry_their_bytes_both_ways_while_one_reader_stalls() {
    let Some(mut guest) = Guest::boot("", None) else { return };
    guest.wait_for("test: listening");
    // One that the guest never reads, and one that this side never reads.
    let mut held = guest.open();
    held.write_all(&wish(b'h', 0, 0)).unwrap();
    held.set_nonblocking(true).unwrap();
    let mut stuck = 0;
    while let Ok(count) = held.write(&[1; 65_536]) {
        stuck += count;
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut unread = guest.open();
    unread.write_all(&wish(b'f', 4 << 20, 0)).unwrap();

    let amount = 256 << 10;
    let start = Instant::now();
    // First all are there, for a busy guest of one emulated processor may take longer than a connection waits.
    let open: Vec<_> = (0..STREAMS)
        .map(|number| {
            let (mut stream, seed) = (guest.open(), 10 * number);
            stream.write_all(&wish(b'x', amount as u64, seed)).unwrap();
            stream.read_exact(&mut [0]).unwrap();
            (stream, seed)
        })
        .collect();
    let streams: Vec<_> = open
        .into_iter()
        .map(|(stream, seed)| std::thread::spawn(move || exchange(stream, amount, seed)))
        .collect();
    streams.into_iter().for_each(|stream| stream.join().unwrap());
    let elapsed = start.elapsed();
    let metrics = guest.vsock.metrics();
    eprintln!(
        "{STREAMS} streams with {amount} bytes each way at once: {elapsed:?}, {:.1} MB/s; stuck at {stuck}; {metrics:?}",
        (2 * STREAMS * amount as u64) as f64 / 1e6 / elapsed.as_secs_f64()
    );
    assert_eq!(metrics.violations, 0);
    // The stalled one still holds what it held, bounded; and when it is read at last nothing is missing.
    assert!(metrics.waiting > 0 && metrics.waiting <= 256 << 10, "{metrics:?}");
    let mut late = Vec::new();
    unread.read_to_end(&mut late).unwrap();
    assert_eq!(late.len(), 4 << 20);
    // A guest that never reads keeps its stream, with what this side sent last; the others are gone.
    drop(held);
    guest.wait_for_streams(1);
    assert!(!guest.console().contains("failed"), "{}", guest.console());
    guest.power_off();
}

/// Sends and receives at once, each byte checked on both sides.
fn exchange(stream: UnixStream, amount: usize, seed: u64) {
    let mut writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        for from in (0..amount).step_by(10_000) {
            writing.write_all(&pattern(seed, from, 10_000.min(amount - from))).unwrap();
        }
        writing.shutdown(Shutdown::Write).unwrap();
    });
    let mut reading = stream;
    let mut seen = 0;
    let mut chunk = vec![0; 16 << 10];
    loop {
        let length = reading.read(&mut chunk).unwrap();
        if length == 0 {
            break;
        }
        assert!(chunk[..length] == pattern(seed + 1, seen, length), "stream {seed} about {seen}");
        seen += length;
    }
    assert_eq!(seen, amount, "stream {seed}");
    writer.join().unwrap();
}

#[test]
fn streams_are_fast() {
    let Some(mut guest) = Guest::boot("", None) else { return };
    guest.wait_for("test: listening");
    let amount: u64 = 32 << 20;
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        let mut stream = guest.open();
        let start = Instant::now();
        stream.write_all(&wish(b's', 0, 0)).unwrap();
        let chunk = vec![1; 256 << 10];
        (0..amount / chunk.len() as u64).for_each(|_| stream.write_all(&chunk).unwrap());
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), amount);
        rates[0].push(amount as f64 / 1e6 / start.elapsed().as_secs_f64());

        let mut stream = guest.open();
        let start = Instant::now();
        stream.write_all(&wish(b'f', amount, 0)).unwrap();
        let mut chunk = vec![0; 256 << 10];
        let mut seen = 0;
        while seen < amount {
            let length = stream.read(&mut chunk).unwrap();
            assert_ne!(length, 0);
            seen += length as u64;
        }
        rates[1].push(amount as f64 / 1e6 / start.elapsed().as_secs_f64());
    }
    let mut stream = guest.open();
    stream.write_all(&wish(b'e', 0, 0)).unwrap();
    let mut trips = round_trips(200, || {
        stream.write_all(&[1; 64]).unwrap();
        stream.read_exact(&mut [0; 64]).unwrap();
    });
    trips.sort();
    for rates in &mut rates {
        rates.sort_by(f64::total_cmp);
    }
    eprintln!(
        "vsock: to the guest {:.1} MB/s, from the guest {:.1} MB/s, round trip {:?} (medians)",
        rates[0][1], rates[1][1], trips[100]
    );
    eprintln!("{:?}", guest.vsock.metrics());
    drop(stream);
    guest.power_off();
}

fn round_trips(count: usize, mut trip: impl FnMut()) -> Vec<Duration> {
    (0..count)
        .map(|_| {
            let start = Instant::now();
            trip();
            start.elapsed()
        })
        .collect()
}

#[test]
fn output_is_in_the_file_when_the_guest_is_told_so() {
    let Some(mut guest) = Guest::boot("test.logs", None) else { return };
    guest.wait_for("test: other ports are refused");
    let file = tempfile::NamedTempFile::new().unwrap();
    let append = std::fs::File::options().append(true).open(file.path()).unwrap();
    guest.logs.set("box", Some(append.into()));
    for stream in 0..2 {
        guest.wait_for(&format!("test: log {stream} acknowledged: Ok(0)"));
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| line.ends_with(&format!(" of {stream}"))).collect();
        assert_eq!(lines.len(), 2000);
        let label = ["stdout", "stderr"][stream];
        for (number, line) in lines.iter().enumerate() {
            assert!(line.ends_with(&format!(" {label} F line {number} of {stream}")), "{line}");
        }
    }
    guest.wait_for_streams(0);
    guest.wait_for("test: listening");
    guest.power_off();
}

#[test]
fn frames_go_through_the_tap_with_offloads() {
    on_own_network(|| {
        let tap = hull_sys::tun::make_tap("tap0").unwrap();
        machine::run("ip link set tap0 mtu 1500 up; ip address add 10.9.0.1/24 dev tap0; ip link set lo up");
        let Some(mut guest) = Guest::boot("test.net", Some(tap)) else { return };
        guest.wait_for("test: network is up");
        assert!(
            guest.console().contains(&MAC.map(|byte| format!("{byte:02x}")).join(":")),
            "{}",
            guest.console()
        );

        let udp = UdpSocket::bind("10.9.0.1:0").unwrap();
        udp.connect("10.9.0.2:7").unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        for length in [1, 100, 1472, 1473, 20_000, 60_000] {
            let data = pattern(length as u64, 0, length);
            udp.send(&data).unwrap();
            let mut back = vec![0; 65_536];
            let count = udp.recv(&mut back).unwrap();
            assert!(back[..count] == data, "{length}");
        }
        let mut trips = round_trips(200, || {
            udp.send(&[1; 64]).unwrap();
            udp.recv(&mut [0; 64]).unwrap();
        });
        trips.sort();

        let amount: u64 = 64 << 20;
        let mut rates = [0.0; 2];
        let mut stream = TcpStream::connect("10.9.0.2:9").unwrap();
        let start = Instant::now();
        stream.write_all(&[&b"s"[..], &amount.to_le_bytes()].concat()).unwrap();
        let chunk = vec![1; 256 << 10];
        (0..amount / chunk.len() as u64).for_each(|_| stream.write_all(&chunk).unwrap());
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), amount);
        rates[0] = amount as f64 / 1e6 / start.elapsed().as_secs_f64();

        let mut stream = TcpStream::connect("10.9.0.2:9").unwrap();
        let start = Instant::now();
        stream.write_all(&[&b"f"[..], &amount.to_le_bytes()].concat()).unwrap();
        let mut seen = Vec::new();
        stream.read_to_end(&mut seen).unwrap();
        assert_eq!(seen.len() as u64, amount);
        rates[1] = amount as f64 / 1e6 / start.elapsed().as_secs_f64();

        let metrics = guest.net.metrics();
        eprintln!(
            "net: TCP to the guest {:.1} MB/s, from the guest {:.1} MB/s, UDP round trip {:?} (median); {metrics:?}",
            rates[0], rates[1], trips[100]
        );
        // Offloads are in use: frames are far longer than the MTU.
        assert!(metrics.bytes_to_guest / metrics.frames_to_guest > 2000, "{metrics:?}");
        assert_eq!((metrics.spoofed, metrics.dropped_to_guest), (0, 0));
        guest.power_off();
    });
}
