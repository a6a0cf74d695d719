//! The MMIO transport: virtio 1.2, section 4.2, without the legacy interface.
//!
//! A driver that does not keep to the specification harms only itself: what it may not write now is ignored, what it may
//! not read is zero.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceState, Interrupt, Memory, SavedQueue, StateError,
    VirtioDevice,
};

/// Registers (4.2.2, table 4.1).
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const DESCRIPTORS_LOW: u64 = 0x80;
    pub(super) const DESCRIPTORS_HIGH: u64 = 0x84;
    pub(super) const DRIVER_AREA_LOW: u64 = 0x90;
    pub(super) const DRIVER_AREA_HIGH: u64 = 0x94;
    pub(super) const DEVICE_AREA_LOW: u64 = 0xa0;
    pub(super) const DEVICE_AREA_HIGH: u64 = 0xa4;
    pub(super) const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0xb0..=0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;
}
/// Where a driver notifies: an ioeventfd for each queue is put here.
pub const NOTIFY: u64 = register::QUEUE_NOTIFY;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"hull");

/// Device status (2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const FAILED: u32 = 0x80;
    pub(super) const KNOWN: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

/// Bytes of configuration space that are looked at for a change; no device of ours has more.
const CONFIG_SIZE: usize = 128;

/// What the driver has said of a queue.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct QueueSetup {
    size: u16,
    ready: bool,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
}

/// Registers of one device, in front of it.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    registers: Registers,
    /// The configuration space when its generation was last read.
    config_seen: [u8; CONFIG_SIZE],
    active: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
    generation: u32,
}

/// The state of a device and its registers, as saved with a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransportState {
    name: String,
    registers: Registers,
    pending: u32,
    device_status: u32,
    device: DeviceState,
}

