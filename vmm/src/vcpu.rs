//! Processors of a machine: a thread for each, which sleeps in the kernel while its processor rests.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::registers::errno;
use crate::arch::state::{self, VcpuState};
use crate::bus::Bus;
use crate::devices::legacy::PortEvent;

const STACK: usize = 256 << 10;
/// How long a kicked processor may take before it is kicked again: the signal is lost if it comes just before the thread
/// enters the kernel.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// What a processor met that the machine must know of.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest told something through a port.
    Port(PortEvent),
    /// A device could not begin to serve its driver.
    Device(crate::devices::virtio::ActivateError),
    /// Triple fault, or KVM's own reset or shutdown: the way a guest ends that has no other.
    Stopped(&'static str),
    /// KVM cannot go on with this processor.
    Failed(String),
}

/// Told by any vCPU thread, which goes on after it, unless the event ends the machine: then all processors rest.
pub type VcpuEvents = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// All processors of a machine.
pub struct Vcpus {
    gate: Arc<Gate>,
    vcpus: Vec<Vcpu>,
}

struct Vcpu {
    /// Held by its thread while it runs.
    fd: Arc<Mutex<VcpuFd>>,
    thread: JoinHandle<()>,
}

/// Where threads wait while their machine is paused.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// A copy of "not running" that is cheap to look at.
    interrupted: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Running,
    Paused,
    Ended,
}

struct GateState {
    wanted: Wanted,
    /// Threads that are not in their processor, nor will be.
    resting: usize,
}

impl Vcpus {
    /// Starts a thread for each, which rests until [`Vcpus::resume`]. `confine` runs on each thread first.
    ///
    /// # Errors
    /// A thread could not be started or confined.
    pub fn start(
        fds: Vec<VcpuFd>,
        bus: &Arc<Bus>,
        events: &VcpuEvents,
        confine: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), kicked).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let gate = Arc::new(Gate {
            state: Mutex::new(GateState { wanted: Wanted::Paused, resting: 0 }),
            changed: Condvar::new(),
            interrupted: AtomicBool::new(true),
        });
        let mut vcpus = Vec::with_capacity(fds.len());
        let (confined, outcome) = std::sync::mpsc::channel();
        for (index, fd) in fds.into_iter().enumerate() {
            let fd = Arc::new(Mutex::new(fd));
            let runner = Runner {
                fd: Arc::clone(&fd),
                gate: Arc::clone(&gate),
                bus: Arc::clone(bus),
                events: Arc::clone(events),
            };
            let confined = confined.clone();
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK).spawn(
                move || {
                    let result = confine();
                    let failed = result.is_err();
                    let _ = confined.send(result);
                    if !failed {
                        runner.run();
                    }
                },
            )?;
            outcome.recv().map_err(io::Error::other)??;
            vcpus.push(Vcpu { fd, thread });
        }
        Ok(Self { gate, vcpus })
    }

    /// Stops all processors; when it returns, none is in the guest. Harmless if they rest already.
    pub fn pause(&self) {
        self.gate.ask(Wanted::Paused);
        self.rest();
    }

    /// Lets them run, and tells the guest's clock about the time that it missed.
    ///
    /// # Errors
    /// KVM refuses; nothing runs then.
    pub fn resume(&self) -> io::Result<()> {
        for vcpu in &self.vcpus {
            state::resumed(&lock(&vcpu.fd))?;
        }
        self.gate.ask(Wanted::Running);
        Ok(())
    }

    /// Stops them for good: a later resume has no effect.
    pub fn end(&self) {
        self.gate.ask(Wanted::Ended);
        self.rest();
    }

    /// The states of all, which rest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self, registers: &[u32]) -> io::Result<Vec<VcpuState>> {
        self.vcpus.iter().map(|vcpu| VcpuState::save(&lock(&vcpu.fd), registers)).collect()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// Kicks them until all rest.
    fn rest(&self) {
        let mut state = lock(&self.gate.state);
        while state.wanted != Wanted::Running && state.resting < self.vcpus.len() {
            for vcpu in &self.vcpus {
                // A thread that ended rests too.
                let _ = vcpu.thread.kill(SIGRTMIN());
            }
            state =
                self.gate.changed.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Gate {
    fn ask(&self, wanted: Wanted) {
        let mut state = lock(&self.state);
        if state.wanted != Wanted::Ended {
            state.wanted = wanted;
        }
        self.interrupted.store(state.wanted != Wanted::Running, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits while the machine is paused; false when it has ended.
    fn pass(&self) -> bool {
        let mut state = lock(&self.state);
        state.resting += 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Paused {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.wanted == Wanted::Ended {
            return false;
        }
        state.resting -= 1;
        true
    }
}

struct Runner {
    fd: Arc<Mutex<VcpuFd>>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    events: VcpuEvents,
}

impl Runner {
    fn run(self) {
        while self.gate.pass() {
            let mut vcpu = lock(&self.fd);
            while !self.gate.interrupted.load(Ordering::SeqCst) {
                if let Some(event) = self.step(&mut vcpu) {
                    if event.ends_the_machine() {
                        self.gate.ask(Wanted::Ended);
                    }
                    (self.events)(event);
                }
            }
            // An exit to user space is only finished when KVM is entered again: do that without running the guest, so
            // that what is saved is whole.
            vcpu.set_kvm_immediate_exit(1);
            let _ = vcpu.run();
            vcpu.set_kvm_immediate_exit(0);
        }
    }

    fn step(&self, vcpu: &mut VcpuFd) -> Option<VcpuEvent> {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            // EAGAIN: a processor that was not started yet was woken for nothing.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Err(e) => return Some(VcpuEvent::Failed(format!("KVM cannot run it: {}", errno(e)))),
        };
        match exit {
            VcpuExit::IoOut(port, data) => self.bus.port_write(port, data).map(VcpuEvent::Port),
            VcpuExit::IoIn(port, data) => {
                self.bus.port_read(port, data);
                None
            }
            VcpuExit::MmioWrite(address, data) => self.bus.write(address, data).err().map(VcpuEvent::Device),
            VcpuExit::MmioRead(address, data) => {
                self.bus.read(address, data);
                None
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => None,
            VcpuExit::Hlt => Some(VcpuEvent::Stopped("a processor halted for ever")),
            VcpuExit::Shutdown => Some(VcpuEvent::Stopped("triple fault")),
            VcpuExit::SystemEvent(..) => Some(VcpuEvent::Stopped("the guest asked KVM to stop")),
            VcpuExit::FailEntry(reason, cpu) => {
                Some(VcpuEvent::Failed(format!("the host's processor {cpu} refuses it: {reason:#x}")))
            }
            VcpuExit::InternalError => {
                Some(VcpuEvent::Failed("KVM met an instruction or a state that it cannot emulate".into()))
            }
            other => Some(VcpuEvent::Failed(format!("KVM left it for a reason unknown here: {other:?}"))),
        }
    }
}

impl VcpuEvent {
    /// Whether the machine cannot go on.
    #[must_use]
    pub fn ends_the_machine(&self) -> bool {
        match self {
            Self::Port(event) => matches!(event, PortEvent::Reset(_) | PortEvent::PowerOff),
            Self::Device(_) => false,
            Self::Stopped(_) | Self::Failed(_) => true,
        }
    }
}

/// Does nothing: the signal's purpose is that KVM_RUN returns.
extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
