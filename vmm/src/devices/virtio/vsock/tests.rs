//! The device with a driver on the other side of real queues, on a real worker.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HEADER, Header, NEITHER, NO_RECEIVE, NO_SEND, Op, TYPE_STREAM};
use super::*;
use crate::devices::virtio::driver::{Buffer, INDIRECT, NEXT, Ring, WRITE};
use crate::devices::virtio::{Activation, GuestMemory, Interrupt, Memory, VirtioDevice, Worker};

const RX_BUFFER: u32 = 4096;
const RX_AT: u64 = 0x10_0000;
const TX_AT: u64 = 0x20_0000;
const TX_BUFFER: u64 = 0x1_1000;
const LOGS: u32 = 1025;

/// A service that hands its streams to the test.
struct Collect(Mutex<Sender<UnixStream>>);

impl Service for Collect {
    fn accept(&self, stream: OwnedFd) {
        self.0.lock().unwrap().send(stream.into()).unwrap();
    }
}

/// A machine with a vsock device and a driver that the test plays.
struct Guest {
    device: Vsock,
    memory: Memory,
    rx: Ring,
    tx: Ring,
    event: Ring,
    interrupt: Interrupt,
    seen: VecDeque<(Header, Vec<u8>)>,
    /// Give buffers back to the device as they come.
    refill: bool,
    tx_turn: u64,
    directory: tempfile::TempDir,
    services: Receiver<UnixStream>,
}

