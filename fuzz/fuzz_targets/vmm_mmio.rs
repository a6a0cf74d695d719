//! A driver that does what it likes with the registers of a virtio-mmio device, and with the memory that its queues are
//! in: whatever it does, the device's worker gets bounded work, nothing panics, nothing outside guest memory is touched.
#![no_main]

use std::sync::Arc;

use hull_vmm::devices::virtio::mmio::MmioTransport;
use hull_vmm::devices::virtio::{
    ActivateError, Activation, DeviceState, GuestMemory, Interrupt, StateError, VirtioDevice,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 64 << 10;
const SIZES: [u16; 2] = [16, 256];

/// Serves its queues when the driver's steps say so; each chain is walked and given back.
#[derive(Default)]
struct Device {
    activation: Option<Activation>,
}

impl Device {
    fn serve(&mut self) {
        let Some(activation) = &mut self.activation else { return };
        for queue in &mut activation.queues {
            let served = queue.serve(&activation.memory, &activation.interrupt, |chain| {
                chain.fold(0u32, |sum, descriptor| sum.wrapping_add(descriptor.len()))
            });
            if served.is_err() {
                activation.interrupt.needs_reset();
            }
        }
    }
}

impl VirtioDevice for Device {
    fn name(&self) -> &str {
        "fuzzed"
    }
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn features(&self) -> u64 {
        // INDIRECT_DESC, EVENT_IDX.
        1 << 28 | 1 << 29
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x55);
    }
    // The driver's way to make the worker run.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.serve();
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.activation = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.activation = None;
    }
    fn pause(&mut self) -> Result<(), StateError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), StateError> {
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, StateError> {
        let queues = self.activation.iter().flat_map(|a| a.queues.iter().map(|queue| queue.save())).collect();
        Ok(DeviceState { queues, inner: serde_json::Value::Null })
    }
    fn restore(&mut self, _inner: serde_json::Value) -> Result<(), StateError> {
        Ok(())
    }
}

fn event() -> EventFd {
    EventFd::new(0o4000).expect("an eventfd")
}

fn transport(memory: &Arc<GuestMemory>) -> MmioTransport {
    let kicks = SIZES.iter().map(|_| event()).collect();
    MmioTransport::new(Box::<Device>::default(), Arc::clone(memory), Interrupt::new(event()), kicks)
        .expect("as many kicks as queues")
}

/// Registers and values that get a device going, so that not every input has to find them again.
fn start(transport: &mut MmioTransport) {
    let queue = |index: u32| {
        let at = 0x1000 + 0x4000 * index;
        [(0x30, index), (0x38, 16), (0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000), (0x44, 1)]
    };
    let steps = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 1 << 28 | 1 << 29), (0x70, 0xb)];
    for (register, value) in steps.into_iter().chain(queue(0)).chain(queue(1)).chain([(0x70, 0xf)]) {
        let _ = transport.write(register, &u32::to_le_bytes(value));
    }
}

fuzz_target!(|data: &[u8]| {
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory"));
    let mut transport = transport(&memory);
    let Some((first, steps)) = data.split_first() else { return };
    if first & 1 == 1 {
        start(&mut transport);
    }
    for step in steps.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..step.len()].copy_from_slice(step);
        let [kind, a, b, length, value @ ..] = bytes;
        let offset = u64::from(u16::from_le_bytes([a, b]));
        match kind % 8 {
            0..=2 => drop(transport.write(offset & 0xfc, &value)),
            3 => drop(transport.write(offset, &[kind; 64][..usize::from(length % 65)])),
            4 => transport.read(offset, &mut [0; 64][..usize::from(length % 65)]),
            // The driver writes to its memory, then has the device look.
            5 => drop(memory.write_slice(&value, GuestAddress(offset))),
            6 => drop(transport.write(0x100, &value)),
            _ => {
                let _ = transport.pause();
                let saved = serde_json::to_vec(&transport.save().expect("a state")).expect("JSON");
                transport = self::transport(&memory);
                let _ = transport.restore(serde_json::from_slice(&saved).expect("our own state"));
            }
        }
    }
});
