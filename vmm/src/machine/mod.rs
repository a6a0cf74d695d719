//! A pod's machine, put together.

/// Control requests, carried out.
mod calls;
/// KVM, memory, processors and bus.
mod core;
/// The device set.
mod devices;
/// What the guest does that hulld should know.
mod progress;
/// A machine at rest, as a file.
mod state;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use core::{BuildError, Core, CoreConfig, CoreFiles, Kernel};
pub use devices::{DeviceFiles, Handles, MAX_SLOTS, build as build_devices};
pub use progress::Progress;
pub use state::{CoreState, RestoreError};

use crate::control::Events;
use crate::jail::{BootFiles, ThreadKind, confine};
use crate::memory::MachineMemory;
use crate::protocol::messages;

/// How long what the guest said last may take to its files.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A pod's machine, with all devices and what they are controlled by.
pub struct PodMachine {
    core: Core,
    handles: Handles,
    progress: Arc<Progress>,
    description: messages::Machine,
}

impl PodMachine {
    /// Makes the machine, which rests until [`PodMachine::begin`], and starts and confines its threads. Leaves the control
    /// listener to the caller.
    ///
    /// # Errors
    /// What cannot be made, and why.
    pub fn new(
        description: messages::Machine,
        files: BootFiles,
        progress: Progress,
        events: &Events,
    ) -> Result<Self, BuildError> {
        let memory = MachineMemory::new(description.memory, description.memory_max)?;
        let progress = Arc::new(progress);
        let device_files =
            DeviceFiles { scratch: files.scratch, vsock_listener: files.vsock_listener, tap: files.tap };
        let (devices, handles) = build_devices(&description, device_files, &memory, events)?;
        let core = Core::boot(
            &CoreConfig { cpus: description.cpus, cmdline_extra: description.cmdline_extra.clone() },
            CoreFiles { kvm: files.kvm, console: files.console },
            memory,
            Kernel { kernel: File::from(files.kernel), initramfs: File::from(files.initramfs) },
            devices,
            &Progress::listen(&progress, events),
            || confine(ThreadKind::Vcpu),
        )?;
        Ok(Self { core, handles, progress, description })
    }

    /// Lets it run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn begin(&mut self) -> io::Result<()> {
        self.core.resume().map_err(io::Error::other)
    }

    /// Ends it at once, as a power cut would.
    pub fn stop(&mut self) {
        self.core.end();
    }

    /// Ends it after the guest has ended by itself: what its containers said last still goes to their logs.
    pub fn end(&mut self) {
        self.core.end();
        wait(|| self.handles.vsock.metrics().waiting == 0);
        // Its streams end then, and the writer of the logs closes its own when all that came is in the files.
        self.core.reset_device("vsock");
        let logs = self.handles.logs.handle();
        wait(|| logs.list().iter().all(|container| logs.state(container).is_none_or(|log| log.open == 0)));
    }
}

/// Until it is so, but not long: a disk may hang, and there may be a container that nobody gave a log.
fn wait(is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() && start.elapsed() < LAST_WORDS {
        std::thread::sleep(Duration::from_millis(2));
    }
}