impl Guest {
    fn new() -> Self {
        let memory = Memory::new(GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock.sock")).unwrap();
        let (sender, services) = channel();
        let service: Arc<dyn Service> = Arc::new(Collect(Mutex::new(sender)));
        let worker = Worker::start("vsock", || Ok(())).unwrap();
        let device = Vsock::new(worker, listener.into(), BTreeMap::from([(LOGS, service)])).unwrap();
        let [rx, tx, event] = [(0, 128, 0x1000), (1, 128, 0x4000), (2, 8, 0x8000)]
            .map(|(index, size, base)| Ring::new(&memory, index, size, base));
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut guest = Self {
            device,
            memory,
            rx,
            tx,
            event,
            interrupt,
            seen: VecDeque::new(),
            refill: true,
            tx_turn: 0,
            directory,
            services,
        };
        for number in 0..128 {
            guest.give(number);
        }
        for number in 0..8 {
            guest.event.add(&[Buffer { address: 0x9000 + number * 8, length: 8, writable: true }]);
        }
        guest
    }

    fn started() -> Self {
        let mut guest = Self::new();
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let queues = vec![self.rx.queue(), self.tx.queue(), self.event.queue()];
        self.device.activate(self.activation(queues)).unwrap();
    }

    fn activation(&self, queues: Vec<crate::devices::virtio::ActiveQueue>) -> Activation {
        Activation {
            memory: self.memory.clone(),
            features: self.device.features(),
            queues,
            interrupt: self.interrupt.clone(),
        }
    }

    /// Gives a receive buffer to the device: its number is that of its descriptor.
    fn give(&mut self, number: u64) {
        let address = RX_AT + number * u64::from(RX_BUFFER);
        let head = self.rx.add(&[Buffer { address, length: RX_BUFFER, writable: true }]);
        assert!(head < 128);
        self.rx_addresses(head, address);
    }

    /// Buffers lie where their descriptors say: read it there.
    fn rx_addresses(&self, head: u16, address: u64) {
        let found: u64 = self.memory.read_obj(GuestAddress(0x1000 + 16 * u64::from(head))).unwrap();
        assert_eq!(found, address);
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// Takes what has come.
    fn poll(&mut self) {
        let mut taken = Vec::new();
        while let Some((head, length)) = self.rx.take() {
            let address: u64 = self.memory.read_obj(GuestAddress(0x1000 + 16 * u64::from(head))).unwrap();
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            if let Some((header, data)) = bytes.split_first_chunk::<HEADER>() {
                let header = Header::parse(header);
                assert_eq!(header.length as usize, data.len());
                assert_eq!((header.source_cid, header.destination_cid), (2, 3));
                self.seen.push_back((header, data.to_vec()));
            }
            taken.push((address - RX_AT) / u64::from(RX_BUFFER));
        }
        if self.refill && !taken.is_empty() {
            taken.into_iter().for_each(|number| self.give(number));
            self.rx.kick();
        }
        while self.tx.take().is_some() {}
    }

    /// The first packet that this is true for; others stay.
    fn wait_for(&mut self, mut is_it: impl FnMut(&Header) -> bool) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            self.poll();
            if let Some(place) = self.seen.iter().position(|(header, _)| is_it(header)) {
                return self.seen.remove(place).unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(20), "it did not come; what came: {:?}", self.seen);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn wait_op(&mut self, op: Op) -> Header {
        self.wait_for(|header| header.op == op.number()).0
    }

    /// Nothing of this kind comes for a while.
    fn expect_none(&mut self, op: Op) {
        std::thread::sleep(Duration::from_millis(60));
        self.poll();
        assert!(!self.seen.iter().any(|(header, _)| header.op == op.number()), "{:?}", self.seen);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let start = Instant::now();
        while self.tx.room() < 2 {
            self.poll();
            assert!(start.elapsed() < Duration::from_secs(20), "the device takes no packets");
        }
        let address = TX_AT + self.tx_turn % 64 * TX_BUFFER;
        self.tx_turn += 1;
        self.memory.write_slice(&header.bytes(), GuestAddress(address)).unwrap();
        self.memory.write_slice(data, GuestAddress(address + HEADER as u64)).unwrap();
        let head = Buffer { address, length: HEADER as u32, writable: false };
        if data.is_empty() {
            self.tx.add(&[head]);
        } else {
            let data =
                Buffer { address: address + HEADER as u64, length: data.len() as u32, writable: false };
            self.tx.add(&[head, data]);
        }
        self.tx.kick();
    }

    fn answer(&mut self, to: &Header, op: Op, buffer: u32, forwarded: u32, data: &[u8]) {
        let header = reply(to, op, buffer, forwarded, data.len());
        self.send(header, data);
    }

    fn shutdown(&mut self, to: &Header, flags: u32) {
        self.send(Header { flags, ..reply(to, Op::Shutdown, 1 << 18, 0, 0) }, &[]);
    }

    /// A stream that a host opened and the guest accepted.
    fn open(&mut self, buffer: u32) -> (UnixStream, Header) {
        let stream = self.connect();
        let request = self.wait_op(Op::Request);
        assert_eq!(request.destination_port, GUEST_PORT);
        self.answer(&request, Op::Response, buffer, 0, &[]);
        (stream, request)
    }

    /// A stream that the guest opened.
    fn open_log(&mut self, guest_port: u32) -> (UnixStream, Header) {
        let request = from_guest(guest_port, LOGS, Op::Request);
        self.send(request, &[]);
        let response = self
            .wait_for(|header| header.op == Op::Response.number() && header.destination_port == guest_port);
        let stream = self.services.recv_timeout(Duration::from_secs(10)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (stream, response.0)
    }

    fn expect_streams(&self, wanted: u64) {
        let start = Instant::now();
        while self.device.handle().metrics().streams != wanted {
            let metrics = self.device.handle().metrics();
            assert!(start.elapsed() < Duration::from_secs(20), "{metrics:?}, wanted {wanted} streams");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn from_guest(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        source_cid: GUEST_CID,
        destination_cid: HOST_CID,
        source_port: guest_port,
        destination_port: host_port,
        length: 0,
        kind: TYPE_STREAM,
        op: op.number(),
        flags: 0,
        buffer: 1 << 18,
        forwarded: 0,
    }
}

fn reply(to: &Header, op: Op, buffer: u32, forwarded: u32, length: usize) -> Header {
    Header { length: length as u32, buffer, forwarded, ..from_guest(to.destination_port, to.source_port, op) }
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(97)) as u8).collect()
}

fn closes(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
        || stream.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[test]
fn data_goes_both_ways_and_ends_travel_on_their_own() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    host.write_all(b"to the guest").unwrap();
    let (header, data) = guest.wait_for(|header| header.op == Op::Data.number());
    assert_eq!((header.source_port, &data[..]), (request.source_port, &b"to the guest"[..]));
    guest.answer(&request, Op::Data, 1 << 18, 12, b"to the host");
    let mut text = [0; 11];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");

    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.wait_op(Op::Shutdown).flags, NO_SEND);
    // The other way still works, and ends on its own.
    guest.answer(&request, Op::Data, 1 << 18, 12, b"late answer");
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"late answer");
    guest.shutdown(&request, NO_SEND);
    assert!(closes(&mut host));
    guest.expect_streams(0);
    // Its socket closes later: then it waits for a reset.
    guest.shutdown(&request, NEITHER);
    guest.wait_op(Op::Reset);
}

#[test]
fn connections_wait_for_the_driver() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    guest.activate();
    let request = guest.wait_op(Op::Request);
    guest.answer(&request, Op::Response, 1 << 18, 0, &[]);
    assert_eq!(guest.wait_for(|header| header.op == Op::Data.number()).1, b"early");
}

