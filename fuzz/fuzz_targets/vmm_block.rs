//! A guest that plays with its disks: requests of all shapes, well-formed or not, chains that are none, bytes anywhere in
//! memory, while the host fills and clears what is behind them. A layer never changes, a disk never grows.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use hull_fuzz::ring::{Input, MEMORY, Ring, memory};
use hull_vmm::devices::virtio::block::{
    BlockDevice, BlockThreads, Confine, ImagesHandle, OnFault, ScratchHandle, SlotHandle, images, scratch, slot,
};
use hull_vmm::devices::virtio::{Activation, Interrupt, Memory, VirtioDevice};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const HEADERS: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
const CAPACITY: u64 = 1 << 20;
const LAYER: [u8; 9000] = [0xa5; 9000];

fn threads() -> &'static BlockThreads {
    static THREADS: OnceLock<BlockThreads> = OnceLock::new();
    THREADS.get_or_init(|| {
        let confine: Confine = Arc::new(|| Ok(()));
        BlockThreads::start("block", 3, &confine).unwrap()
    })
}

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn for_reading(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

/// What is behind the disk, for the host to change.
enum Host {
    Images(ImagesHandle),
    Scratch(ScratchHandle),
    Slot(SlotHandle),
}

struct Machine {
    memory: Memory,
    device: BlockDevice,
    host: Host,
    file: File,
    ring: Ring,
    turn: u64,
}

impl Machine {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 8 {
            0..=2 => self.request(input),
            3 => {
                let address = u64::from(input.u32()) % MEMORY;
                let _ = self.memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
            }
            4 => self.descriptor(input),
            5 => self.host(input),
            6 => std::thread::yield_now(),
            _ => {
                self.device.pause().unwrap();
                let state = self.device.save().unwrap();
                serde_json::to_string(&state).unwrap();
                self.device.resume().unwrap();
            }
        }
    }

    fn request(&mut self, input: &mut Input<'_>) {
        let header = HEADERS + self.turn % 64 * 0x400;
        self.turn += 1;
        // READ, WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, or anything.
        let kind = [0, 1, 4, 8, 11, 13, input.number(), 0][usize::from(input.u8() % 8)];
        let sector = match input.u8() {
            255 => u64::from_le_bytes(input.bytes()),
            // Where a layer begins.
            choice if choice & 1 == 0 => 4096 + u64::from(choice) / 8,
            _ => u64::from(input.number()),
        };
        let _ = self.memory.write_obj(kind, GuestAddress(header));
        let _ = self.memory.write_obj(sector, GuestAddress(header + 8));
        let mut buffers = vec![(header, 16, false)];
        for _ in 0..input.u8() % 6 {
            let address = DATA + u64::from(input.u8()) * 0x800;
            let length = if input.u8() < 200 { 512 * u32::from(input.u8() % 16) } else { input.number() };
            buffers.push((address, length, kind == 0 || kind == 8));
        }
        if kind == 11 || kind == 13 {
            let range = [sector.to_le_bytes(), u64::from(input.number()).to_le_bytes()].concat();
            let _ = self.memory.write_slice(&range, GuestAddress(header + 64));
            buffers.push((header + 64, 16, false));
        }
        buffers.push((header + 32, 1, true));
        self.ring.add(&buffers);
        self.ring.kick();
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let address = u64::from(input.u32()) << (input.u8() % 32);
        let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
        self.ring.write_descriptor(input.u16(), address, length, flags, next);
        if flags & 8 != 0 {
            let head = input.u16();
            self.ring.offer(head);
            self.ring.kick();
        }
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        match &self.host {
            Host::Images(images) if choice & 1 == 0 => drop(images.remove(&(choice / 2 % 4).to_string())),
            Host::Images(images) => {
                let key = (choice / 2 % 4).to_string();
                let _ = images.add(&key, for_reading(&self.file), u64::from(input.u16()));
            }
            Host::Scratch(scratch) => drop(scratch.allocated().unwrap()),
            Host::Slot(slot) if choice & 1 == 0 => slot.clear().unwrap(),
            Host::Slot(slot) => drop(slot.fill(self.file.try_clone().unwrap(), choice & 2 != 0)),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let memory = memory();
    let mut input = Input(data);
    let choice = input.u8();
    let no_faults: OnFault = Arc::new(|_, _| {});
    let backing = file(&LAYER);
    let (mut device, host) = match choice % 3 {
        0 => {
            let (device, handle) = images(threads(), no_faults);
            handle.add("0", for_reading(&backing), 9000).unwrap();
            (device, Host::Images(handle))
        }
        1 => {
            let (device, handle) =
                scratch(backing.try_clone().unwrap(), CAPACITY, threads(), no_faults).unwrap();
            handle.open(0, CAPACITY / 2 / 4096 * 4096).unwrap();
            (device, Host::Scratch(handle))
        }
        _ => {
            let (device, handle) = slot(0, threads(), no_faults);
            handle.fill(backing.try_clone().unwrap(), choice & 64 != 0).unwrap();
            (device, Host::Slot(handle))
        }
    };
    let ring = Ring::new(&memory, 0, device.queue_sizes()[0]);
    let queues = vec![ring.queue(0, choice & 128 != 0)];
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    device.activate(Activation { memory: memory.clone(), features: device.features(), queues, interrupt }).unwrap();
    let mut machine = Machine { memory, device, host, file: backing, ring, turn: 0 };
    while !input.is_empty() {
        machine.step(&mut input);
    }
    machine.device.reset();
    let length = machine.file.metadata().unwrap().len();
    match machine.host {
        Host::Images(_) => {
            let mut content = [0; LAYER.len()];
            machine.file.read_exact_at(&mut content, 0).unwrap();
            assert!(content == LAYER && length == 9000, "a layer has changed");
        }
        Host::Scratch(_) => assert_eq!(length, CAPACITY, "the scratch disk has grown"),
        Host::Slot(_) => assert_eq!(length, 9000, "a volume has grown"),
    }
});
