use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::register::*;
use super::*;
use crate::devices::virtio::GuestMemory;

const FEATURE: u64 = 1 << 5;
const SIZES: [u16; 2] = [16, 8];

/// A device that does nothing but tell what it was asked.
struct Double {
    config: Arc<AtomicU64>,
    seen: Arc<Mutex<Vec<String>>>,
    queues: Vec<ActiveQueue>,
    fails: bool,
}

impl Double {
    fn saw(&self, what: impl Into<String>) {
        self.seen.lock().unwrap().push(what.into());
    }
}

impl VirtioDevice for Double {
    fn name(&self) -> &str {
        "double"
    }
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn features(&self) -> u64 {
        FEATURE | 1 << VIRTIO_RING_F_EVENT_IDX
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.load(Ordering::SeqCst).to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(i));
            *byte = at.and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.saw(format!("config {offset} {data:?}"));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.fails {
            return Err(ActivateError::Setup {
                device: "double".into(),
                reason: "it is told to fail".into(),
            });
        }
        self.saw(format!("activate {:#x}", activation.features));
        self.queues = activation.queues;
        Ok(())
    }
    fn reset(&mut self) {
        self.saw("reset");
        self.queues.clear();
    }
    fn pause(&mut self) -> Result<(), StateError> {
        self.saw("pause");
        Ok(())
    }
    fn resume(&mut self) -> Result<(), StateError> {
        self.saw("resume");
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, StateError> {
        Ok(DeviceState {
            queues: self.queues.iter().map(ActiveQueue::save).collect(),
            inner: serde_json::json!(self.config.load(Ordering::SeqCst)),
        })
    }
    fn restore(&mut self, inner: serde_json::Value) -> Result<(), StateError> {
        self.config.store(inner.as_u64().unwrap_or(0), Ordering::SeqCst);
        Ok(())
    }
}

struct Machine {
    transport: MmioTransport,
    config: Arc<AtomicU64>,
    seen: Arc<Mutex<Vec<String>>>,
    interrupt: Interrupt,
    memory: Memory,
    kicks: Vec<EventFd>,
}

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