#[test]
fn a_guest_that_refuses_or_does_not_answer_closes_the_connection() {
    let mut guest = Guest::started();
    let mut refused = guest.connect();
    let request = guest.wait_op(Op::Request);
    guest.answer(&request, Op::Reset, 0, 0, &[]);
    assert!(closes(&mut refused));
    let start = Instant::now();
    let mut ignored = guest.connect();
    guest.wait_op(Op::Request);
    assert!(closes(&mut ignored));
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(5) && waited < Duration::from_secs(8), "{waited:?}");
    guest.wait_op(Op::Reset);
    guest.expect_streams(0);
}

#[test]
fn the_guest_reaches_services_and_nothing_else() {
    let mut guest = Guest::started();
    let (mut service, opened) = guest.open_log(5000);
    guest.answer(&opened, Op::Data, 1 << 18, 0, b"a line\n");
    let mut line = [0; 7];
    service.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"a line\n");
    for port in [0, 22, 1024, 1026, u32::MAX] {
        guest.send(from_guest(6000, port, Op::Request), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (port, 6000));
    }
    // Half-close: the guest ends, the service answers with its own end when it has taken everything.
    guest.shutdown(&opened, NO_SEND);
    assert!(closes(&mut service));
    guest.expect_none(Op::Shutdown);
    drop(service);
    let end = guest.wait_op(Op::Shutdown);
    assert_eq!(end.flags & NO_SEND, NO_SEND);
}

#[test]
fn a_guest_sends_no_more_than_its_credit_and_is_told_when_the_reader_takes_it() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let window = request.buffer as usize;
    let data = pattern(1, window);
    // The socket takes some; what it does not take is credit that is used.
    let (mut sent, mut credit) = (0, window);
    let mut all = Vec::new();
    for _ in 0..2000 {
        let length = credit.min(8192);
        if length == 0 {
            break;
        }
        guest.answer(&request, Op::Data, 1 << 18, 0, &data[..length]);
        all.extend_from_slice(&data[..length]);
        sent += length;
        std::thread::sleep(Duration::from_millis(1));
        guest.poll();
        if let Some((header, _)) = guest.seen.iter().rev().find(|(h, _)| h.op == Op::CreditUpdate.number()) {
            credit = header.buffer as usize - (sent - header.forwarded as usize);
        } else {
            credit = window - sent;
        }
    }
    assert_eq!(credit, 0, "a reader that does not read stops the sender");
    assert!(guest.device.handle().metrics().waiting > 0);
    assert!(sent < 2 << 20, "{sent}");
    let mut seen = vec![0; sent];
    host.read_exact(&mut seen).unwrap();
    assert!(seen == all);
    guest.wait_for(|header| {
        header.op == Op::CreditUpdate.number() && (sent as u32).wrapping_sub(header.forwarded) < header.buffer
    });
    // More than its credit is the end of the stream.
    let (mut other, request) = guest.open(1 << 18);
    for _ in 0..20 {
        guest.answer(&request, Op::Data, 1 << 18, 0, &vec![0; 65536]);
    }
    guest.wait_for(|h| h.op == Op::Reset.number() && h.source_port == request.source_port);
    while !matches!(other.read(&mut [0; 65536]), Ok(0)) {}
}

