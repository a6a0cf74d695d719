//! The machine without its choice of devices: KVM, memory, processors, and the bus that joins them.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::state::{CoreState, RestoreError};
use crate::arch::registers::{self, errno};
use crate::arch::state::{ChipState, saved_registers};
use crate::arch::{MAX_CPUS, acpi, cpuid, layout};
use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::devices::console::ConsoleLog;
use crate::devices::legacy::Ports;
use crate::devices::virtio::mmio::{MmioTransport, NOTIFY};
use crate::devices::virtio::{ActivateError, Interrupt, StateError, VirtioDevice};
use crate::memory::{MachineMemory, MemoryError};
use crate::vcpu::{VcpuEvents, Vcpus};

/// What every machine's kernel is told; see `cmdline_extra` for the rest.
///
/// Quiet, as each character is an exit. A panic ends the machine at once. One processor comes up by itself, the agent
/// brings up the others. There is one serial port and no PCI to look for, and every device reaches all memory (no bounce
/// buffers: 64 MiB). Plugged memory is put to use by the kernel, without counting on it being movable.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 maxcpus=1 8250.nr_uarts=1 pci=off swiotlb=noforce \
                       memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// For a guest without an invariant TSC, whose clock is KVM's whatever the TSC does: without this the kernel compares the
/// two twice a second for ever. (With one it does not, or it has a reason to.)
const WITHOUT_INVARIANT_TSC: &str = " tsc=reliable";

/// The size of a machine.
#[derive(Debug, Clone, Default)]
pub struct CoreConfig {
    /// Processors, 1 to [`MAX_CPUS`]; all but one wait for the guest to start them.
    pub cpus: u32,
    /// Appended to the command line: printable ASCII.
    pub cmdline_extra: String,
}

/// What a machine is made of, beside its memory and its devices.
pub struct CoreFiles {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// Regular file, open for append.
    pub console: OwnedFd,
}

/// A kernel to boot.
pub struct Kernel {
    /// ELF vmlinux or bzImage.
    pub kernel: File,
    /// Its initramfs.
    pub initramfs: File,
}

/// A machine could not be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration.
    #[error("such a machine cannot be: {0}")]
    Config(String),
    /// A call of KVM, or of the system.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device's transport.
    #[error(transparent)]
    Device(#[from] ActivateError),
    /// A saved state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, BuildError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str) -> Result<T, BuildError> {
        self.map_err(|source| BuildError::Io { doing, source })
    }
}

impl<T> Doing<T> for Result<T, kvm_ioctls::Error> {
    fn doing(self, doing: &'static str) -> Result<T, BuildError> {
        self.map_err(errno).doing(doing)
    }
}

/// A machine at rest until [`Core::resume`].
pub struct Core {
    vm: VmFd,
    memory: MachineMemory,
    bus: Arc<Bus>,
    vcpus: Vcpus,
    /// Raises the line that announces a new generation identifier.
    generation: EventFd,
    /// Model specific registers that are saved.
    registers: Vec<u32>,
    paused: bool,
}

/// Everything but the vCPU threads, which start last.
struct Parts {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    generation: EventFd,
    serial: EventFd,
    registers: Vec<u32>,
    /// Whether the guest is told that it has one.
    invariant_tsc: bool,
}

