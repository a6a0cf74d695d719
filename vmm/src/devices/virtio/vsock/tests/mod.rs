//! The device with a driver on the other side of real queues, on a real worker.

mod hostile;
mod life;
mod streams;

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HEADER, Header, Op, TYPE_STREAM};
use super::*;
use crate::devices::virtio::driver::{Buffer, Ring};
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