#[test]
fn without_credit_of_the_guest_nothing_is_sent() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1000);
    host.write_all(&pattern(2, 3000)).unwrap();
    let (_, data) = guest.wait_for(|header| header.op == Op::Data.number());
    assert_eq!(data, pattern(2, 3000)[..1000]);
    guest.wait_op(Op::CreditRequest);
    guest.expect_none(Op::Data);
    // Nonsense is none.
    guest.answer(&request, Op::CreditUpdate, 1000, 0xffff_0000, &[]);
    guest.expect_none(Op::Data);
    guest.answer(&request, Op::CreditUpdate, 1000, 400, &[]);
    assert_eq!(guest.wait_for(|h| h.op == Op::Data.number()).1, pattern(2, 3000)[1000..1400]);
    guest.answer(&request, Op::CreditUpdate, 1 << 18, 1400, &[]);
    assert_eq!(guest.wait_for(|h| h.op == Op::Data.number()).1, pattern(2, 3000)[1400..]);
}

#[test]
fn a_guest_without_buffers_gets_everything_when_it_has_some_again() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 20);
    guest.refill = false;
    let sent = pattern(3, 1 << 20);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&copy).unwrap();
        host
    });
    std::thread::sleep(Duration::from_millis(100));
    guest.poll();
    assert!(guest.rx.room() > 100);
    guest.refill = true;
    let missing = guest.rx.room() as u64;
    // All numbers but those that are still with the device.
    let with_device: Vec<u64> = (0..128).filter(|n| *n >= missing).collect();
    assert!(with_device.len() < 28);
    for number in 0..missing {
        guest.give(number);
    }
    guest.rx.kick();
    let mut seen = Vec::new();
    while seen.len() < sent.len() {
        seen.extend(guest.wait_for(|header| header.op == Op::Data.number()).1);
        guest.answer(&request, Op::CreditUpdate, 1 << 20, seen.len() as u32, &[]);
    }
    assert!(seen == sent);
    drop(writer.join().unwrap());
}

#[test]
fn one_reader_that_stalls_holds_up_nobody_else() {
    let mut guest = Guest::started();
    let (stalled, stalled_request) = guest.open(0);
    // Both ways: the guest gives it no credit, and the host does not read it.
    (&stalled).write_all(b"never read").unwrap();
    guest.answer(&stalled_request, Op::Data, 0, 0, &pattern(0, stalled_request.buffer as usize));
    let mut streams: Vec<(UnixStream, Header)> = (0..20).map(|_| guest.open(1 << 18)).collect();
    for (number, (host, request)) in streams.iter_mut().enumerate() {
        host.write_all(&pattern(number, 50_000)).unwrap();
        guest.answer(request, Op::Data, 1 << 18, 0, &pattern(number + 100, 10_000));
    }
    let mut seen: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    while seen.values().map(Vec::len).sum::<usize>() < 20 * 50_000 {
        let (header, data) = guest.wait_for(|header| header.op == Op::Data.number());
        seen.entry(header.source_port).or_default().extend(data);
    }
    for (number, (host, request)) in streams.iter_mut().enumerate() {
        assert!(seen[&request.source_port] == pattern(number, 50_000));
        let mut data = vec![0; 10_000];
        host.read_exact(&mut data).unwrap();
        assert!(data == pattern(number + 100, 10_000));
    }
    drop(stalled);
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::started();
    let mut streams: Vec<(UnixStream, Header)> = (0..8).map(|_| guest.open(1 << 20)).collect();
    guest.refill = false;
    // Everything is there before the guest has buffers for it.
    while guest.rx.room() < 128 {
        streams[0].0.write_all(&[0; 4000]).unwrap();
        std::thread::sleep(Duration::from_micros(200));
        guest.poll();
    }
    guest.seen.clear();
    for (host, _) in &mut streams {
        host.write_all(&[1; 100_000]).unwrap();
    }
    std::thread::sleep(Duration::from_millis(20));
    (0..128).for_each(|number| guest.give(number));
    guest.rx.kick();
    std::thread::sleep(Duration::from_millis(100));
    guest.poll();
    let mut shares: BTreeMap<u32, usize> = BTreeMap::new();
    for (header, data) in &guest.seen {
        *shares.entry(header.source_port).or_default() += data.len();
    }
    assert_eq!(shares.len(), 8, "{shares:?}");
    let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
    assert!(*most <= 2 * least, "{shares:?}");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let data = pattern(4, request.buffer as usize);
    let mut sent = 0;
    // Fill the socket, then this process.
    for round in 0_u64.. {
        guest.poll();
        let latest = guest.seen.iter().rev().find(|(header, _)| header.op == Op::CreditUpdate.number());
        let (buffer, forwarded) = latest.map_or((request.buffer, 0), |(h, _)| (h.buffer, h.forwarded));
        let credit = buffer as usize - (sent - forwarded as usize);
        if credit == 0 {
            break;
        }
        let length = credit.min(data.len() - sent % data.len()).min(60_000);
        guest.answer(&request, Op::Data, 1 << 18, 0, &data[sent % data.len()..][..length]);
        sent += length;
        std::thread::sleep(Duration::from_millis(2));
        assert!(round < 1000);
    }
    assert!(guest.device.handle().metrics().waiting > 0);
    guest.shutdown(&request, NEITHER);
    guest.wait_op(Op::Reset);
    guest.expect_streams(1);
    let mut seen = Vec::new();
    host.read_to_end(&mut seen).unwrap();
    assert_eq!(seen.len(), sent);
    assert!(seen.iter().enumerate().all(|(at, byte)| *byte == data[at % data.len()]));
    guest.expect_streams(0);
    assert_eq!(guest.device.handle().metrics().waiting, 0);
}

