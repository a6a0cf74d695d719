use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Address space of a thread's stack; only what it touches is memory.
const STACK: usize = 256 << 10;

/// The `epoll` data that ends all threads.
const END: u64 = u64::MAX;

/// What runs first on each thread, its seccomp filter, say.
pub type Confine = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Something that has work when its descriptor says so.
pub(super) trait Served: Send + Sync {
    /// There may be work. Any number of threads may be in here at once. Does a bounded part of it; whoever leaves more
    /// writes to the descriptor.
    fn serve(&self);
}

/// The threads that serve a group of block devices.
///
/// All of them wait on one epoll. Whoever gets an event serves that queue itself, waiting for the disk included; before it
/// waits, it makes sure that the queue's next request wakes another. So a read that the host has in its cache is served by
/// whoever took it, one that has to wait delays no other until all threads wait, and at most as many requests are under way
/// as there are threads: all others stay in the guest's ring and cost nothing. (A kick that comes meanwhile wakes another
/// thread all the same, so that neighbours in a busy ring may be served by several.)
///
/// What `tests/speed.rs` measures is that waiting is what counts: of cold reads of 4 KiB at random 98 in 100 have to wait,
/// and three threads serve more than twice as many of them as one; cold reads in order are read ahead by the host, and
/// hardly any waits; with all in the cache a second thread gains nothing that is larger than the noise. A queue of jobs to a
/// pool of threads was not built to compare: each request would change threads twice and need memory for a job. io_uring is
/// forbidden on hardened nodes, and what it does passes by the seccomp filter.
///
/// Cheap to clone. The threads end with the last clone and the last watch.
#[derive(Clone)]
pub struct BlockThreads {
    inner: Arc<Inner>,
    /// The threads hold the group too; this they do not.
    _owner: Arc<Owner>,
}

/// Ends the threads when nobody can give them work any more.
struct Owner(EventFd);

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.write(1);
    }
}

struct Inner {
    epoll: Epoll,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    watched: BTreeMap<u64, Weak<dyn Served>>,
    last: u64,
}

impl BlockThreads {
    /// Starts a group of `count` threads, at least one, called `name` (at most 15 bytes). `confine` runs first on each.
    ///
    /// # Errors
    /// A thread or a descriptor could not be made, or `confine` failed on one; no thread is left then.
    pub fn start(name: &str, count: usize, confine: &Confine) -> io::Result<Self> {
        let end = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        // Level-triggered and never read: every thread sees it.
        epoll.ctl(ControlOperation::Add, end.as_raw_fd(), EpollEvent::new(EventSet::IN, END))?;
        let inner = Arc::new(Inner { epoll, state: Mutex::default() });
        let threads = Self { inner, _owner: Arc::new(Owner(end)) };
        let (confined, outcome) = channel();
        for _ in 0..count.max(1) {
            threads.spawn(name, confine.clone(), confined.clone())?;
        }
        for _ in 0..count.max(1) {
            outcome.recv().map_err(|_| io::Error::other("a thread ended at once"))??;
        }
        Ok(threads)
    }

    fn spawn(&self, name: &str, confine: Confine, confined: Sender<io::Result<()>>) -> io::Result<()> {
        let inner = self.inner.clone();
        let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        builder.spawn(move || {
            let result = confine();
            let failed = result.is_err();
            let _ = confined.send(result);
            drop((confine, confined));
            // Nobody is served on a thread that could not be confined.
            if !failed {
                inner.run();
            }
        })?;
        Ok(())
    }

    /// Calls `served` on one of the threads whenever `kick` is written to, and once now. The eventfd is never read: each
    /// write is one event (edge-triggered), also while earlier ones are being served.
    pub(super) fn watch(&self, kick: &EventFd, served: &Arc<dyn Served>) -> io::Result<Watch> {
        let kick = kick.try_clone()?;
        let id = {
            let mut state = lock(&self.inner.state);
            state.last += 1;
            let id = state.last;
            state.watched.insert(id, Arc::downgrade(served));
            id
        };
        let watch = Watch { threads: self.clone(), kick, id };
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, id);
        self.inner.epoll.ctl(ControlOperation::Add, watch.kick.as_raw_fd(), event)?;
        watch.kick();
        Ok(watch)
    }
}

/// As long as it lives, the threads serve what was watched. Dropped, calls that are under way may still be in it.
pub(super) struct Watch {
    threads: BlockThreads,
    kick: EventFd,
    id: u64,
}

impl Watch {
    /// As if the driver had notified.
    pub(super) fn kick(&self) {
        let _ = self.kick.write(1);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let inner = &self.threads.inner;
        let _ = inner.epoll.ctl(ControlOperation::Delete, self.kick.as_raw_fd(), EpollEvent::default());
        lock(&inner.state).watched.remove(&self.id);
    }
}

impl Inner {
    /// The life of a thread.
    fn run(&self) {
        // One at a time: what is left is for the others.
        let mut event = [EpollEvent::default()];
        loop {
            match self.epoll.wait(-1, &mut event) {
                Ok(_) if event[0].data() == END => return,
                Ok(_) => {
                    let served = lock(&self.state).watched.get(&event[0].data()).and_then(Weak::upgrade);
                    if let Some(served) = served {
                        served.serve();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The epoll itself is broken, which cannot be; better no thread than one that spins.
                Err(_) => return,
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the whole process; a poisoned lock is only ever seen in tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