impl MmioTransport {
    /// Puts registers in front of `device`. `kicks` are its queues' notifications, one each; `interrupt` its line.
    ///
    /// # Errors
    /// There are more queues than kicks.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Interrupt,
        kicks: Vec<EventFd>,
    ) -> Result<Self, ActivateError> {
        if kicks.len() != device.queue_sizes().len() {
            let reason = "every queue needs a notification".to_owned();
            return Err(ActivateError::Setup { device: device.name().to_owned(), reason });
        }
        let mut transport = Self {
            device,
            memory,
            interrupt,
            kicks,
            registers: Registers::default(),
            config_seen: [0; CONFIG_SIZE],
            active: false,
        };
        transport.registers.queues = transport.unset_queues();
        transport.device.read_config(0, &mut transport.config_seen);
        Ok(transport)
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Whether a driver uses it.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The driver reads at `offset` of the page. Any offset and length may come; what makes no sense reads as zeros.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.device.read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    /// The driver writes at `offset` of the page. Any offset, length and content may come.
    ///
    /// # Errors
    /// The driver said that it is ready, and the device could not begin; it is marked as needing a reset.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ActivateError> {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            // 3.1.1: the configuration space is there for a driver once it has acknowledged the features.
            if self.registers.status & status::FEATURES_OK != 0 {
                self.device.write_config(offset, data);
            }
            return Ok(());
        }
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(4) => self.write_register(offset, u32::from_le_bytes(bytes)),
            _ => Ok(()),
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let queue = self.registers.queues.get(self.registers.queue_select as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.registers.device_features_select {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => {
                let sizes = self.device.queue_sizes();
                sizes.get(self.registers.queue_select as usize).map_or(0, |size| u32::from(*size))
            }
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.pending(),
            register::STATUS => self.registers.status | self.interrupt.device_status(),
            register::CONFIG_GENERATION => self.generation(),
            // 4.2.2: a region of shared memory that is not there has all bits set in its length (and base).
            _ if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    /// Compares the configuration with what it was: no device needs to count its own changes.
    fn generation(&mut self) -> u32 {
        let mut config = [0; CONFIG_SIZE];
        self.device.read_config(0, &mut config);
        if config != self.config_seen {
            self.config_seen = config;
            self.registers.generation = self.registers.generation.wrapping_add(1);
        }
        self.registers.generation
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Result<(), ActivateError> {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.registers.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.registers.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.registers.queue_select = value,
            register::QUEUE_NOTIFY => {
                // An ioeventfd takes these before they come here, unless the number is none.
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            register::INTERRUPT_ACKNOWLEDGE => self.interrupt.acknowledge(value),
            register::STATUS => return self.set_status(value),
            _ => self.set_up_queue(offset, value),
        }
        Ok(())
    }

    fn set_driver_features(&mut self, value: u32) {
        let registers = &mut self.registers;
        // 3.1.1: between DRIVER and FEATURES_OK.
        if registers.status != status::ACKNOWLEDGE | status::DRIVER {
            return;
        }
        match registers.driver_features_select {
            0 => registers.driver_features = registers.driver_features & !0xffff_ffff | u64::from(value),
            1 => registers.driver_features = registers.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        const SET_UP: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        let index = self.registers.queue_select as usize;
        let (Some(max), SET_UP) = (self.device.queue_sizes().get(index).copied(), self.registers.status)
        else {
            return;
        };
        let event_idx = self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let Some(queue) = self.registers.queues.get_mut(index) else { return };
        if offset == register::QUEUE_READY {
            queue.ready = value & 1 == 1 && queue.checked(max, event_idx, &self.memory).is_some();
            return;
        }
        if queue.ready {
            return;
        }
        let low = |address: u64| address & !0xffff_ffff | u64::from(value);
        let high = |address: u64| address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::DESCRIPTORS_LOW => queue.descriptors = low(queue.descriptors),
            register::DESCRIPTORS_HIGH => queue.descriptors = high(queue.descriptors),
            register::DRIVER_AREA_LOW => queue.driver_area = low(queue.driver_area),
            register::DRIVER_AREA_HIGH => queue.driver_area = high(queue.driver_area),
            register::DEVICE_AREA_LOW => queue.device_area = low(queue.device_area),
            register::DEVICE_AREA_HIGH => queue.device_area = high(queue.device_area),
            _ => {}
        }
    }

    /// 2.1.1 and 3.1.1: the driver walks from ACKNOWLEDGE to DRIVER_OK a bit at a time, never clears one, and resets by
    /// writing 0.
    fn set_status(&mut self, value: u32) -> Result<(), ActivateError> {
        const DRIVER: u32 = status::ACKNOWLEDGE | status::DRIVER;
        const FEATURES_OK: u32 = DRIVER | status::FEATURES_OK;
        const DRIVER_OK: u32 = FEATURES_OK | status::DRIVER_OK;
        let current = self.registers.status;
        if value == 0 {
            self.reset();
            return Ok(());
        }
        if value & status::FAILED != 0 {
            self.registers.status |= status::FAILED;
            return Ok(());
        }
        match (current, value & status::KNOWN) {
            (0, status::ACKNOWLEDGE) | (status::ACKNOWLEDGE, DRIVER) => {
                self.registers.status = value & status::KNOWN;
            }
            (DRIVER, FEATURES_OK) => {
                // Refused by not taking the bit, which the driver then reads back.
                let accepted = self.registers.driver_features;
                if accepted & !self.offered() == 0 && accepted & 1 << VIRTIO_F_VERSION_1 != 0 {
                    self.registers.status = FEATURES_OK;
                }
            }
            (FEATURES_OK, DRIVER_OK) => {
                self.registers.status = DRIVER_OK;
                return self.activate(None);
            }
            _ => {}
        }
        Ok(())
    }

    fn activate(&mut self, saved: Option<&[SavedQueue]>) -> Result<(), ActivateError> {
        let result = self.queues(saved).and_then(|queues| {
            self.device.activate(Activation {
                memory: Memory::clone(&self.memory),
                features: self.registers.driver_features,
                queues,
                interrupt: self.interrupt.clone(),
            })
        });
        match result {
            Ok(()) => self.active = true,
            Err(_) => self.interrupt.needs_reset(),
        }
        result
    }

    fn queues(&self, saved: Option<&[SavedQueue]>) -> Result<Vec<ActiveQueue>, ActivateError> {
        let setup = |reason: String| ActivateError::Setup { device: self.name().to_owned(), reason };
        let event_idx = self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, max) in self.device.queue_sizes().iter().enumerate() {
            let queue = match saved {
                Some(saved) => {
                    let saved = saved.get(index).ok_or_else(|| setup(format!("queue {index} is missing")))?;
                    saved.restore(*max).map_err(|e| setup(format!("queue {index}: {e}")))?
                }
                None => match self.registers.queues.get(index) {
                    Some(queue) if queue.ready => queue
                        .checked(*max, event_idx, &self.memory)
                        .ok_or_else(|| setup(format!("queue {index} is not in memory")))?,
                    _ => Queue::new(*max).map_err(|e| setup(e.to_string()))?,
                },
            };
            let kick = self.kicks.get(index).map(EventFd::try_clone);
            let kick = kick
                .transpose()
                .map_err(|source| ActivateError::Worker { device: self.name().to_owned(), source })?
                .ok_or_else(|| setup(format!("queue {index} has no notification")))?;
            queues.push(ActiveQueue::new(index as u16, queue, kick));
        }
        Ok(queues)
    }

    fn unset_queues(&self) -> Vec<QueueSetup> {
        let unset = |size: &u16| QueueSetup { size: *size, ..QueueSetup::default() };
        self.device.queue_sizes().iter().map(unset).collect()
    }

    /// As the driver resets it: by writing 0 to the status.
    pub fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        let generation = self.registers.generation;
        // The generation only ever grows: a driver that comes later must not take an old value for the current one.
        self.registers = Registers { generation, queues: self.unset_queues(), ..Registers::default() };
        self.interrupt.reset();
    }

    /// As [`VirtioDevice::pause`].
    ///
    /// # Errors
    /// The device's.
    pub fn pause(&mut self) -> Result<(), StateError> {
        if self.active { self.device.pause() } else { Ok(()) }
    }

    /// As [`VirtioDevice::resume`].
    ///
    /// # Errors
    /// The device's.
    pub fn resume(&mut self) -> Result<(), StateError> {
        if self.active { self.device.resume() } else { Ok(()) }
    }

    /// The registers and the device, which is paused.
    ///
    /// # Errors
    /// The device's.
    pub fn save(&mut self) -> Result<TransportState, StateError> {
        Ok(TransportState {
            name: self.name().to_owned(),
            registers: self.registers.clone(),
            pending: self.interrupt.pending(),
            device_status: self.interrupt.device_status(),
            device: self.device.save()?,
        })
    }

    /// Becomes what was saved, and serves at once if it did then. Only for a transport that no driver has touched.
    ///
    /// # Errors
    /// The state is not one of this device.
    pub fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        let invalid =
            |device: &str, reason: String| StateError::Invalid { device: device.to_owned(), reason };
        if state.name != self.name() {
            return Err(invalid(self.name(), format!("it is of {}", state.name)));
        }
        if state.registers.queues.len() != self.registers.queues.len()
            || state.registers.driver_features & !self.offered() != 0
        {
            return Err(invalid(self.name(), "its queues or features are others".to_owned()));
        }
        self.registers = state.registers;
        self.device.restore(state.device.inner)?;
        if self.registers.status & status::DRIVER_OK != 0 && !state.device.queues.is_empty() {
            self.activate(Some(&state.device.queues)).map_err(|e| invalid(self.name(), e.to_string()))?;
        }
        // A kick or an interrupt may have been lost between the save and this: everybody looks again.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        self.interrupt.restore(state.pending, state.device_status);
        Ok(())
    }
}

impl QueueSetup {
    /// The queue, if its size, alignments and addresses are right.
    fn checked(&self, max: u16, event_idx: bool, memory: &Memory) -> Option<Queue> {
        let mut queue = Queue::new(max).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.driver_area)).ok()?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.device_area)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(&**memory).then_some(queue)
    }
}

#[cfg(test)]
mod tests;
