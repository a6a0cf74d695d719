use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::counters::BlockStats;
use super::faults::{Faults, OnFault};
use super::protocol::{CONFIG, Traits};
use super::service::Service;
use super::storage::Storage;
use super::threads::{BlockThreads, Served, Watch};
use crate::devices::virtio::{ActivateError, Activation, DeviceState, StateError, VirtioDevice};

/// How long a pause waits for the disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one kind of block device keeps beyond its queue when it is saved.
pub(super) trait Kept: Send + Sync {
    /// Numbers and keys, no paths and no descriptors.
    fn keep(&self) -> Value;

    /// Takes it over; the text says what is wrong with it.
    fn take_over(&self, kept: Value) -> Result<(), String>;
}

/// A virtio block device: `images`, `scratch` or a slot. Made by [`images`](super::images), [`scratch`](super::scratch)
/// and [`slot`](super::slot).
pub struct BlockDevice {
    name: String,
    traits: Traits,
    queue_sizes: [u16; 1],
    service: Arc<Service>,
    kept: Arc<dyn Kept>,
    threads: BlockThreads,
    watch: Option<Watch>,
}

impl BlockDevice {
    /// A device called `name`, which is also its serial number (the guest's agent finds it by that).
    pub(super) fn new<S: Storage + Kept + 'static>(
        name: &str,
        traits: Traits,
        storage: &Arc<S>,
        threads: &BlockThreads,
        on_fault: OnFault,
    ) -> Self {
        Self {
            name: name.to_owned(),
            traits,
            queue_sizes: [traits.queue_size],
            service: Arc::new(Service::new(name, storage.clone(), Faults::new(name, on_fault))),
            kept: storage.clone(),
            threads: threads.clone(),
            watch: None,
        }
    }

    /// The device's service, for the handles that change it at run time.
    pub(super) fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        self.service.counters().read()
    }

    fn state_error(&self, reason: impl Into<String>) -> StateError {
        StateError::Invalid { device: self.name.clone(), reason: reason.into() }
    }
}

impl VirtioDevice for BlockDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.traits.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config: [u8; CONFIG] = self.traits.config(self.service.storage().capacity());
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        data[count..].fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let setup =
            |reason: &str| ActivateError::Setup { device: self.name.clone(), reason: reason.to_owned() };
        if activation.queues.len() != 1 {
            return Err(setup("a block device has one queue"));
        }
        let queue = activation.queues.pop().filter(|queue| queue.ready());
        let queue = queue.ok_or_else(|| setup("its queue is not set up"))?;
        let kick = queue.kick.try_clone();
        let served: Arc<dyn Served> = self.service.clone();
        self.service.activate(activation, queue);
        let watch = kick.and_then(|kick| self.threads.watch(&kick, &served));
        match watch {
            Ok(watch) => {
                self.watch = Some(watch);
                Ok(())
            }
            Err(source) => {
                self.service.reset();
                Err(ActivateError::Worker { device: self.name.clone(), source })
            }
        }
    }

    fn reset(&mut self) {
        self.watch = None;
        self.service.reset();
    }

    fn pause(&mut self) -> Result<(), StateError> {
        if self.service.pause(PATIENCE) {
            return Ok(());
        }
        self.resume()?;
        Err(StateError::Io {
            device: self.name.clone(),
            doing: "wait for the requests under way",
            source: std::io::ErrorKind::TimedOut.into(),
        })
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.service.resume();
        if let Some(watch) = &self.watch {
            watch.kick();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        let queue = self.service.save().map_err(|_| StateError::NotPaused { device: self.name.clone() })?;
        Ok(DeviceState { queues: queue.into_iter().collect(), inner: self.kept.keep() })
    }

    fn restore(&mut self, inner: Value) -> Result<(), StateError> {
        self.kept.take_over(inner).map_err(|reason| self.state_error(reason))
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