impl Core {
    /// Makes a machine that will boot `kernel`. `devices` become virtio-mmio devices in their order; `confine` runs on
    /// each processor's thread before anything else.
    ///
    /// # Errors
    /// KVM, the memory, the kernel's file or a thread.
    pub fn boot(
        config: &CoreConfig,
        files: CoreFiles,
        memory: MachineMemory,
        mut kernel: Kernel,
        devices: Vec<Box<dyn VirtioDevice>>,
        events: &VcpuEvents,
        confine: fn() -> io::Result<()>,
    ) -> Result<Self, BuildError> {
        let count = devices.len();
        memory.prepare_boot();
        let parts = Parts::new(config, files.kvm, &memory)?;
        let rsdp = acpi::write(&memory.memory, config.cpus, count).doing("write the ACPI tables")?;
        renew_generation(&memory).doing("write the generation identifier")?;
        let mut cmdline = CMDLINE.to_owned();
        if !parts.invariant_tsc {
            cmdline.push_str(WITHOUT_INVARIANT_TSC);
        }
        if !config.cmdline_extra.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(&config.cmdline_extra);
        }
        let entry = boot::load(
            &memory.memory,
            memory.boot,
            &mut kernel.kernel,
            &mut kernel.initramfs,
            &cmdline,
            rsdp,
        )?;
        for (index, vcpu) in parts.vcpus.iter().enumerate() {
            registers::prepare(vcpu).doing("prepare a virtual processor")?;
            if index == 0 {
                registers::enter(vcpu, &memory.memory, entry).doing("prepare the first virtual processor")?;
            }
        }
        let serial = parts.serial.try_clone().doing("make the serial port")?;
        let ports = Ports::new(serial, ConsoleLog::new(files.console));
        parts.finish(memory, ports, devices, events, confine)
    }

    /// Makes a machine that goes on where a saved one stood. `memory` is that machine's, of the same size.
    ///
    /// # Errors
    /// As [`Core::boot`], and a state that does not fit.
    pub fn restore(
        state: CoreState,
        files: CoreFiles,
        memory: MachineMemory,
        devices: Vec<Box<dyn VirtioDevice>>,
        events: &VcpuEvents,
        confine: fn() -> io::Result<()>,
    ) -> Result<Self, BuildError> {
        state.check(&memory, devices.len())?;
        let config = CoreConfig { cpus: state.vcpus.len() as u32, cmdline_extra: String::new() };
        let parts = Parts::new(&config, files.kvm, &memory)?;
        for (vcpu, saved) in parts.vcpus.iter().zip(&state.vcpus) {
            saved.restore(vcpu).doing("restore a virtual processor")?;
        }
        state.chips.restore(&parts.vm).doing("restore the interrupt controllers and the clock")?;
        renew_generation(&memory).doing("write the generation identifier")?;
        let serial = parts.serial.try_clone().doing("make the serial port")?;
        let console = ConsoleLog::new(files.console);
        let ports = Ports::restore(serial, console, &state.serial).doing("restore the serial port")?;
        let core = parts.finish(memory, ports, devices, events, confine)?;
        for (mut transport, saved) in core.bus.virtio().zip(state.devices) {
            transport.restore(saved).map_err(RestoreError::Device)?;
        }
        // The guest reseeds its random numbers as soon as it runs.
        core.generation.write(1).doing("announce the new generation identifier")?;
        Ok(core)
    }

    /// Lets the machine run, for the first time or after a pause.
    ///
    /// # Errors
    /// KVM refuses, or a device cannot go on; the machine rests.
    pub fn resume(&mut self) -> Result<(), StateError> {
        for mut device in self.bus.virtio() {
            device.resume()?;
        }
        self.vcpus.resume().map_err(|source| StateError::Io {
            device: "vcpu".into(),
            doing: "go on",
            source,
        })?;
        self.paused = false;
        Ok(())
    }

    /// Stops the processors, then the devices.
    ///
    /// # Errors
    /// A device could not be drained; everything runs on.
    pub fn pause(&mut self) -> Result<(), StateError> {
        if self.paused {
            return Ok(());
        }
        self.vcpus.pause();
        self.paused = true;
        let drained = self.bus.virtio().try_for_each(|mut device| device.pause());
        if drained.is_err() {
            self.resume()?;
        }
        drained
    }

    /// Whether it rests.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Stops the processors for good, and writes out what the console holds back. Devices serve on what is in their queues
    /// already, until the process ends: it waits for no disk.
    pub fn end(&mut self) {
        self.vcpus.end();
        self.bus.ports().flush();
    }

    /// Resets the device of this name, as its driver would.
    pub(super) fn reset_device(&mut self, name: &str) {
        for mut device in self.bus.virtio().filter(|device| device.name() == name) {
            device.reset();
        }
    }

    /// The state of a machine that rests; its memory is the memfd's content.
    ///
    /// # Errors
    /// It does not rest, or KVM refuses.
    pub fn save(&mut self) -> Result<CoreState, StateError> {
        let machine = || "machine".to_owned();
        if !self.paused {
            return Err(StateError::NotPaused { device: machine() });
        }
        let io = |doing| move |source| StateError::Io { device: machine(), doing, source };
        Ok(CoreState {
            memory: (self.memory.boot, self.memory.hotplug.1),
            vcpus: self.vcpus.save(&self.registers).map_err(io("read its processors"))?,
            chips: ChipState::save(&self.vm).map_err(io("read its interrupt controllers"))?,
            serial: self.bus.ports().save(),
            devices: self.bus.virtio().map(|mut device| device.save()).collect::<Result<_, _>>()?,
        })
    }

    /// Names of the devices that a driver uses.
    #[must_use]
    pub fn active_devices(&self) -> Vec<String> {
        self.bus.virtio().filter(|device| device.is_active()).map(|device| device.name().to_owned()).collect()
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &MachineMemory {
        &self.memory
    }
}