#[test]
fn what_the_host_sent_before_it_closed_reaches_a_slow_guest() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(0);
    host.write_all(&pattern(5, 100_000)).unwrap();
    drop(host);
    guest.expect_none(Op::Data);
    guest.answer(&request, Op::CreditUpdate, 1 << 20, 0, &[]);
    let mut seen = Vec::new();
    while seen.len() < 100_000 {
        seen.extend(guest.wait_for(|header| header.op == Op::Data.number()).1);
    }
    assert!(seen == pattern(5, 100_000));
    assert_eq!(guest.wait_op(Op::Shutdown).flags, NEITHER);
    guest.expect_streams(1);
    guest.answer(&request, Op::Reset, 0, 0, &[]);
    guest.expect_streams(0);
}

#[test]
fn a_host_that_goes_away_without_reading_frees_the_guest() {
    let mut guest = Guest::started();
    let (host, request) = guest.open(1 << 18);
    guest.answer(&request, Op::Data, 1 << 18, 0, &pattern(0, request.buffer as usize));
    drop(host);
    let end = guest.wait_for(|header| header.op == Op::Shutdown.number() && header.flags == NEITHER).0;
    assert_eq!(end.source_port, request.source_port);
    // A guest that never answers that is given up.
    guest.wait_op(Op::Reset);
    guest.expect_streams(0);
    assert_eq!(guest.device.handle().metrics().waiting, 0);
}

#[test]
fn a_guest_that_will_not_receive_makes_the_host_stop() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(0);
    guest.shutdown(&request, NO_RECEIVE);
    let start = Instant::now();
    while host.write_all(&[0; 1000]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    guest.answer(&request, Op::Data, 0, 0, b"still");
    let mut text = [0; 5];
    host.read_exact(&mut text).unwrap();
}

