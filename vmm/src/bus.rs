//! Where an access of the guest goes that KVM does not serve by itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::layout;
use crate::devices::legacy::{PortEvent, Ports};
use crate::devices::virtio::ActivateError;
use crate::devices::virtio::mmio::MmioTransport;

/// All devices of a machine, by address. Shared by the vCPUs.
pub struct Bus {
    ports: Mutex<Ports>,
    /// Device N has page N.
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Bus {
    /// The devices, in the order of their pages.
    #[must_use]
    pub fn new(ports: Ports, virtio: Vec<Arc<Mutex<MmioTransport>>>) -> Self {
        Self { ports: Mutex::new(ports), virtio }
    }

    /// The guest writes to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<PortEvent> {
        self.ports().write(port, data)
    }

    /// The guest reads a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports().read(port, data);
    }

    /// The guest writes where no memory is. An address without a device takes it and forgets it.
    ///
    /// # Errors
    /// A driver said that it is ready, and its device could not begin.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), ActivateError> {
        match self.device(address) {
            Some((mut device, offset)) => device.write(offset, data),
            None => Ok(()),
        }
    }

    /// The guest reads where no memory is. An address without a device has all bits set.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((mut device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The ports.
    pub fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtio devices, in the order of their pages.
    pub fn virtio(&self) -> impl Iterator<Item = MutexGuard<'_, MmioTransport>> {
        self.virtio.iter().map(|device| device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn device(&self, address: u64) -> Option<(MutexGuard<'_, MmioTransport>, u64)> {
        let offset = address.checked_sub(layout::MMIO)?;
        let device = self.virtio.get(usize::try_from(offset / layout::MMIO_SIZE).ok()?)?;
        Some((device.lock().unwrap_or_else(PoisonError::into_inner), offset % layout::MMIO_SIZE))
    }
}
