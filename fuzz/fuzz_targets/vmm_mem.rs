//! A guest that plugs and unplugs whatever it likes. It never has more than it was asked to have.
#![no_main]

use std::sync::{Arc, OnceLock};

use hull_fuzz::ring::{Input, Ring};
use hull_vmm::devices::virtio::mem::{BLOCK, mem};
use hull_vmm::devices::virtio::{Activation, GuestMemory, Interrupt, VirtioDevice, Worker};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const START: u64 = 4 << 20;
const LENGTH: u64 = 16 << 20;
const REQUESTS: u64 = 0x1_0000;

fn worker() -> &'static Worker {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    WORKER.get_or_init(|| Worker::start("small", || Ok(())).unwrap())
}

fuzz_target!(|data: &[u8]| {
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(START), LENGTH as usize)];
    let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
    let mut input = Input(data);
    let (mut device, handle) = mem(START, LENGTH, worker()).unwrap();
    let mut ring = Ring::new(&memory, 0, 16);
    let queues = vec![ring.queue(0, input.u8() & 1 == 0)];
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    let features = device.features();
    device.activate(Activation { memory: memory.clone(), features, queues, interrupt }).unwrap();
    let mut largest = 0;
    let mut turn = 0;
    while !input.is_empty() {
        match input.u8() % 6 {
            0..=2 => {
                let at = REQUESTS + turn % 64 * 0x100;
                turn += 1;
                let block = if input.u8() < 240 { u64::from(input.u8() % 10) * BLOCK } else { u64::from(input.u32()) };
                let request = [
                    u64::from(input.u8() % 5).to_le_bytes(),
                    (START + block).to_le_bytes(),
                    u64::from(input.number()).to_le_bytes(),
                ];
                let _ = memory.write_slice(&request.concat(), GuestAddress(at));
                let cut = u32::from(input.u8() % 25);
                ring.add(&[(at, cut, false), (at + u64::from(cut), 24 - cut, false), (at + 64, input.number(), true)]);
            }
            3 => {
                let address = u64::from(input.u32()) << (input.u8() % 32);
                let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
                ring.write_descriptor(input.u16(), address, length, flags, next);
                let head = input.u16();
                ring.offer(head % 17);
            }
            4 => {
                let bytes = u64::from(input.u8() % 10) * BLOCK;
                if handle.resize(bytes).is_ok() {
                    largest = largest.max(bytes);
                }
            }
            _ => {
                device.pause().unwrap();
                let state = device.save().unwrap();
                device.restore(state.inner).unwrap();
                device.resume().unwrap();
            }
        }
        ring.kick();
        assert!(handle.plugged() <= largest, "more is plugged than was ever asked for");
    }
    device.pause().unwrap();
    device.resume().unwrap();
    device.reset();
});
