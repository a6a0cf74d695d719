//! A guest that plays with its vsock device: packets of all kinds, buffers of all shapes, bytes anywhere in memory, while
//! hosts connect, write, read and leave.
#![no_main]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, OnceLock};

use hull_fuzz::ring::{Input, MEMORY, Ring, memory};
use hull_vmm::devices::virtio::vsock::{Service, Vsock};
use hull_vmm::devices::virtio::{Activation, Interrupt, Memory, VirtioDevice, Worker};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const PACKETS: u64 = 0x4_0000;
const BUFFERS: u64 = 0x8_0000;

/// Takes streams and reads some of them.
#[derive(Default)]
struct Sink(Mutex<Vec<UnixStream>>);

impl Service for Sink {
    fn accept(&self, stream: OwnedFd) {
        let stream = UnixStream::from(stream);
        let _ = stream.set_nonblocking(true);
        self.0.lock().unwrap().push(stream);
    }
}

struct Host {
    worker: Worker,
    listener: UnixListener,
    address: SocketAddr,
}

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        let name = format!("hull-fuzz-vsock-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        Host { worker: Worker::start("vsock", || Ok(())).unwrap(), listener, address }
    })
}

struct Machine {
    memory: Memory,
    device: Vsock,
    rings: [Ring; 3],
    sink: Arc<Sink>,
    hosts: Vec<UnixStream>,
    turn: u64,
}

impl Machine {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 10 {
            0 | 1 => self.packet(input),
            2 => self.connect(),
            3 => self.host(input),
            4 => self.give(input),
            5 => self.scribble(input),
            6 => self.descriptor(input),
            7 => self.rings[usize::from(input.u8() % 3)].kick(),
            8 => self.rest(input.u8()),
            _ => {
                let mut streams = self.sink.0.lock().unwrap();
                match input.u8() {
                    0..128 => streams.iter_mut().for_each(|stream| drop(stream.read(&mut [0; 4096]))),
                    _ => drop(streams.pop()),
                }
            }
        }
    }

    fn packet(&mut self, input: &mut Input<'_>) {
        let port = |choice: u8| match choice {
            0..64 => 1024,
            64..128 => 1025,
            128..192 => (1 << 30) + u32::from(choice % 8),
            _ => u32::from(choice),
        };
        let [host_port, guest_port] = input.bytes().map(port);
        let payload = input.number() % 0x1_2000;
        let claimed = if input.u8() < 200 { payload } else { input.u32() };
        let mut bytes = 3_u64.to_le_bytes().to_vec();
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(guest_port.to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        bytes.extend(claimed.to_le_bytes());
        bytes.extend(if input.u8() < 250 { 1_u16 } else { 2 }.to_le_bytes());
        bytes.extend(u16::from(input.u8() % 9).to_le_bytes());
        bytes.extend(u32::from(input.u8() % 5).to_le_bytes());
        let credit = if input.u8() < 200 { 1 << 18 } else { input.u32() };
        bytes.extend(credit.to_le_bytes());
        bytes.extend(input.number().to_le_bytes());
        let address = PACKETS + self.turn % 8 * 0x100;
        self.turn += 1;
        let _ = self.memory.write_slice(&bytes, GuestAddress(address));
        self.rings[1].add(&[(address, 44, false), (PACKETS, payload, false)]);
        self.rings[1].kick();
    }

    fn connect(&mut self) {
        if self.hosts.len() < 32
            && let Ok(stream) = UnixStream::connect_addr(&host().address)
        {
            let _ = stream.set_nonblocking(true);
            self.hosts.push(stream);
        }
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let action = input.u8();
        let length = input.u16();
        let Some(stream) = self.hosts.last_mut() else { return };
        match action % 5 {
            0 => drop(stream.write(&vec![7; length.into()])),
            1 => drop(stream.read(&mut vec![0; length.into()])),
            2 => drop(stream.shutdown(Shutdown::Write)),
            3 => drop(self.hosts.pop()),
            _ => self.hosts.rotate_left(1),
        }
    }

    fn give(&mut self, input: &mut Input<'_>) {
        let queue = if input.u8() < 200 { 0 } else { 2 };
        for _ in 0..input.u8() % 32 {
            let length = if input.u8() < 200 { 4096 } else { input.number() };
            let address = BUFFERS + self.turn % 64 * 0x1000;
            self.turn += 1;
            self.rings[queue].add(&[(address, length, true)]);
        }
        self.rings[queue].kick();
    }

    fn scribble(&mut self, input: &mut Input<'_>) {
        let address = u64::from(input.u32()) % MEMORY;
        let _ = self.memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let ring = usize::from(input.u8() % 3);
        let address = u64::from(input.u32()) << (input.u8() % 32);
        let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
        self.rings[ring].write_descriptor(input.u16(), address, length, flags, next);
        if flags & 8 != 0 {
            let head = input.u16();
            self.rings[ring].offer(head);
        }
    }

    /// A pause, perhaps a save, and on.
    fn rest(&mut self, how: u8) {
        self.device.pause().unwrap();
        if how > 200 {
            self.device.save().unwrap();
        }
        self.device.resume().unwrap();
    }
}

fuzz_target!(|data: &[u8]| {
    let host = host();
    let memory = memory();
    let sink = Arc::new(Sink::default());
    let service: Arc<dyn Service> = sink.clone();
    let listener = host.listener.try_clone().unwrap().into();
    let device = Vsock::new(host.worker.clone(), listener, BTreeMap::from([(1025, service)])).unwrap();
    let rings = [(0, 128), (0x4000, 128), (0x8000, 8)].map(|(base, size)| Ring::new(&memory, base, size));
    let mut input = Input(data);
    let event_idx = input.u8() & 1 != 0;
    let queues = (0..3).map(|index| rings[usize::from(index)].queue(index, event_idx)).collect();
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    let mut machine = Machine { memory: memory.clone(), device, rings, sink, hosts: Vec::new(), turn: 0 };
    machine.device.activate(Activation { memory, features: 1 << 29 | 1 << 32, queues, interrupt }).unwrap();
    while !input.is_empty() {
        machine.step(&mut input);
    }
    machine.rest(0);
    machine.rest(255);
    machine.device.reset();
    // What nobody took from the backlog is not for the next one.
    while host.listener.accept().is_ok() {}
});
