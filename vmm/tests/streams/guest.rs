//! What runs as init in the guest of these tests: a peer for streams, logs and frames. Compiled by the tests themselves,
//! statically and with nothing but the standard library.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{FromRawFd, RawFd};
use std::process::Command;

#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn bind(fd: i32, address: *const SockaddrVm, length: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut u8, length: *mut u32) -> i32;
    fn connect(fd: i32, address: *const SockaddrVm, length: u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
    fn reboot(how: i32) -> i32;
}

const AF_VSOCK: i32 = 40;
const POWER_OFF: i32 = 0x4321_fedc;
const RECEIVE: i32 = 0;
const SEND: i32 = 1;

struct Stream {
    file: File,
    fd: RawFd,
}

impl Stream {
    fn new(fd: RawFd) -> Self {
        Self { file: unsafe { File::from_raw_fd(fd) }, fd }
    }

    fn end(&self, way: i32) {
        unsafe { shutdown(self.fd, way) };
    }
}

fn address(cid: u32, port: u32) -> SockaddrVm {
    SockaddrVm { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
}

fn vsock() -> RawFd {
    let fd = unsafe { socket(AF_VSOCK, 1, 0) };
    assert!(fd >= 0, "no vsock: {}", io::Error::last_os_error());
    fd
}

fn main() {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys")] {
        Command::new("/bin/busybox").args(["mount", "-t", kind, kind, place]).status().unwrap();
    }
    let words = fs::read_to_string("/proc/cmdline").unwrap();
    let has = |word: &str| words.split_whitespace().any(|found| found == word);
    if has("test.net") {
        network();
    }
    if has("test.logs") {
        std::thread::spawn(logs);
    }
    let fd = vsock();
    assert_eq!(unsafe { bind(fd, &address(u32::MAX, 1024), 16) }, 0);
    assert_eq!(unsafe { listen(fd, 200) }, 0);
    println!("test: listening");
    loop {
        let stream = unsafe { accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) };
        if stream >= 0 {
            std::thread::Builder::new()
                .stack_size(128 << 10)
                .spawn(move || serve(Stream::new(stream)))
                .unwrap();
        }
    }
}

/// A host says first what it wants: one byte, an amount, a seed.
fn serve(mut stream: Stream) {
    let mut wish = [0; 17];
    if stream.file.read_exact(&mut wish).is_err() {
        return;
    }
    let amount = u64::from_le_bytes(wish[1..9].try_into().unwrap()) as usize;
    let seed = u64::from_le_bytes(wish[9..17].try_into().unwrap());
    let result = match wish[0] {
        b'x' => exchange(stream, amount, seed),
        b's' => sink(stream),
        b'f' => source(stream, amount),
        b'e' => echo(stream),
        b'h' => hold(),
        b'o' => off(),
        _ => Ok(()),
    };
    if let Err(error) = result {
        println!("test: stream {seed} failed: {error}");
    }
}

/// Both ways at once, each byte checked.
fn exchange(mut stream: Stream, amount: usize, seed: u64) -> io::Result<()> {
    stream.file.write_all(b"k")?;
    let mut writing = Stream { file: stream.file.try_clone()?, fd: stream.fd };
    let writer = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
        let mut sent = 0;
        let mut chunk = vec![0; 8000];
        while sent < amount {
            let length = chunk.len().min(amount - sent);
            fill(&mut chunk[..length], seed + 1, sent);
            writing.file.write_all(&chunk[..length])?;
            sent += length;
        }
        writing.end(SEND);
        io::Result::Ok(())
    })?;
    let mut reading = stream;
    let (mut seen, mut chunk, mut wanted) = (0, vec![0; 8000], vec![0; 8000]);
    loop {
        let length = reading.file.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        fill(&mut wanted[..length], seed, seen);
        if chunk[..length] != wanted[..length] {
            return Err(io::Error::other(format!("other bytes than were sent, about {seen}")));
        }
        seen += length;
    }
    writer.join().unwrap()?;
    if seen == amount { Ok(()) } else { Err(io::Error::other(format!("{seen} bytes of {amount}"))) }
}

