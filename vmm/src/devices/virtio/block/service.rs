use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::faults::Faults;
use super::guest_buffers::Patience;
use super::protocol::Status;
use super::request::{Limits, Operation, Request};
use super::storage::Storage;
use super::threads::Served;
use crate::devices::virtio::{Activation, ActiveQueue, Chain, Interrupt, Memory, QueueError, SavedQueue};

/// Requests that a thread serves before it lets the other devices of the group have their turn.
const BATCH: usize = 32;

/// Completions after which the driver is told even if there is more to do.
const SIGNAL_EVERY: u16 = 8;

/// Serves the queue of one block device, by any number of threads at once.
pub(super) struct Service {
    /// As GET_ID answers.
    serial: String,
    storage: Arc<dyn Storage>,
    counters: Counters,
    faults: Faults,
    serving: Mutex<Serving>,
    /// Signalled when nothing is under way any more.
    drained: Condvar,
}

#[derive(Default)]
struct Serving {
    active: Option<Active>,
    paused: bool,
    /// Requests that were taken and not given back: at most one for each thread of the group.
    under_way: usize,
    /// Requests to use again.
    spare: Vec<Request>,
}

struct Active {
    memory: Memory,
    features: u64,
    queue: ActiveQueue,
    interrupt: Interrupt,
    /// The driver broke the queue: only a reset helps.
    broken: bool,
    /// Given back, but the driver has not been told.
    untold: u16,
}

impl Service {
    pub(super) fn new(serial: &str, storage: Arc<dyn Storage>, faults: Faults) -> Self {
        Self {
            serial: serial.to_owned(),
            storage,
            counters: Counters::default(),
            faults,
            serving: Mutex::default(),
            drained: Condvar::new(),
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Serves this queue from now on, if it is kicked.
    pub(super) fn activate(&self, activation: Activation, queue: ActiveQueue) {
        let mut serving = self.lock();
        let Activation { memory, features, interrupt, .. } = activation;
        serving.active = Some(Active { memory, features, queue, interrupt, broken: false, untold: 0 });
        serving.paused = false;
    }

    /// Takes no more requests; true once none is under way, false if that takes longer than `patience`, and then it goes
    /// on as before.
    pub(super) fn pause(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut serving = self.lock();
        serving.paused = true;
        while serving.under_way > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                serving.paused = false;
                return false;
            };
            serving = self.drained.wait_timeout(serving, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(active) = &mut serving.active {
            active.tell();
        }
        true
    }

    /// Takes requests again, once kicked.
    pub(super) fn resume(&self) {
        self.lock().paused = false;
    }

    /// Forgets its queue, when no request is under way any more.
    pub(super) fn reset(&self) {
        let mut serving = self.lock();
        serving.paused = true;
        while serving.under_way > 0 {
            serving = self.drained.wait(serving).unwrap_or_else(PoisonError::into_inner);
        }
        *serving = Serving::default();
    }

    /// The state of the queue, if there is one and it rests.
    pub(super) fn save(&self) -> Result<Option<SavedQueue>, NotPaused> {
        let serving = self.lock();
        match &serving.active {
            None => Ok(None),
            Some(_) if !serving.paused || serving.under_way > 0 => Err(NotPaused),
            Some(active) => Ok(Some(active.queue.save())),
        }
    }

    /// Tells the driver that the configuration has changed, if there is a driver.
    pub(super) fn configuration_changed(&self) {
        if let Some(active) = &self.lock().active {
            active.interrupt.config();
        }
    }

    /// Gives the last request back, if there is one, and takes the next.
    fn next(&self, done: Option<(Request, u32)>) -> Option<(Request, Result<Operation, Status>)> {
        let mut serving = self.lock();
        if let Some((request, written)) = done {
            serving.give_back(request, written);
        }
        if serving.paused {
            self.drained.notify_all();
            return None;
        }
        let Serving { active, spare, under_way, .. } = &mut *serving;
        let active = active.as_mut().filter(|active| !active.broken)?;
        let Some(chain) = active.pop() else {
            active.tell();
            return None;
        };
        *under_way += 1;
        let mut request = spare.pop().unwrap_or_else(|| Request::new(active.memory.clone()));
        let limits = Limits {
            capacity: self.storage.capacity(),
            features: active.features,
            descriptors: active.queue.size(),
        };
        drop(serving);
        let operation = request.take(chain, &limits);
        Some((request, operation))
    }

    /// Before this thread waits: the driver hears of what is done, and if more is to be done, another thread does it.
    fn will_wait(&self) {
        if let Some(active) = self.lock().active.as_mut().filter(|active| !active.broken) {
            active.tell();
            active.hand_over();
        }
    }

    /// Does what is asked and says how many bytes of the chain it wrote.
    fn serve_one(&self, request: &mut Request, operation: Result<Operation, Status>) -> u32 {
        let result = operation.and_then(|operation| self.execute(request, operation));
        let (status, data) = match result {
            Ok(data) => (Status::Ok, data),
            Err(status) => (status, 0),
        };
        let written = request.answer(status, data);
        match status {
            _ if written == 0 => self.counters.malformed.add(1),
            Status::Ok => {}
            _ => self.counters.errors.add(1),
        }
        written
    }

    /// The number of bytes that were put into guest memory.
    fn execute(&self, request: &mut Request, operation: Operation) -> Result<u64, Status> {
        let counters = &self.counters;
        match operation {
            Operation::Read { at } => {
                let mut result = self.storage.read(at, &mut request.data, Patience::None);
                if result.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                    counters.waited.add(1);
                    self.will_wait();
                    result = self.storage.read(at, &mut request.data, Patience::Full);
                }
                result.map_err(|e| self.failed(&e))?;
                counters.reads.add(1);
                counters.read_bytes.add(request.data.done());
                return Ok(request.data.done());
            }
            Operation::GetId => {
                return request.answer_id(&self.serial);
            }
            _ => self.will_wait(),
        }
        match operation {
            Operation::Write { at } => {
                self.storage.write(at, &mut request.data).map_err(|e| self.failed(&e))?;
                counters.writes.add(1);
                counters.written_bytes.add(request.data.done());
            }
            Operation::Flush => {
                self.storage.flush().map_err(|e| self.failed(&e))?;
                counters.flushes.add(1);
            }
            Operation::Discard => {
                for range in request.ranges() {
                    self.storage.discard(range).map_err(|e| self.failed(&e))?;
                }
                counters.discards.add(1);
            }
            Operation::WriteZeroes => {
                for range in request.ranges() {
                    self.storage.write_zeroes(range).map_err(|e| self.failed(&e))?;
                }
                counters.discards.add(1);
            }
            Operation::Read { .. } | Operation::GetId => {}
        }
        Ok(0)
    }

    fn failed(&self, error: &io::Error) -> Status {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.counters.out_of_space.add(1);
            self.faults.tell(|| format!("writes fail, its file system on the host is full: {error}"));
        }
        Status::IoError
    }