impl Machine {
    fn new() -> Self {
        Self::with(Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()), false)
    }

    fn with(memory: Memory, fails: bool) -> Self {
        let (config, seen) = (Arc::new(AtomicU64::new(0x1234_5678)), Arc::default());
        let device =
            Double { config: Arc::clone(&config), seen: Arc::clone(&seen), queues: Vec::new(), fails };
        let interrupt = Interrupt::new(event());
        let kicks: Vec<_> = SIZES.iter().map(|_| event()).collect();
        let theirs = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
        let transport =
            MmioTransport::new(Box::new(device), Arc::clone(&memory), interrupt.clone(), theirs).unwrap();
        Self { transport, config, seen, interrupt, memory, kicks }
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes()).unwrap();
    }

    /// Up to FEATURES_OK.
    fn negotiate(&mut self, features: u64) -> u32 {
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        self.set(DRIVER_FEATURES_SELECT, 0);
        self.set(DRIVER_FEATURES, features as u32);
        self.set(DRIVER_FEATURES_SELECT, 1);
        self.set(DRIVER_FEATURES, (features >> 32) as u32);
        self.set(STATUS, 0xb);
        self.get(STATUS)
    }

    fn set_up(&mut self, queue: u32, size: u32) -> u32 {
        let at = 0x1000 * (1 + queue);
        for (register, value) in [
            (QUEUE_SELECT, queue),
            (QUEUE_SIZE, size),
            (DESCRIPTORS_LOW, at),
            (DESCRIPTORS_HIGH, 0),
            (DRIVER_AREA_LOW, at + 0x400),
            (DRIVER_AREA_HIGH, 0),
            (DEVICE_AREA_LOW, at + 0x800),
            (DEVICE_AREA_HIGH, 0),
            (QUEUE_READY, 1),
        ] {
            self.set(register, value);
        }
        self.get(QUEUE_READY)
    }

    fn start(&mut self) {
        assert_eq!(self.negotiate(1 << VIRTIO_F_VERSION_1 | FEATURE), 0xb);
        assert_eq!(self.set_up(0, 16), 1);
        assert_eq!(self.set_up(1, 4), 1);
        self.set(STATUS, 0xf);
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

#[test]
fn a_driver_finds_a_modern_device() {
    let mut machine = Machine::new();

    assert_eq!(machine.get(0), 0x7472_6976);
    assert_eq!((machine.get(register::VERSION), machine.get(DEVICE_ID)), (2, 42));
    machine.set(DEVICE_FEATURES_SELECT, 1);
    assert_eq!(machine.get(DEVICE_FEATURES), 1, "VIRTIO_F_VERSION_1 is bit 32");
    machine.set(DEVICE_FEATURES_SELECT, 2);
    assert_eq!(machine.get(DEVICE_FEATURES), 0);
    machine.set(QUEUE_SELECT, 1);
    assert_eq!(machine.get(QUEUE_SIZE_MAX), 8);
    machine.set(QUEUE_SELECT, 2);
    assert_eq!(machine.get(QUEUE_SIZE_MAX), 0, "there is no such queue");
    assert_eq!(machine.get(0xb0), u32::MAX, "there is no shared memory");
}

#[test]
fn a_driver_that_keeps_to_the_specification_gets_a_served_device() {
    let mut machine = Machine::new();

    machine.start();

    assert_eq!(machine.seen(), [format!("activate {:#x}", 1u64 << 32 | FEATURE)]);
    assert_eq!(machine.get(STATUS), 0xf);
    assert!(machine.transport.is_active());
    machine.set(QUEUE_NOTIFY, 1);
    assert!(machine.kicks[1].read().is_ok() && machine.kicks[0].read().is_err());
}

#[test]
fn features_that_were_not_offered_or_no_modern_driver_are_refused() {
    for wrong in [FEATURE, 1 << 32 | 1 << 6, 1 << 32 | 1 << 40, u64::MAX] {
        let mut machine = Machine::new();
        assert_eq!(machine.negotiate(wrong), 3, "{wrong:#x}");
        machine.set(STATUS, 0xf);
        assert_eq!(machine.seen(), [""; 0]);
    }
}

#[test]
fn no_step_can_be_left_out_and_none_taken_back() {
    let mut machine = Machine::new();
    machine.set(STATUS, 0xf);
    assert_eq!(machine.get(STATUS), 0);
    machine.set(STATUS, 1);
    machine.set(STATUS, 0xb);
    assert_eq!(machine.get(STATUS), 1);
    machine.set(STATUS, 3);
    machine.set(STATUS, 1);
    assert_eq!(machine.get(STATUS), 3);
    machine.set(QUEUE_READY, 1);
    assert_eq!(machine.get(QUEUE_READY), 0, "queues come after the features");
    assert_eq!(machine.seen(), [""; 0]);
}

#[test]
fn nothing_of_a_served_queue_can_be_changed() {
    let mut machine = Machine::new();
    machine.start();

    machine.set(QUEUE_SELECT, 0);
    machine.set(QUEUE_READY, 0);
    machine.set(DESCRIPTORS_LOW, 0xdead_0000);
    machine.set(DRIVER_FEATURES, 0);

    assert_eq!(machine.get(QUEUE_READY), 1);
    machine.transport.pause().unwrap();
    let state = machine.transport.save().unwrap();
    assert_eq!(state.registers.queues[0].descriptors, 0x1000);
    assert_eq!(state.registers.driver_features, 1 << 32 | FEATURE);
}

#[test]
fn queues_that_are_not_in_memory_or_have_no_size_do_not_become_ready() {
    let mut machine = Machine::new();
    machine.negotiate(1 << 32);
    for (size, low, high) in [
        (16, 0xff_ff00, 0),
        (16, 0x1000, 1),
        (16, 0x1004, 0),
        (3, 0x1000, 0),
        (0, 0x1000, 0),
        (32, 0x1000, 0),
    ] {
        machine.set(QUEUE_SELECT, 0);
        machine.set_up(0, size);
        machine.set(QUEUE_READY, 0);
        machine.set(DESCRIPTORS_LOW, low);
        machine.set(DESCRIPTORS_HIGH, high);
        machine.set(QUEUE_READY, 1);
        assert_eq!(machine.get(QUEUE_READY), 0, "{size} {high:x}{low:08x}");
    }
}

#[test]
fn a_device_that_cannot_begin_needs_a_reset_and_says_why() {
    let mut machine = Machine::with(Machine::new().memory, true);
    machine.negotiate(1 << 32);

    let error = machine.transport.write(STATUS, &0xfu32.to_le_bytes()).unwrap_err();

    assert!(error.to_string().contains("told to fail"));
    assert_eq!(machine.get(STATUS), 0x4f);
    assert_eq!(machine.get(INTERRUPT_STATUS), 2);
    machine.set(STATUS, 0);
    assert_eq!((machine.get(STATUS), machine.get(INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn a_reset_makes_the_device_new() {
    let mut machine = Machine::new();
    machine.start();
    machine.seen();

    machine.set(STATUS, 0);

    assert_eq!(machine.seen(), ["reset"]);
    assert!(!machine.transport.is_active());
    machine.set(QUEUE_SELECT, 0);
    assert_eq!((machine.get(STATUS), machine.get(QUEUE_READY)), (0, 0));
    machine.start();
    assert_eq!(machine.seen().len(), 1);
}

#[test]
fn the_generation_changes_with_the_configuration_and_only_then() {
    let mut machine = Machine::new();
    let first = machine.get(CONFIG_GENERATION);
    assert_eq!(machine.get(CONFIG_GENERATION), first);

    machine.config.store(7, Ordering::SeqCst);

    let second = machine.get(CONFIG_GENERATION);
    assert_ne!(second, first);
    assert_eq!(machine.get(CONFIG_GENERATION), second);
    machine.set(STATUS, 0);
    assert_eq!(machine.get(CONFIG_GENERATION), second, "not even a reset takes it back");
}

#[test]
fn interrupts_stay_until_they_are_acknowledged() {
    let mut machine = Machine::new();
    machine.interrupt.queue(0);
    machine.interrupt.config();
    assert_eq!(machine.get(INTERRUPT_STATUS), 3);
    machine.set(INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(machine.get(INTERRUPT_STATUS), 2);
    assert_eq!(machine.interrupt.event().unwrap().read().unwrap(), 2);
}

#[test]
fn a_queue_served_by_another_process_always_has_used_buffers() {
    let mut machine = Machine::new();
    machine.interrupt.served_elsewhere();
    machine.set(INTERRUPT_ACKNOWLEDGE, 3);
    assert_eq!(machine.get(INTERRUPT_STATUS), 1);
}

#[test]
fn odd_accesses_are_nothing() {
    let mut machine = Machine::new();
    for offset in 0..0x1000 {
        for length in [1, 2, 4, 8, 64] {
            machine.transport.read(offset, &mut vec![0xaa; length]);
            machine.transport.write(offset, &vec![0xff; length]).unwrap();
        }
    }
    let mut byte = [0xaa];
    machine.transport.read(1, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_saved_device_goes_on_where_it_stood() {
    let mut machine = Machine::new();
    machine.start();
    // A chain that is waiting: index 3 of the ring that the device has not looked at.
    machine.memory.write_obj(3u16, GuestAddress(0x1402)).unwrap();
    machine.config.store(99, Ordering::SeqCst);
    machine.interrupt.queue(0);
    machine.transport.pause().unwrap();
    let saved = serde_json::to_vec(&machine.transport.save().unwrap()).unwrap();

    let mut copy = Machine::with(Arc::clone(&machine.memory), false);
    copy.transport.restore(serde_json::from_slice(&saved).unwrap()).unwrap();

    assert!(copy.transport.is_active());
    assert_eq!((copy.get(STATUS), copy.get(INTERRUPT_STATUS)), (0xf, 1));
    assert_eq!(copy.config.load(Ordering::SeqCst), 99);
    assert_eq!(copy.seen(), [format!("activate {:#x}", 1u64 << 32 | FEATURE)]);
    assert!(copy.kicks[0].read().is_ok(), "whoever serves it looks again");
    assert!(copy.interrupt.event().unwrap().read().is_ok(), "the driver is told again");
    let mut other = Machine::new();
    let mut state: TransportState = serde_json::from_slice(&saved).unwrap();
    state.name = "another".into();
    assert!(other.transport.restore(state).is_err());
}
