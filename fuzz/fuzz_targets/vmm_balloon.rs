//! A guest that plays with its balloon: page numbers and free ranges, in memory or nowhere, statistics that are none.
#![no_main]

use std::sync::OnceLock;

use hull_fuzz::ring::{Input, MEMORY, Ring, memory};
use hull_vmm::devices::virtio::balloon::balloon;
use hull_vmm::devices::virtio::{Activation, Interrupt, VirtioDevice, Worker};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const DATA: u64 = 0x4_0000;

fn worker() -> &'static Worker {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    WORKER.get_or_init(|| Worker::start("small", || Ok(())).unwrap())
}

fuzz_target!(|data: &[u8]| {
    let memory = memory();
    let mut input = Input(data);
    let (mut device, handle) = balloon(worker()).unwrap();
    let sizes = device.queue_sizes().to_vec();
    let mut rings: Vec<_> =
        sizes.iter().zip(0..).map(|(size, at)| Ring::new(&memory, 0x4000 * at, *size)).collect();
    let event_idx = input.u8() & 1 == 0;
    let queues = rings.iter().zip(0..).map(|(ring, index)| ring.queue(index, event_idx)).collect();
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    let features = device.features();
    device.activate(Activation { memory: memory.clone(), features, queues, interrupt }).unwrap();
    while !input.is_empty() {
        let ring = usize::from(input.u8()) % rings.len();
        match input.u8() % 6 {
            0 => {
                let mut buffers = Vec::new();
                for _ in 0..input.u8() % 8 {
                    let address = DATA + u64::from(input.u16()) * 0x100;
                    let _ = memory.write_slice(&input.bytes::<40>(), GuestAddress(address));
                    buffers.push((address, input.number(), ring > 2));
                }
                if !buffers.is_empty() {
                    rings[ring].add(&buffers);
                }
            }
            1 => {
                let address = u64::from(input.u32()) << (input.u8() % 32);
                let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
                rings[ring].write_descriptor(input.u16(), address, length, flags, next);
                let head = input.u16();
                rings[ring].offer(head % 64);
            }
            2 => {
                let address = u64::from(input.u32()) % MEMORY;
                let _ = memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
            }
            3 => device.write_config(u64::from(input.u8()), &input.bytes::<4>()),
            4 => {
                handle.set_target(u64::from(input.u32()) << 8);
                handle.ask_statistics();
                let _ = (handle.size(), handle.statistics(), handle.released());
            }
            _ => {
                device.pause().unwrap();
                let state = device.save().unwrap();
                // What a device saved is a state of it.
                device.restore(state.inner).unwrap();
                device.resume().unwrap();
            }
        }
        rings[ring].kick();
    }
    device.pause().unwrap();
    device.resume().unwrap();
    device.reset();
});
