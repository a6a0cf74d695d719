//! A guest that asks for random numbers in every way.
#![no_main]

use std::sync::OnceLock;

use hull_fuzz::ring::{Input, MEMORY, Ring, memory};
use hull_vmm::devices::virtio::rng::rng;
use hull_vmm::devices::virtio::{Activation, Interrupt, VirtioDevice, Worker};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

fn worker() -> &'static Worker {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    WORKER.get_or_init(|| Worker::start("small", || Ok(())).unwrap())
}

fuzz_target!(|data: &[u8]| {
    let memory = memory();
    let mut input = Input(data);
    let mut device = rng(worker()).unwrap();
    let mut ring = Ring::new(&memory, 0, 64);
    let queues = vec![ring.queue(0, input.u8() & 1 == 0)];
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    let features = device.features();
    device.activate(Activation { memory: memory.clone(), features, queues, interrupt }).unwrap();
    while !input.is_empty() {
        match input.u8() % 4 {
            0 => {
                let mut buffers = Vec::new();
                for _ in 0..input.u8() % 8 + 1 {
                    buffers.push((u64::from(input.u32()) % (2 * MEMORY), input.number(), input.u8() < 200));
                }
                ring.add(&buffers);
            }
            1 => {
                let address = u64::from(input.u32()) << (input.u8() % 32);
                let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
                ring.write_descriptor(input.u16(), address, length, flags, next);
                let head = input.u16();
                ring.offer(head % 65);
            }
            2 => {
                let address = u64::from(input.u32()) % MEMORY;
                let _ = memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
            }
            _ => {
                device.pause().unwrap();
                let _ = device.save().unwrap();
                device.resume().unwrap();
            }
        }
        ring.kick();
    }
    device.pause().unwrap();
    device.resume().unwrap();
    device.reset();
});
