use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::MAX_CPUS;
use crate::arch::state::{ChipState, VcpuState};
use crate::devices::legacy::SerialState;
use crate::devices::virtio::StateError;
use crate::devices::virtio::mmio::TransportState;
use crate::memory::MachineMemory;

/// A machine at rest, without its memory. Numbers only: host resources are given anew, nothing is named by a path.
#[derive(Serialize, Deserialize)]
pub struct CoreState {
    /// Bytes at birth, and bytes it may grow by.
    pub(super) memory: (u64, u64),
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chips: ChipState,
    pub(super) serial: SerialState,
    pub(super) devices: Vec<TransportState>,
}

/// A saved state does not fit.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The machine around it is another.
    #[error("the saved machine is not this one: {0}")]
    Mismatch(String),
    /// A device's part of it.
    #[error(transparent)]
    Device(StateError),
}

impl CoreState {
    /// Whether it can become a machine with this memory and so many devices.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn check(&self, memory: &MachineMemory, devices: usize) -> Result<(), RestoreError> {
        let mismatch = |what: String| Err(RestoreError::Mismatch(what));
        if self.memory != (memory.boot, memory.hotplug.1) {
            return mismatch(format!("it has {:?} bytes of memory", self.memory));
        }
        if self.vcpus.is_empty() || self.vcpus.len() > MAX_CPUS as usize {
            return mismatch(format!("it has {} processors", self.vcpus.len()));
        }
        if self.devices.len() != devices {
            return mismatch(format!("it has {} devices, not {devices}", self.devices.len()));
        }
        Ok(())
    }
}