#[test]
fn packets_that_make_no_sense_end_their_stream_at_most() {
    let mut guest = Guest::started();
    let (mut good, good_request) = guest.open(1 << 18);
    let op_of = |op: u16| move |to: &Header| Header { op, ..reply(to, Op::Data, 1 << 18, 0, 0) };
    type Bad = Box<dyn Fn(&Header) -> Header>;
    let bad: Vec<(&str, Bad)> = vec![
        ("no such operation", Box::new(op_of(0))),
        ("no such operation", Box::new(op_of(8))),
        ("no such operation", Box::new(op_of(0xffff))),
        ("a second request", Box::new(op_of(1))),
        ("a second response", Box::new(op_of(2))),
        ("longer than its chain", Box::new(|to| reply(to, Op::Data, 1 << 18, 0, 1))),
        ("longer than any", Box::new(|to| reply(to, Op::Data, 1 << 18, 0, u32::MAX as usize))),
    ];
    for (what, make) in &bad {
        let (mut host, request) = guest.open(1 << 18);
        guest.send(make(&request), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!(reset.source_port, request.source_port, "{what}");
        assert!(closes(&mut host), "{what}");
    }
    // For streams that do not exist: a reset, or nothing.
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::CreditRequest] {
        guest.send(from_guest(77, 4711, op), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (4711, 77));
    }
    for op in [Op::Reset, Op::CreditUpdate] {
        guest.send(from_guest(77, 4711, op), &[]);
    }
    // Of a seqpacket socket, or of other addresses.
    guest.send(Header { kind: 2, ..from_guest(78, LOGS, Op::Request) }, &[]);
    guest.wait_op(Op::Reset);
    guest.send(Header { source_cid: 9, ..from_guest(79, LOGS, Op::Request) }, &[]);
    guest.send(Header { destination_cid: 1, ..from_guest(79, LOGS, Op::Request) }, &[]);
    guest.expect_none(Op::Reset);
    guest.expect_none(Op::Response);
    // Nobody else noticed.
    guest.answer(&good_request, Op::Data, 1 << 18, 0, b"fine");
    let mut text = [0; 4];
    good.read_exact(&mut text).unwrap();
    assert_eq!(guest.device.handle().metrics().violations, bad.len() as u64);
}

#[test]
fn a_duplicate_request_of_the_guest_resets_its_stream() {
    let mut guest = Guest::started();
    let (mut service, opened) = guest.open_log(5000);
    guest.answer(&opened, Op::Data, 1 << 18, 0, b"x");
    guest.send(from_guest(5000, LOGS, Op::Request), &[]);
    guest.wait_op(Op::Reset);
    let mut seen = Vec::new();
    service.read_to_end(&mut seen).unwrap();
    assert_eq!(seen, b"x");
    // The port can be used again.
    guest.open_log(5000);
}

#[test]
fn chains_of_any_shape_harm_nobody() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let header = |length| reply(&request, Op::Data, 1 << 18, 0, length);
    let at = TX_AT + 70 * TX_BUFFER;
    guest.memory.write_slice(&header(4).bytes(), GuestAddress(at)).unwrap();
    guest.memory.write_slice(b"good", GuestAddress(at + 44)).unwrap();
    let readable = |address, length| Buffer { address, length, writable: false };
    // Cut anywhere, with empty buffers in between.
    let cuts: Vec<Buffer> = [(0, 1), (1, 0), (1, 20), (21, 25), (46, 0), (46, 2)]
        .map(|(offset, length)| readable(at + offset, length))
        .into();
    guest.tx.add(&cuts);
    guest.tx.add(&[readable(at, 48)]);
    // Too short; nothing; out of memory; across its end; the wrong way; huge.
    guest.tx.add(&[readable(at, 43)]);
    guest.tx.add(&[readable(at, 0)]);
    guest.tx.add(&[readable(1 << 40, 48)]);
    guest.tx.add(&[readable(u64::MAX - 10, 48)]);
    guest.tx.add(&[readable((16 << 20) - 10, 48)]);
    guest.tx.add(&[Buffer { address: at, length: 48, writable: true }]);
    guest.tx.add(&[readable(at, 44), Buffer { address: at, length: 4, writable: true }]);
    guest.tx.add(&[readable(at, u32::MAX)]);
    guest.tx.kick();
    let mut text = [0; 8];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"goodgood");

    // A loop; a next beyond the table; an indirect table that is itself, or too long, or out of memory.
    let heads: Vec<u16> = (0..4).map(|_| guest.tx.add(&[readable(at, 44)])).collect();
    guest.poll();
    guest.tx.write_descriptor(heads[0], at, 44, NEXT, heads[0]);
    guest.tx.write_descriptor(heads[1], at, 44, NEXT, 5000);
    guest.tx.write_descriptor(heads[2], 0x4000, 128 * 16, INDIRECT, 0);
    guest.tx.write_descriptor(heads[3], 1 << 41, 65535 * 16, INDIRECT | WRITE, 0);
    for head in heads {
        guest.tx.offer(head);
    }
    guest.tx.kick();
    let (_, other) = guest.open(1 << 18);
    assert_ne!(other.source_port, request.source_port);
    assert_eq!(guest.interrupt.device_status(), 0);
}

