//! Devices whose requests end at once: random numbers, balloon, memory. They share one [`Worker`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use serde_json::Value;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{
    ActivateError, Activation, ActiveQueue, Attached, Chain, DeviceState, Handler, Interrupt, Memory,
    QueueError, Registrar, StateError, VirtioDevice, Worker,
};

/// What makes such a device one of its kind. Shared by the device, its handler on the worker's thread, and the handle that
/// changes it at run time.
pub(super) trait Kind: Send + Sync + 'static {
    /// For messages.
    const NAME: &'static str;
    /// Virtio 1.2, section 5.
    const TYPE: u32;
    /// The most descriptors of each queue.
    const QUEUES: &'static [u16];

    /// Feature bits, those of the ring too.
    fn features(&self) -> u64;

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// A driver takes the device: `interrupt` reaches it.
    fn activated(&self, interrupt: &Interrupt) {
        let _ = interrupt;
    }

    /// One request.
    fn serve(&self, queue: u16, chain: Chain, memory: &Memory) -> Answer;

    /// Somebody wrote to [`Kind::wake`]: the chain of a queue to give back, with nothing written into it.
    fn woken(&self) -> Option<(u16, u16)> {
        None
    }

    /// Written to by a handle to have [`Kind::woken`] called on the worker's thread.
    fn wake(&self) -> Option<&EventFd> {
        None
    }

    /// A timer, if chains are ever answered later. Made with the device: threads that run the guest open nothing.
    fn timer(&self) -> Option<&OwnedFd> {
        None
    }

    /// No driver any more.
    fn reset(&self) {}

    /// What is saved beyond the queues.
    fn keep(&self) -> Value;

    /// Takes it over; the text says what is wrong with it.
    fn take_over(&self, kept: Value) -> Result<(), String>;
}

/// What becomes of a chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It goes back, with so many bytes written into it.
    Done(u32),
    /// It stays with the device until [`Kind::woken`] gives it back.
    Kept,
    /// It is asked again later.
    Later(Duration),
}

/// A virtio device of this kind.
pub(super) struct InstantDevice<K: Kind> {
    kind: Arc<K>,
    worker: Worker,
    running: Option<Attached<Serving<K>>>,
}

impl<K: Kind> InstantDevice<K> {
    pub(super) fn new(kind: Arc<K>, worker: &Worker) -> Self {
        Self { kind, worker: worker.clone(), running: None }
    }

    fn io(doing: &'static str) -> impl Fn(io::Error) -> StateError {
        move |source| StateError::Io { device: K::NAME.to_owned(), doing, source }
    }
}

impl<K: Kind> VirtioDevice for InstantDevice<K> {
    fn name(&self) -> &str {
        K::NAME
    }

    fn device_type(&self) -> u32 {
        K::TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        K::QUEUES
    }

    fn features(&self) -> u64 {
        self.kind.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.kind.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        data[count..].fill(0);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.kind.write_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // Not `reset`: what was restored is to go on.
        self.running = None;
        self.kind.activated(&activation.interrupt);
        let failed = |source| ActivateError::Worker { device: K::NAME.to_owned(), source };
        let Activation { memory, interrupt, queues, .. } = activation;
        let serving = Serving { kind: self.kind.clone(), memory, interrupt, queues };
        self.running = Some(self.worker.attach(serving).map_err(failed)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
        self.kind.reset();
    }

    fn pause(&mut self) -> Result<(), StateError> {
        let running = self.running.as_mut();
        running.map_or(Ok(()), |running| running.pause().map_err(Self::io("leave its thread")))
    }

    fn resume(&mut self) -> Result<(), StateError> {
        let running = self.running.as_mut();
        running.map_or(Ok(()), |running| running.resume().map_err(Self::io("return to its thread")))
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        let queues = match &self.running {
            Some(running) if !running.is_paused() => {
                return Err(StateError::NotPaused { device: K::NAME.to_owned() });
            }
            Some(running) => running.lock().queues.iter().map(ActiveQueue::save).collect(),
            None => Vec::new(),
        };
        Ok(DeviceState { queues, inner: self.kind.keep() })
    }

    fn restore(&mut self, inner: Value) -> Result<(), StateError> {
        let invalid = |reason| StateError::Invalid { device: K::NAME.to_owned(), reason };
        self.kind.take_over(inner).map_err(invalid)
    }
}

/// Tokens beyond those of queues.
const WAKE: u32 = 1 << 16;
const TIMER: u32 = WAKE + 1;

/// The device on its worker's thread.
pub(super) struct Serving<K: Kind> {
    kind: Arc<K>,
    memory: Memory,
    interrupt: Interrupt,
    queues: Vec<ActiveQueue>,
}

impl<K: Kind> Serving<K> {
    /// Serves a queue; what is wrong with it ends it.
    fn serve(&mut self, index: usize, registrar: &mut Registrar<'_>) {
        let Some(queue) = self.queues.get(index) else { return };
        queue.take_kick();
        let mut served = 0;
        let result = self.serve_some(index, &mut served);
        let queue = &mut self.queues[index];
        if served > 0 {
            queue.signal(&self.memory, &self.interrupt);
        }
        if result.is_err() {
            registrar.remove(&queue.kick);
            self.interrupt.needs_reset();
        }
    }