impl Parts {
    fn new(config: &CoreConfig, kvm: OwnedFd, memory: &MachineMemory) -> Result<Self, BuildError> {
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            let reason = format!("it would have {} processors, not 1 to {MAX_CPUS}", config.cpus);
            return Err(BuildError::Config(reason));
        }
        let kvm = adopt(kvm);
        let vm = kvm.create_vm().doing("make a virtual machine")?;
        vm.set_identity_map_address(layout::IDENTITY_MAP).doing("place KVM's identity map")?;
        vm.set_tss_address(layout::TSS).doing("place KVM's task state segment")?;
        vm.create_irq_chip().doing("make the interrupt controllers")?;
        memory.register(&vm)?;
        let cpuid = cpuid::Identification::of(&kvm, config.cpus).doing("ask KVM for CPUID")?;
        let registers = saved_registers(&kvm).doing("ask KVM for its registers")?;
        let mut vcpus = Vec::new();
        for index in 0..config.cpus {
            let vcpu = vm.create_vcpu(u64::from(index)).doing("make a virtual processor")?;
            vcpu.set_cpuid2(&cpuid.for_vcpu(index)).doing("set CPUID")?;
            vcpus.push(vcpu);
        }
        let serial = line(&vm, layout::SERIAL_IRQ)?;
        let generation = line(&vm, layout::GENERATION_IRQ)?;
        let invariant_tsc = cpuid.has_invariant_tsc();
        Ok(Self { vm, vcpus, generation, serial, registers, invariant_tsc })
    }

    fn finish(
        self,
        memory: MachineMemory,
        ports: Ports,
        devices: Vec<Box<dyn VirtioDevice>>,
        events: &VcpuEvents,
        confine: fn() -> io::Result<()>,
    ) -> Result<Core, BuildError> {
        if devices.len() > layout::MMIO_DEVICES {
            return Err(BuildError::Config(format!("it would have {} devices", devices.len())));
        }
        let mut virtio = Vec::with_capacity(devices.len());
        for (index, device) in devices.into_iter().enumerate() {
            virtio.push(Arc::new(Mutex::new(transport(&self.vm, &memory, index, device)?)));
        }
        let bus = Arc::new(Bus::new(ports, virtio));
        let vcpus =
            Vcpus::start(self.vcpus, &bus, events, confine).doing("start the threads of its processors")?;
        Ok(Core {
            vm: self.vm,
            memory,
            bus,
            vcpus,
            generation: self.generation,
            registers: self.registers,
            paused: true,
        })
    }
}

/// Registers the lines of a device with KVM: an interrupt, and an address per queue by which the guest notifies without
/// an exit to user space.
fn transport(
    vm: &VmFd,
    memory: &MachineMemory,
    index: usize,
    device: Box<dyn VirtioDevice>,
) -> Result<MmioTransport, BuildError> {
    let interrupt = Interrupt::new(line(vm, layout::MMIO_IRQ + index as u32)?);
    let address = IoEventAddress::Mmio(layout::MMIO + index as u64 * layout::MMIO_SIZE + NOTIFY);
    let mut kicks = Vec::new();
    for queue in 0..device.queue_sizes().len() as u32 {
        let kick = event().doing("make an eventfd")?;
        vm.register_ioevent(&kick, &address, queue).doing("register an ioeventfd")?;
        kicks.push(kick);
    }
    Ok(MmioTransport::new(device, Arc::clone(&memory.memory), interrupt, kicks)?)
}

fn line(vm: &VmFd, number: u32) -> Result<EventFd, BuildError> {
    let event = event().doing("make an eventfd")?;
    vm.register_irqfd(&event, number).doing("register an irqfd")?;
    Ok(event)
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// A generation identifier that no machine had before.
fn renew_generation(memory: &MachineMemory) -> io::Result<()> {
    let mut id = [0u8; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    memory
        .memory
        .write_slice(&id, GuestAddress(layout::GENERATION))
        .map_err(|e| io::Error::other(e.to_string()))
}

#[allow(unsafe_code)]
fn adopt(kvm: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is ours, and stays open as long as the Kvm that now owns it. That it is KVM's shows at the
    // first call, which fails otherwise.
    unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
}