#[test]
fn buffers_of_any_shape_get_what_fits_and_the_useless_ones_go_back() {
    let mut guest = Guest::new();
    // Only these: none of use but the last two.
    guest.rx = Ring::new(&guest.memory, 0, 128, 0x1000);
    let writable = |address, length| Buffer { address, length, writable: true };
    guest.rx.add(&[writable(RX_AT, 44)]);
    guest.rx.add(&[writable(RX_AT, 0)]);
    guest.rx.add(&[writable(1 << 40, 4096)]);
    guest.rx.add(&[Buffer { address: RX_AT, length: 4096, writable: false }]);
    guest.rx.add(&[writable(RX_AT, 10), writable(RX_AT + 10, 40)]);
    guest.rx.add(&[writable(RX_AT + 4096, 45)]);
    guest.activate();
    let mut host = guest.connect();
    let start = Instant::now();
    let mut back = Vec::new();
    while back.len() < 5 {
        back.extend(guest.rx.take());
        assert!(start.elapsed() < Duration::from_secs(10), "{back:?}");
    }
    assert_eq!(back.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [0, 0, 0, 0, 44]);
    let mut bytes = [0; HEADER];
    guest.memory.read_slice(&mut bytes, GuestAddress(RX_AT)).unwrap();
    let request = Header::parse(&bytes);
    host.write_all(b"ab").unwrap();
    guest.answer(&request, Op::Response, 1 << 18, 0, &[]);
    while back.len() < 6 {
        back.extend(guest.rx.take());
        assert!(start.elapsed() < Duration::from_secs(10), "{back:?}");
    }
    assert_eq!(back[5].1, 45);
}

#[test]
fn a_ring_that_lies_needs_a_reset_and_the_device_serves_again_after_it() {
    let mut guest = Guest::started();
    let (mut host, _) = guest.open(1 << 18);
    guest.tx.set_available_index(5000);
    guest.tx.kick();
    assert!(closes(&mut host));
    assert_ne!(guest.interrupt.device_status(), 0);
    guest.device.reset();
    guest.interrupt.reset();
    let mut again = Guest::started();
    std::mem::swap(&mut guest.device, &mut again.device);
    drop(guest);
    again.rx = Ring::new(&again.memory, 0, 128, 0x1000);
    again.tx = Ring::new(&again.memory, 1, 128, 0x4000);
    again.event = Ring::new(&again.memory, 2, 8, 0x8000);
    for address in [0x1000, 0x4000, 0x8000] {
        again.memory.write_slice(&[0; 0x1000], GuestAddress(address)).unwrap();
    }
    (0..128).for_each(|number| again.give(number));
    again.activate();
}

#[test]
fn a_flood_of_unanswerable_packets_holds_up_the_guest_and_not_the_device() {
    let mut guest = Guest::started();
    guest.refill = false;
    // No buffers for answers: packets must wait, and memory stays bounded.
    let mut sent = 0_u32;
    while guest.tx.room() >= 2 && sent < 2000 {
        let address = TX_AT + u64::from(sent % 64) * TX_BUFFER;
        let header = from_guest(sent, 4711, Op::Data);
        guest.memory.write_slice(&header.bytes(), GuestAddress(address)).unwrap();
        guest.tx.add(&[Buffer { address, length: HEADER as u32, writable: false }]);
        guest.tx.kick();
        sent += 1;
        std::thread::sleep(Duration::from_micros(100));
        while guest.tx.take().is_some() {}
    }
    assert!(sent < 600, "{sent}");
    // 128 in the guest's buffers, 128 waiting, 128 in the queue.
    guest.poll();
    guest.refill = true;
    (0..guest.rx.room() as u64).for_each(|number| guest.give(number));
    guest.rx.kick();
    let start = Instant::now();
    while guest.seen.len() < sent as usize {
        guest.poll();
        assert!(start.elapsed() < Duration::from_secs(10), "{} of {sent}", guest.seen.len());
    }
}