    fn lock(&self) -> MutexGuard<'_, Serving> {
        // A panic ends the whole process; a poisoned lock is only ever seen in tests.
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue moves, so its state cannot be told.
#[derive(Debug)]
pub(super) struct NotPaused;

impl Served for Service {
    fn serve(&self) {
        let mut done = None;
        for _ in 0..BATCH {
            let Some((mut request, operation)) = self.next(done.take()) else { return };
            let written = self.serve_one(&mut request, operation);
            done = Some((request, written));
        }
        // A batch is over: back to the end of the line.
        let mut serving = self.lock();
        if let Some((request, written)) = done {
            serving.give_back(request, written);
        }
        if let Some(active) = &mut serving.active {
            active.tell();
            active.hand_over();
        }
        if serving.paused {
            self.drained.notify_all();
        }
    }
}

impl Serving {
    fn give_back(&mut self, request: Request, written: u32) {
        self.under_way -= 1;
        if let Some(active) = self.active.as_mut().filter(|active| !active.broken) {
            active.push(request.head(), written);
        }
        self.spare.push(request);
    }
}

impl Active {
    /// The next chain. Without one, the driver will notify of the next.
    fn pop(&mut self) -> Option<Chain> {
        match self.try_pop() {
            Ok(chain) => chain,
            Err(e) => {
                self.break_off(&e);
                None
            }
        }
    }

    fn try_pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.queue.pop(&self.memory)? {
            return Ok(Some(chain));
        }
        if !self.queue.enable_notification(&self.memory)? {
            return Ok(None);
        }
        // One came in between. If there is none still, the ring lies.
        match self.queue.pop(&self.memory)? {
            Some(chain) => Ok(Some(chain)),
            None => {
                let reason = "a chain is announced that is not there".to_owned();
                Err(QueueError { index: self.queue.index, reason })
            }
        }
    }

    fn push(&mut self, head: u16, written: u32) {
        match self.queue.push(&self.memory, head, written) {
            Ok(()) => self.untold += 1,
            Err(e) => self.break_off(&e),
        }
        if self.untold >= SIGNAL_EVERY {
            self.tell();
        }
    }

    fn tell(&mut self) {
        if std::mem::take(&mut self.untold) > 0 {
            self.queue.signal(&self.memory, &self.interrupt);
        }
    }

    /// Makes sure that another thread looks into the queue when there is something in it.
    fn hand_over(&mut self) {
        match self.queue.has_available(&self.memory) {
            Ok(true) => self.queue.kick_self(),
            Ok(false) => match self.queue.enable_notification(&self.memory) {
                Ok(true) => self.queue.kick_self(),
                Ok(false) => {}
                Err(e) => self.break_off(&e),
            },
            Err(e) => self.break_off(&e),
        }
    }

    fn break_off(&mut self, _: &QueueError) {
        self.broken = true;
        self.interrupt.needs_reset();
    }
}
