//! A guest that plays with the queues of its volumes while hull-virtiofsd serves them, and a VMM that hands over queues
//! that are none.
#![no_main]

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};

use hull_fuzz::ring::{Input, MEMORY, Ring};
use hull_fuzz::volumes::{enter_root, own_descriptors, prepare};
use hull_vmm::devices::virtio::Memory;
use hull_vmm::protocol::messages::{MemoryRegion, Queue, QueuePosition, ServeQueues};
use hull_vmm::volumes::ServerAlone;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const REQUESTS: u64 = 0x4_0000;
const REPLIES: u64 = 0x8_0000;
const SIZES: [u16; 2] = [64, 128];

type Host = (Sender<Vec<u8>>, Mutex<Receiver<()>>);

/// The thread that hands over queues; it and those that serve them have a root of their own.
fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        let (sender, inputs) = channel::<Vec<u8>>();
        let (done, finished) = channel();
        std::thread::spawn(move || {
            let own = own_descriptors();
            enter_root();
            let mut server = ServerAlone::new("/volumes", own).unwrap();
            for input in inputs {
                prepare();
                play(&mut server, Input(&input));
                let _ = done.send(());
            }
        });
        (sender, Mutex::new(finished))
    })
}

struct Guest {
    memory: Memory,
    rings: [Ring; 2],
    turn: u64,
}

impl Guest {
    /// A FUSE request, with as much room for its reply as the input says.
    fn request(&mut self, input: &mut Input<'_>, opcode: u8) {
        let place = self.turn % 64;
        self.turn += 1;
        let body = input.bytes::<64>();
        let length = 40 + u32::from(input.u8() % 65);
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(u32::from(opcode % 60).to_le_bytes());
        bytes.extend(self.turn.to_le_bytes());
        bytes.extend(u64::from(input.u8() % 8).to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        let (request, reply) = (REQUESTS + place * 0x100, REPLIES + place * 0x1000);
        let _ = self.memory.write_slice(&bytes, GuestAddress(request));
        // In one piece or two, and the reply too.
        let cut = u32::from(input.u8()) % length;
        let room = 16 * u32::from(input.u8());
        let mut buffers = vec![(request, cut, false), (request + u64::from(cut), length - cut, false)];
        buffers.extend([(reply, room / 2, true), (reply + u64::from(room / 2), room - room / 2, true)]);
        buffers.retain(|(_, length, _)| *length > 0);
        let ring = usize::from(input.u8() < 200);
        self.rings[ring].add(&buffers);
        self.rings[ring].kick();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 6 {
            0..=2 => {
                let opcode = input.u8();
                self.request(input, opcode);
            }
            3 => {
                let address = u64::from(input.u32()) % MEMORY;
                let _ = self.memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
            }
            4 => {
                let ring = usize::from(input.u8() & 1);
                let address = u64::from(input.u32()) << (input.u8() % 32);
                let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
                self.rings[ring].write_descriptor(input.u16(), address, length, flags, next);
                let head = input.u16();
                self.rings[ring].offer(head);
                self.rings[ring].kick();
            }
            _ => std::thread::yield_now(),
        }
    }
}

/// What the VMM says: its descriptors are the memory's file, and a kick and an interrupt for each queue.
fn handed_over(input: &mut Input<'_>) -> ServeQueues {
    let queue = |number: u32| {
        let base = 0x4000 * u64::from(number);
        Queue {
            size: SIZES[number as usize].into(),
            descriptor_table: base,
            available_ring: base + 0x1000,
            used_ring: base + 0x2000,
            position: Some(QueuePosition { next_available: 0, next_used: 0 }),
            kick: 1 + 2 * number,
            call: 2 + 2 * number,
        }
    };
    let mut region = MemoryRegion { address: 0, size: MEMORY, offset: 0, file: 0 };
    let mut queues = vec![queue(0), queue(1)];
    let features = if input.u8() & 1 == 0 { 1 << 29 } else { 0 };
    match input.u8() {
        0..240 => {}
        240..244 => region.size = u64::from(input.u32()) << (input.u8() % 32),
        244..248 => region.offset = u64::from(input.u32()) << (input.u8() % 32),
        248..250 => queues[0].size = input.u32(),
        250..252 => queues[1].available_ring = u64::from(input.u32()) << (input.u8() % 32),
        252..254 => queues[1].kick = input.number(),
        _ => queues[0].position = Some(QueuePosition { next_available: input.u32(), next_used: input.u32() }),
    }
    ServeQueues { regions: vec![region], queues, features }
}

fn play(server: &mut ServerAlone, mut input: Input<'_>) {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(MEMORY).unwrap();
    let part = FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), MEMORY as usize, Some(part))];
    let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
    let rings = [0, 1].map(|number| Ring::new(&memory, 0x4000 * number as u64, SIZES[number]));
    let mut fds: Vec<OwnedFd> = vec![file.into()];
    for ring in &rings {
        fds.extend([duplicate(&ring.kick), duplicate(&EventFd::new(0o4000).unwrap())]);
    }
    let call = handed_over(&mut input);
    let served = server.serve(&call, fds).is_ok();
    let mut guest = Guest { memory, rings, turn: 0 };
    // FUSE_INIT.
    guest.request(&mut Input(&[7, 0, 0, 0, 38, 0, 0, 0]), 26);
    while !input.is_empty() {
        guest.step(&mut input);
    }
    assert_eq!(server.halt(), served);
}

fn duplicate(event: &EventFd) -> OwnedFd {
    let copy = event.try_clone().unwrap().into_raw_fd();
    // SAFETY: it was just made and given away.
    unsafe { OwnedFd::from_raw_fd(copy) }
}

fuzz_target!(|data: &[u8]| {
    let (inputs, finished) = host();
    inputs.send(data.to_vec()).unwrap();
    // It ends early if the thread has panicked.
    finished.lock().unwrap().recv().expect("the queues were given back");
});