    /// At most a queue full, so that the worker's other devices have their turn.
    fn serve_some(&mut self, index: usize, served: &mut u16) -> Result<(), QueueError> {
        let queue = &mut self.queues[index];
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop(&self.memory)? else {
                if !queue.enable_notification(&self.memory)? {
                    return Ok(());
                }
                continue;
            };
            let head = chain.head_index();
            match self.kind.serve(index as u16, chain, &self.memory) {
                Answer::Done(length) => {
                    queue.push(&self.memory, head, length)?;
                    *served += 1;
                }
                Answer::Kept => {}
                Answer::Later(delay) => {
                    queue.unpop();
                    // Without its timer it is asked again at the driver's next notification.
                    let _ = self.kind.timer().map(|timer| arm(timer, delay));
                    return Ok(());
                }
            }
        }
        if queue.enable_notification(&self.memory)? {
            queue.kick_self();
        }
        Ok(())
    }

    fn woken(&mut self) {
        if let Some(wake) = self.kind.wake() {
            let _ = wake.read();
        }
        let Some((queue, head)) = self.kind.woken() else { return };
        let Some(queue) = self.queues.get_mut(usize::from(queue)).filter(|queue| queue.ready()) else {
            return;
        };
        match queue.push(&self.memory, head, 0) {
            Ok(()) => queue.signal(&self.memory, &self.interrupt),
            Err(_) => self.interrupt.needs_reset(),
        }
    }
}

impl<K: Kind> Handler for Serving<K> {
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
        for (token, queue) in self.queues.iter().enumerate().filter(|(_, queue)| queue.ready()) {
            registrar.watch(&queue.kick, token as u32, EventSet::IN)?;
        }
        if let Some(timer) = self.kind.timer() {
            registrar.watch(timer, TIMER, EventSet::IN)?;
        }
        if let Some(wake) = self.kind.wake() {
            registrar.watch(wake, WAKE, EventSet::IN)?;
        }
        for index in 0..self.queues.len() {
            if self.queues[index].ready() {
                self.serve(index, registrar);
            }
        }
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, registrar: &mut Registrar<'_>) {
        match token {
            WAKE => self.woken(),
            TIMER => {
                let mut expired = [0; 8];
                let _ = self.kind.timer().map(|timer| rustix::io::read(timer, &mut expired));
                for index in 0..self.queues.len() {
                    self.serve(index, registrar);
                }
            }
            queue => self.serve(queue as usize, registrar),
        }
    }
}

/// A timer for [`Kind::timer`].
pub(super) fn timer() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    Ok(rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

fn arm(timer: &OwnedFd, delay: Duration) -> io::Result<()> {
    // Zero would disarm it.
    let delay = delay.max(Duration::from_millis(1));
    let never = Timespec { tv_sec: 0, tv_nsec: 0 };
    let once = Timespec { tv_sec: delay.as_secs() as i64, tv_nsec: i64::from(delay.subsec_nanos()) };
    let times = Itimerspec { it_interval: never, it_value: once };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(())
}
