//! The device with a driver on one side of real queues and the kernel on the other side of a real tap.

use std::collections::VecDeque;
use std::io::Write;
use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use hull_sys::namespace::{Namespaces, unshare};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::virtio::driver::{Buffer, INDIRECT, NEXT, Ring, WRITE};
use crate::devices::virtio::{Activation, ActiveQueue, GuestMemory, Interrupt, Memory, VirtioDevice, Worker};

const RX_AT: u64 = 0x20_0000;
const TX_AT: u64 = 0x10_0000;
const OURS: Mac = [0x02, 0, 0, 0, 0, 0x07];
const BUFFER: u32 = 1536;

/// A machine with a NIC on a tap of the calling thread's network namespace, where the kernel is 10.9.0.1.
struct Guest {
    device: Net,
    memory: Memory,
    rx: Ring,
    tx: Ring,
    interrupt: Interrupt,
    /// Frames with their headers, and the number of buffers that they came in.
    seen: VecDeque<(Vec<u8>, usize)>,
    buffer: u32,
    refill: bool,
    peer: Mac,
}

/// Runs a test on a thread with a network namespace of its own.
fn elsewhere(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(Namespaces::NET).unwrap();
        test();
    });
    thread.join().unwrap();
}

fn run(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Guest {
    fn new(tap: bool, mtu: u32, buffer: u32) -> Self {
        let memory = Memory::new(GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap());
        let tap = tap.then(|| {
            let tap = hull_sys::tun::make_tap("tap0").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1").unwrap();
            run(&format!("ip address add 10.9.0.1/24 dev tap0; ip link set tap0 mtu {mtu} up"));
            tap
        });
        let mut peer = [0; 6];
        if tap.is_some() {
            let text = run("ip -o link show tap0 | sed 's/.*ether //; s/ .*//'");
            for (to, from) in peer.iter_mut().zip(text.trim().split(':')) {
                *to = u8::from_str_radix(from, 16).unwrap();
            }
        }
        let worker = Worker::start("net", || Ok(())).unwrap();
        let device = Net::new(worker, Port { tap, mac: OURS, mtu }).unwrap();
        let [rx, tx] = [(0, 0x1000), (1, 0x8000)].map(|(index, base)| Ring::new(&memory, index, 256, base));
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let seen = VecDeque::new();
        Self { device, memory, rx, tx, interrupt, seen, buffer, refill: true, peer }
    }

    fn started() -> Self {
        let mut guest = Self::new(true, 1500, BUFFER);
        guest.give_all();
        guest.activate(guest.device.features());
        guest
    }

    fn activate(&mut self, features: u64) {
        let queues = vec![self.rx.queue(), self.tx.queue()];
        self.activate_with(features, queues);
    }

    fn activate_with(&mut self, features: u64, queues: Vec<ActiveQueue>) {
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        self.device.activate(Activation { memory, features, queues, interrupt }).unwrap();
    }

    /// Gives all free receive buffers to the device: each lies where its descriptor's number says.
    fn give_all(&mut self) {
        while self.rx.room() > 0 {
            let next = self.rx.next_free();
            let address = RX_AT + u64::from(next) * u64::from(self.buffer);
            self.rx.add(&[Buffer { address, length: self.buffer, writable: true }]);
        }
    }

    fn poll(&mut self) {
        let mut taken = 0;
        while let Some((head, length)) = self.rx.take() {
            taken += 1;
            let mut bytes = self.bytes(head, length);
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..buffers {
                // All buffers of a frame are there at once.
                let (head, length) = self.rx.take().expect("the rest of the frame");
                bytes.extend(self.bytes(head, length));
                taken += 1;
            }
            self.seen.push_back((bytes, buffers.into()));
        }
        if self.refill && taken > 0 {
            self.give_all();
            self.rx.kick();
        }
        while self.tx.take().is_some() {}
    }

    fn bytes(&self, head: u16, length: u32) -> Vec<u8> {
        assert!(length <= self.buffer);
        let mut bytes = vec![0; length as usize];
        let address = RX_AT + u64::from(head) * u64::from(self.buffer);
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn wait_for(&mut self, what: &str, mut is_it: impl FnMut(&[u8]) -> bool) -> (Vec<u8>, usize) {
        let start = Instant::now();
        loop {
            self.poll();
            while let Some((frame, buffers)) = self.seen.pop_front() {
                if is_it(&frame[HEADER..]) {
                    return (frame[HEADER..].to_vec(), buffers);
                }
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{what}: {:?}",
                self.device.handle().metrics()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(&mut self, frame: &[u8]) {
        self.memory.write_slice(&[0; HEADER], GuestAddress(TX_AT)).unwrap();
        self.memory.write_slice(frame, GuestAddress(TX_AT + HEADER as u64)).unwrap();
        self.tx.add(&[
            Buffer { address: TX_AT, length: HEADER as u32, writable: false },
            Buffer { address: TX_AT + HEADER as u64, length: frame.len() as u32, writable: false },
        ]);
        self.tx.kick();
        self.wait_until_sent();
    }

    fn wait_until_sent(&mut self) {
        let start = Instant::now();
        while self.tx.room() < 256 {
            while self.tx.take().is_some() {}
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }

    /// Asks for the kernel's MAC, which makes it know ours.
    fn arp(&mut self, source: Mac) {
        let mut frame = [[0xff; 6], source].concat();
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(source);
        frame.extend([10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
        self.send(&frame);
    }

    fn is_arp_reply(frame: &[u8]) -> bool {
        frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2])
    }

    fn metrics(&self) -> NetMetrics {
        self.device.handle().metrics()
    }
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn echo_request(to: Mac, data: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0, 1, 0, 1];
    icmp.extend(data);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + icmp.len()) as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 1, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    [&to[..], &OURS, &[8, 0], &ip, &icmp].concat()
}

fn is_echo_reply(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&1) && frame.get(34) == Some(&0)
}

/// A socket of the kernel's side that sends to the guest, whose MAC is known there.
fn sender() -> UdpSocket {
    run(&format!(
        "ip neighbour replace 10.9.0.2 lladdr {} dev tap0 nud permanent",
        OURS.map(|byte| format!("{byte:02x}")).join(":")
    ));
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.connect("10.9.0.2:9").unwrap();
    socket
}

fn is_udp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&17)
}

#[test]
fn frames_go_both_ways() {
    elsewhere(|| {
        let mut guest = Guest::started();
        guest.arp(OURS);
        let (reply, buffers) = guest.wait_for("an ARP reply", Guest::is_arp_reply);
        assert_eq!((&reply[6..12], buffers), (&guest.peer[..], 1));
        let data: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        guest.send(&echo_request(guest.peer, &data));
        let (reply, _) = guest.wait_for("an echo", is_echo_reply);
        assert_eq!(reply[42..], data);
        let metrics = guest.metrics();
        assert_eq!((metrics.frames_from_guest, metrics.bytes_from_guest), (2, 42 + 1042));
        assert!(metrics.frames_to_guest >= 2);
    });
}

#[test]
fn a_frame_with_somebody_elses_mac_does_not_leave() {
    elsewhere(|| {
        let mut guest = Guest::started();
        guest.arp([2, 0, 0, 0, 0, 8]);
        guest.arp([0xff; 6]);
        let start = Instant::now();
        while guest.metrics().spoofed < 2 {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
        assert_eq!(guest.metrics().frames_from_guest, 0);
        // A clone has another address.
        guest.device.handle().set_mac([2, 0, 0, 0, 0, 8]);
        guest.arp([2, 0, 0, 0, 0, 8]);
        guest.wait_for("an ARP reply", Guest::is_arp_reply);
        let mut config = [0; 12];
        guest.device.read_config(0, &mut config);
        assert_eq!(config, [2, 0, 0, 0, 0, 8, 1, 0, 1, 0, 0xdc, 5]);
    });
}

#[test]
fn a_frame_longer_than_a_buffer_comes_in_several_at_once() {
    elsewhere(|| {
        let mut guest = Guest::new(true, 65_000, BUFFER);
        guest.give_all();
        guest.activate(guest.device.features());
        let socket = sender();
        for round in 0..100_usize {
            let length = [64_000, 1, 1500, 1537, 20_000][round % 5];
            let data: Vec<u8> = (0..length).map(|at| (at * 7 + round) as u8).collect();
            socket.send(&data).unwrap();
            let (frame, buffers) = guest.wait_for("a datagram", is_udp);
            assert!(frame[42..] == data, "{round}");
            assert_eq!(buffers, (HEADER + 42 + length).div_ceil(BUFFER as usize));
        }
    });
}

#[test]
fn a_guest_without_buffers_finds_frames_waiting_when_it_has_some() {
    elsewhere(|| {
        let mut guest = Guest::started();
        guest.refill = false;
        let socket = sender();
        for number in 0..500_u32 {
            socket.send(&number.to_le_bytes()).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        guest.poll();
        // Frames of 64 KiB might come: what is left of the buffers is for those.
        assert!(guest.seen.len() > 150 && guest.seen.len() < 256, "{}", guest.seen.len());
        let before = cpu_time();
        std::thread::sleep(Duration::from_millis(300));
        let spent = cpu_time() - before;
        assert!(spent < Duration::from_millis(200), "it is not idle: {spent:?}");
        guest.refill = true;
        guest.give_all();
        guest.rx.kick();
        let mut next = 0;
        while next < 500 {
            let (frame, _) = guest.wait_for("a datagram", is_udp);
            assert_eq!(frame[42..46], u32::to_le_bytes(next));
            next += 1;
        }
    });
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn without_merging_each_frame_has_one_chain_and_what_does_not_fit_is_dropped() {
    elsewhere(|| {
        let mut guest = Guest::new(true, 1500, 400);
        let off = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        guest.give_all();
        guest.activate(guest.device.features() & !off);
        let socket = sender();
        socket.send(&[1; 1000]).unwrap();
        socket.send(&[2; 300]).unwrap();
        let (frame, buffers) = guest.wait_for("a datagram", is_udp);
        assert_eq!((frame.len(), frame[42], buffers), (342, 2, 1));
        assert_eq!(guest.metrics().dropped_to_guest, 1);
    });
}

#[test]
fn chains_of_any_shape_harm_nobody() {
    elsewhere(|| {
        let mut guest = Guest::started();
        let at = TX_AT;
        guest.memory.write_slice(&[0; HEADER + 60], GuestAddress(at)).unwrap();
        let readable = |address, length| Buffer { address, length, writable: false };
        guest.tx.add(&[readable(at, 0)]);
        guest.tx.add(&[readable(at, 25)]);
        guest.tx.add(&[readable(1 << 40, 100)]);
        guest.tx.add(&[readable((32 << 20) - 20, 100)]);
        guest.tx.add(&[readable(u64::MAX - 10, 100)]);
        guest.tx.add(&[readable(at, 70_000)]);
        guest.tx.add(&[readable(at, u32::MAX)]);
        guest.tx.add(&[Buffer { address: at, length: 100, writable: true }]);
        let heads: Vec<u16> = (0..3).map(|_| guest.tx.add(&[readable(at, 12)])).collect();
        guest.tx.write_descriptor(heads[0], at, 12, NEXT, heads[0]);
        guest.tx.write_descriptor(heads[1], 0x8000, 16 * 256, INDIRECT, 0);
        guest.tx.write_descriptor(heads[2], 1 << 41, 65535 * 16, INDIRECT | WRITE, 0);
        guest.tx.kick();
        let start = Instant::now();
        loop {
            let metrics = guest.metrics();
            if metrics.dropped_from_guest + metrics.spoofed == 11 {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{metrics:?}");
        }
        assert_eq!((guest.interrupt.device_status(), guest.metrics().frames_from_guest), (0, 0));
    });
}

#[test]
fn useless_buffers_go_back_and_others_are_used_in_any_shape() {
    elsewhere(|| {
        let mut guest = Guest::new(true, 1500, BUFFER);
        let writable = |address, length| Buffer { address, length, writable: true };
        guest.rx.add(&[writable(RX_AT, 12)]);
        guest.rx.add(&[writable(RX_AT, 0)]);
        guest.rx.add(&[writable(1 << 40, 1536)]);
        guest.rx.add(&[Buffer { address: RX_AT, length: 1536, writable: false }]);
        let many: Vec<Buffer> = (0..65).map(|n| writable(RX_AT + n * 64, 64)).collect();
        guest.rx.add(&many);
        // 64 KiB and more, in odd pieces.
        let odd: Vec<Buffer> =
            [1, 9, 0, 33, 70_000].iter().map(|length| writable(RX_AT + 0x10_0000, *length)).collect();
        let good = guest.rx.add(&odd);
        guest.activate(guest.device.features());
        let socket = sender();
        socket.send(b"through all of them").unwrap();
        let start = Instant::now();
        let mut back = Vec::new();
        while back.len() < 6 {
            back.extend(guest.rx.take());
            assert!(start.elapsed() < Duration::from_secs(10), "{back:?}");
        }
        let lengths: Vec<u32> = back.iter().map(|(_, length)| *length).collect();
        assert_eq!(lengths, [0, 0, 0, 0, 0, (HEADER + 42 + 19) as u32]);
        assert_eq!(back[5].0, good);
    });
}

#[test]
fn a_ring_that_lies_needs_a_reset() {
    elsewhere(|| {
        let mut guest = Guest::started();
        guest.rx.set_available_index(9000);
        guest.rx.kick();
        let start = Instant::now();
        while guest.interrupt.device_status() == 0 {
            sender().send(b"x").unwrap();
            assert!(start.elapsed() < Duration::from_secs(10));
        }
        guest.device.reset();
    });
}

#[test]
fn without_a_tap_the_link_is_down_and_frames_are_gone() {
    let mut guest = Guest::new(false, 1500, BUFFER);
    guest.give_all();
    guest.activate(guest.device.features());
    let mut config = [0xff; 14];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 0, 0, 1, 0, 0xdc, 5, 0, 0]);
    guest.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 14]);
    guest.arp(OURS);
    assert_eq!(guest.metrics().dropped_from_guest, 1);
}

#[test]
fn a_paused_device_rests_and_another_goes_on_from_its_state() {
    elsewhere(|| {
        let mut guest = Guest::started();
        let socket = sender();
        socket.send(b"one").unwrap();
        guest.wait_for("a datagram", is_udp);
        assert!(guest.device.save().is_err());
        guest.device.pause().unwrap();
        socket.send(b"two").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        guest.poll();
        assert!(!guest.seen.iter().any(|(frame, _)| is_udp(&frame[HEADER..])));
        guest.device.resume().unwrap();
        assert_eq!(guest.wait_for("a datagram", is_udp).0[42..45], *b"two");

        guest.device.pause().unwrap();
        let state = guest.device.save().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state: crate::devices::virtio::DeviceState = serde_json::from_str(&text).unwrap();
        let sizes = guest.device.queue_sizes().to_vec();
        // A device of its own, on a tap of its own.
        guest.device.reset();
        let other = Guest::new_device_like(&guest);
        guest.device = other;
        guest.device.restore(state.inner).unwrap();
        let rings = [&guest.rx, &guest.tx];
        let queues = state.queues.iter().zip(sizes).zip(rings).enumerate();
        let queues = queues
            .map(|(index, ((saved, size), ring))| {
                ActiveQueue::new(index as u16, saved.restore(size).unwrap(), ring.kick_event())
            })
            .collect();
        guest.activate_with(guest.device.features(), queues);
        sender().send(b"three").unwrap();
        assert_eq!(guest.wait_for("a datagram", is_udp).0[42..47], *b"three");
        guest.arp(OURS);
        guest.wait_for("an ARP reply", Guest::is_arp_reply);
        assert!(guest.device.restore(serde_json::json!({"mac": 1})).is_err());
    });
}

impl Guest {
    fn new_device_like(old: &Self) -> Net {
        run("ip link delete tap0 || true; ip link show tap0 2>/dev/null && exit 1 || true");
        let fresh = Guest::new(true, 1500, old.buffer);
        fresh.device
    }
}

#[test]
fn a_nic_that_makes_no_sense_is_refused() {
    let worker = Worker::start("net", || Ok(())).unwrap();
    for (mac, mtu) in [(OURS, 67), (OURS, 65_536), (OURS, 0), ([1, 0, 0, 0, 0, 0], 1500), ([0; 6], 1500)] {
        assert!(Net::new(worker.clone(), Port { tap: None, mac, mtu }).is_err(), "{mac:?} {mtu}");
    }
    let (file, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    (&file).write_all(b"x").unwrap();
    let mut guest = Guest::new(false, 1500, BUFFER);
    guest.device = Net::new(worker, Port { tap: Some(file.into()), mac: OURS, mtu: 1500 }).unwrap();
    let queues = vec![guest.rx.queue(), guest.tx.queue()];
    let (memory, interrupt) = (guest.memory.clone(), guest.interrupt.clone());
    let features = guest.device.features();
    // What is no tap cannot be served.
    assert!(guest.device.activate(Activation { memory, features, queues, interrupt }).is_err());
}