#[test]
fn there_is_an_end_to_streams_for_guest_and_host() {
    let mut guest = Guest::started();
    let mut services = Vec::new();
    for port in 0..512 {
        services.push(guest.open_log(10_000 + port));
    }
    guest.send(from_guest(99, LOGS, Op::Request), &[]);
    assert_eq!(guest.wait_op(Op::Reset).destination_port, 99);
    let mut hosts = Vec::new();
    for _ in 0..512 {
        hosts.push(guest.open(1 << 18));
    }
    let waiting = guest.connect();
    guest.expect_none(Op::Request);
    hosts.pop();
    let end = guest.wait_op(Op::Shutdown);
    guest.answer(&end, Op::Reset, 0, 0, &[]);
    guest.wait_op(Op::Request);
    drop(waiting);
}

#[test]
fn a_paused_device_rests_and_goes_on_with_its_streams() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    guest.device.pause().unwrap();
    host.write_all(b"while paused").unwrap();
    guest.answer(&request, Op::Data, 1 << 18, 0, b"from a paused one");
    guest.expect_none(Op::Data);
    guest.device.resume().unwrap();
    assert_eq!(guest.wait_for(|header| header.op == Op::Data.number()).1, b"while paused");
    let mut text = [0; 17];
    host.read_exact(&mut text).unwrap();
}

#[test]
fn a_restored_device_is_silent_until_the_driver_has_taken_the_transport_reset() {
    let mut guest = Guest::started();
    let (mut host, _) = guest.open(1 << 18);
    assert!(guest.device.save().is_err());
    guest.device.pause().unwrap();
    let state = guest.device.save().unwrap();
    assert!(closes(&mut host));
    let text = serde_json::to_string(&state).unwrap();
    let state: crate::devices::virtio::DeviceState = serde_json::from_str(&text).unwrap();
    guest.poll();

    // Another device takes over the same memory.
    let mut other = Guest::new();
    other.device.restore(state.inner).unwrap();
    std::mem::swap(&mut guest.device, &mut other.device);
    std::mem::swap(&mut guest.directory, &mut other.directory);
    drop(other);
    let sizes = guest.device.queue_sizes().to_vec();
    let rings = [&guest.rx, &guest.tx, &guest.event];
    let queues =
        state.queues.iter().zip(sizes).zip(rings).enumerate().map(|(index, ((saved, size), ring))| {
            let queue = saved.restore(size).unwrap();
            crate::devices::virtio::ActiveQueue::new(index as u16, queue, ring.kick_event())
        });
    let queues: Vec<_> = queues.collect();
    guest.device.activate(guest.activation(queues)).unwrap();
    let host = guest.connect();
    // A machine that goes on kicks everything once; that is no answer.
    for ring in [&guest.rx, &guest.tx, &guest.event] {
        ring.kick();
    }
    guest.expect_none(Op::Request);
    let (_, length) = guest.event.take().unwrap();
    assert_eq!(length, 4);
    guest.event.add(&[Buffer { address: 0x9000, length: 8, writable: true }]);
    guest.event.kick();
    guest.wait_op(Op::Request);
    drop(host);
}

#[test]
fn a_state_that_is_none_is_refused() {
    let mut guest = Guest::new();
    for text in ["{}", "[]", "7", r#"{"reset":"Maybe"}"#, r#"{"reset":{"Sent":99999999}}"#] {
        assert!(guest.device.restore(serde_json::from_str(text).unwrap()).is_err(), "{text}");
    }
    guest.device.restore(serde_json::Value::Null).unwrap();
}

#[test]
fn the_configuration_tells_the_address_and_nothing_beyond() {
    let guest = Guest::new();
    let mut bytes = [0xff; 12];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for offset in [8, 9, u64::MAX] {
        guest.device.read_config(offset, &mut bytes);
        assert_eq!(bytes, [0; 12]);
    }
}

#[test]
fn a_quiet_stream_costs_as_little_as_the_documentation_says() {
    let own = size_of::<stream::Stream>() + size_of::<Box<stream::Stream>>();
    // Entries of the table, of the worker's list of descriptors and of the guest's ports, in trees that are half full.
    let tables = 2 * (16 + 8 + 12);
    assert!(own + tables <= 500, "{own} + {tables}");
}