fn fill(bytes: &mut [u8], seed: u64, from: usize) {
    for (at, byte) in (from..).zip(bytes) {
        *byte = (at as u64)
            .wrapping_mul(0x9e37_79b9)
            .wrapping_add(seed.wrapping_mul(0x85eb_ca6b))
            .rotate_left(17) as u8;
    }
}

fn sink(mut stream: Stream) -> io::Result<()> {
    let mut chunk = vec![0; 256 << 10];
    let mut seen = 0_u64;
    loop {
        match stream.file.read(&mut chunk)? {
            0 => break,
            length => seen += length as u64,
        }
    }
    stream.file.write_all(&seen.to_le_bytes())
}

fn source(mut stream: Stream, amount: usize) -> io::Result<()> {
    let chunk = vec![7; 256 << 10];
    let mut left = amount;
    while left > 0 {
        let length = left.min(chunk.len());
        stream.file.write_all(&chunk[..length])?;
        left -= length;
    }
    Ok(())
}

fn echo(mut stream: Stream) -> io::Result<()> {
    let mut chunk = [0; 4096];
    loop {
        match stream.file.read(&mut chunk)? {
            0 => return Ok(()),
            length => stream.file.write_all(&chunk[..length])?,
        }
    }
}

/// Never reads again.
fn hold() -> io::Result<()> {
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1000));
    }
}

fn off() -> io::Result<()> {
    unsafe { reboot(POWER_OFF) };
    Ok(())
}

/// Two outputs of a container, as the agent sends them, and the word that they are in the file.
fn logs() {
    // Elsewhere on the host nobody listens.
    let fd = vsock();
    assert_ne!(unsafe { connect(fd, &address(2, 22), 16) }, 0);
    println!("test: other ports are refused: {}", io::Error::last_os_error());
    for stream in 0..2_u8 {
        let fd = vsock();
        assert_eq!(unsafe { connect(fd, &address(2, 1025), 16) }, 0, "{}", io::Error::last_os_error());
        let mut log = Stream::new(fd);
        // LogHello { container_id: "box", stream }.
        let mut hello = vec![0x0a, 3, b'b', b'o', b'x'];
        if stream > 0 {
            hello.extend([0x10, stream]);
        }
        log.file.write_all(&(hello.len() as u32).to_le_bytes()).unwrap();
        log.file.write_all(&hello).unwrap();
        for number in 0..2000 {
            writeln!(log.file, "line {number} of {stream}").unwrap();
        }
        log.end(SEND);
        let ended = log.file.read(&mut [0]);
        println!("test: log {stream} acknowledged: {ended:?}");
        log.end(RECEIVE);
    }
}

fn network() {
    let script =
        "ip link set lo up; ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0; ip link show eth0";
    Command::new("/bin/busybox").args(["sh", "-ec", script]).status().unwrap();
    let udp = UdpSocket::bind("10.9.0.2:7").unwrap();
    std::thread::spawn(move || {
        let mut datagram = vec![0; 65_536];
        while let Ok((length, peer)) = udp.recv_from(&mut datagram) {
            let _ = udp.send_to(&datagram[..length], peer);
        }
    });
    let tcp = TcpListener::bind("10.9.0.2:9").unwrap();
    std::thread::spawn(move || {
        for connection in tcp.incoming().flatten() {
            std::thread::spawn(move || {
                let mut connection = connection;
                let mut wish = [0; 9];
                connection.read_exact(&mut wish).unwrap();
                let mut left = u64::from_le_bytes(wish[1..].try_into().unwrap()) as usize;
                let mut chunk = vec![0; 256 << 10];
                if wish[0] == b'f' {
                    while left > 0 {
                        let length = left.min(chunk.len());
                        connection.write_all(&chunk[..length]).unwrap();
                        left -= length;
                    }
                } else {
                    let mut seen = 0_u64;
                    while let Ok(length) = connection.read(&mut chunk) {
                        if length == 0 {
                            break;
                        }
                        seen += length as u64;
                    }
                    let _ = connection.write_all(&seen.to_le_bytes());
                }
            });
        }
    });
    println!("test: network is up");
}
