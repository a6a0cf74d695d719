use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Address space for a worker's stack; only what it touches is memory.
const STACK: usize = 256 << 10;
/// Events taken from the kernel at once.
const EVENTS: usize = 16;
/// The `epoll` data of the worker's own wake-up.
const WAKE: u64 = u64::MAX;

/// What a device does on a worker's thread.
pub trait Handler: Send + 'static {
    /// Comes onto the thread: registers its descriptors, and looks into its queues (they may have been filled before).
    /// Called again after each pause.
    ///
    /// # Errors
    /// It stays off the thread, and whoever attached it gets the error.
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()>;

    /// A registered descriptor is ready. Level-triggered. May be spurious, and may even come once for a descriptor that
    /// was just removed: never block on it. Must do a bounded amount of work.
    fn ready(&mut self, token: u32, events: EventSet, registrar: &mut Registrar<'_>);

    /// Leaves the thread (a pause, a reset): end what is under way, so that guest memory is left alone afterwards.
    /// What it registered is removed for it.
    fn stop(&mut self) {}
}

/// Registers descriptors of one handler with its worker.
pub struct Registrar<'a> {
    epoll: &'a Epoll,
    registered: &'a mut BTreeMap<RawFd, u32>,
    handler: u32,
}

impl Registrar<'_> {
    /// Calls [`Handler::ready`] with `token` whenever `descriptor` is ready for one of `events`; changes the token and
    /// the events of one that is registered already. Remove a descriptor before closing it.
    ///
    /// # Errors
    /// As `epoll_ctl`: a descriptor that cannot be waited for.
    pub fn watch(&mut self, descriptor: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        let fd = descriptor.as_raw_fd();
        let known = self.registered.contains_key(&fd);
        let operation = if known { ControlOperation::Modify } else { ControlOperation::Add };
        let data = u64::from(self.handler) << 32 | u64::from(token);
        self.epoll.ctl(operation, fd, EpollEvent::new(events, data))?;
        self.registered.insert(fd, token);
        Ok(())
    }

    /// No longer waits for `descriptor`; harmless if it never did.
    pub fn remove(&mut self, descriptor: &impl AsRawFd) {
        let fd = descriptor.as_raw_fd();
        if self.registered.remove(&fd).is_some() {
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

type Shared = Arc<Mutex<dyn Handler>>;

enum Command {
    Attach { id: u32, handler: Shared, done: Sender<io::Result<()>> },
    Detach { id: u32, done: Sender<io::Result<()>> },
    End,
}

struct Inner {
    name: String,
    commands: Mutex<(Sender<Command>, u32)>,
    wake: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A thread that serves the queues of one or more devices and sleeps while there is nothing to do. Cheap to clone; the
/// thread ends with the last clone and the last attached handler.
#[derive(Clone)]
pub struct Worker {
    inner: Arc<Inner>,
}

impl Worker {
    /// Starts the thread. `confine` runs on it first (a seccomp filter of its own, say).
    ///
    /// # Errors
    /// The thread, its epoll or its eventfd could not be made.
    pub fn start(name: &str, confine: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let (sender, receiver) = channel();
        let (confined, outcome) = channel();
        let events = Loop { epoll, wake: wake.try_clone()?, commands: receiver, handlers: BTreeMap::new() };
        let thread =
            std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
                let result = confine();
                let ended = result.is_err();
                let _ = confined.send(result);
                if !ended {
                    events.run();
                }
            })?;
        outcome.recv().map_err(|_| io::Error::other("its thread ended at once"))??;
        let inner = Inner {
            name: name.to_owned(),
            commands: Mutex::new((sender, 0)),
            wake,
            thread: Mutex::new(Some(thread)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Puts a handler onto the thread; returns once [`Handler::start`] has run there.
    ///
    /// # Errors
    /// What `start` answered, or the thread is gone.
    pub fn attach<H: Handler>(&self, handler: H) -> io::Result<Attached<H>> {
        let handler = Arc::new(Mutex::new(handler));
        let mut attached = Attached { worker: self.clone(), handler, id: None };
        attached.resume()?;
        Ok(attached)
    }

    fn command(&self, make: impl FnOnce(u32, Sender<io::Result<()>>) -> Command) -> io::Result<u32> {
        let (done, outcome) = channel();
        let gone = || io::Error::other(format!("the thread {} is gone", self.inner.name));
        let id = {
            let mut commands = lock(&self.inner.commands);
            commands.1 = commands.1.wrapping_add(1) & 0x7fff_ffff;
            let id = commands.1;
            commands.0.send(make(id, done)).map_err(|_| gone())?;
            id
        };
        self.inner.wake.write(1)?;
        outcome.recv().map_err(|_| gone())??;
        Ok(id)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = lock(&self.commands).0.send(Command::End);
        let _ = self.wake.write(1);
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// A handler and its place on a worker's thread. Dropped, the handler leaves the thread.
pub struct Attached<H: Handler> {
    worker: Worker,
    handler: Arc<Mutex<H>>,
    id: Option<u32>,
}

impl<H: Handler> Attached<H> {
    /// Takes the handler off the thread; when it returns, [`Handler::stop`] has run and nothing of it runs any more.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn pause(&mut self) -> io::Result<()> {
        let Some(id) = self.id.take() else { return Ok(()) };
        self.worker.command(|_, done| Command::Detach { id, done }).map(|_| ())
    }

    /// Puts it back onto the thread: [`Handler::start`] runs there again.
    ///
    /// # Errors
    /// What `start` answered, or the thread is gone.
    pub fn resume(&mut self) -> io::Result<()> {
        if self.id.is_none() {
            let handler: Shared = self.handler.clone();
            self.id = Some(self.worker.command(|id, done| Command::Attach { id, handler, done })?);
        }
        Ok(())
    }

    /// Whether it is off the thread.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.id.is_none()
    }

    /// The handler itself, from any thread; waits until the worker has finished with the event that it is at.
    pub fn lock(&self) -> MutexGuard<'_, H> {
        lock(&self.handler)
    }
}

impl<H: Handler> Drop for Attached<H> {
    fn drop(&mut self) {
        let _ = self.pause();
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the whole process (profile agent): a poisoned lock is only ever seen in tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Loop {
    epoll: Epoll,
    wake: EventFd,
    commands: Receiver<Command>,
    handlers: BTreeMap<u32, (Shared, BTreeMap<RawFd, u32>)>,
}

impl Loop {
    fn run(mut self) {
        let mut events = vec![EpollEvent::default(); EVENTS];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let mut woken = false;
            for event in events.iter().take(count) {
                match event.data() {
                    WAKE => woken = true,
                    data => self.dispatch((data >> 32) as u32, data as u32, event.event_set()),
                }
            }
            // Last, so that a handler that was detached sees none of this round's events.
            if woken {
                let _ = self.wake.read();
                if !self.obey() {
                    return;
                }
            }
        }
    }

    fn dispatch(&mut self, id: u32, token: u32, events: EventSet) {
        if let Some((handler, registered)) = self.handlers.get_mut(&id) {
            let mut registrar = Registrar { epoll: &self.epoll, registered, handler: id };
            lock(handler).ready(token, events, &mut registrar);
        }
    }

    /// False when the thread is to end.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach { id, handler, done } => {
                    let mut registered = BTreeMap::new();
                    let mut registrar =
                        Registrar { epoll: &self.epoll, registered: &mut registered, handler: id };
                    let result = lock(&handler).start(&mut registrar);
                    if result.is_ok() {
                        self.handlers.insert(id, (handler, registered));
                    } else {
                        self.forget(&registered);
                    }
                    let _ = done.send(result);
                }
                Command::Detach { id, done } => {
                    if let Some((handler, registered)) = self.handlers.remove(&id) {
                        self.forget(&registered);
                        lock(&handler).stop();
                    }
                    let _ = done.send(Ok(()));
                }
                Command::End => return false,
            }
        }
        true
    }

    fn forget(&self, registered: &BTreeMap<RawFd, u32>) {
        for fd in registered.keys() {
            let _ = self.epoll.ctl(ControlOperation::Delete, *fd, EpollEvent::default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::Receiver;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[derive(Debug, PartialEq)]
    enum Seen {
        Started,
        Ready(u32),
        Stopped,
    }

    /// Tells what happens to it; its descriptor has token 7.
    struct Double {
        event: EventFd,
        tell: Sender<Seen>,
        fails: bool,
        /// Leaves the event unread, so that it stays ready.
        lazy: bool,
    }

    impl Handler for Double {
        fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
            registrar.watch(&self.event, 7, EventSet::IN)?;
            if self.fails {
                return Err(io::Error::other("it is told to fail"));
            }
            let _ = self.tell.send(Seen::Started);
            Ok(())
        }
        fn ready(&mut self, token: u32, _: EventSet, registrar: &mut Registrar<'_>) {
            if self.lazy {
                registrar.remove(&self.event);
            } else {
                let _ = self.event.read();
            }
            let _ = self.tell.send(Seen::Ready(token));
        }
        fn stop(&mut self) {
            let _ = self.tell.send(Seen::Stopped);
        }
    }

    fn double() -> (Double, EventFd, Receiver<Seen>) {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (tell, seen) = channel();
        let theirs = event.try_clone().unwrap();
        (Double { event: theirs, tell, fails: false, lazy: false }, event, seen)
    }

    fn next(seen: &Receiver<Seen>) -> Seen {
        seen.recv_timeout(PATIENCE).unwrap()
    }

    fn quiet(seen: &Receiver<Seen>) {
        assert!(seen.recv_timeout(Duration::from_millis(50)).is_err());
    }

    #[test]
    fn a_handler_is_called_while_it_is_attached_and_not_while_it_rests() {
        let worker = Worker::start("test", || Ok(())).unwrap();
        let (handler, event, seen) = double();

        let mut attached = worker.attach(handler).unwrap();
        assert_eq!(next(&seen), Seen::Started);
        event.write(1).unwrap();
        assert_eq!(next(&seen), Seen::Ready(7));

        attached.pause().unwrap();
        assert_eq!(next(&seen), Seen::Stopped);
        event.write(1).unwrap();
        quiet(&seen);

        attached.resume().unwrap();
        assert_eq!(next(&seen), Seen::Started);
        assert_eq!(next(&seen), Seen::Ready(7), "what came while it rested");
        drop(attached);
        assert_eq!(next(&seen), Seen::Stopped);
        event.write(1).unwrap();
        quiet(&seen);
    }

    #[test]
    fn a_removed_descriptor_is_silent_although_it_is_ready() {
        let worker = Worker::start("test", || Ok(())).unwrap();
        let (mut handler, event, seen) = double();
        handler.lazy = true;
        let _attached = worker.attach(handler).unwrap();
        assert_eq!(next(&seen), Seen::Started);

        event.write(1).unwrap();

        assert_eq!(next(&seen), Seen::Ready(7));
        quiet(&seen);
    }

    #[test]
    fn a_handler_that_cannot_start_stays_off_and_leaves_nothing_behind() {
        let worker = Worker::start("test", || Ok(())).unwrap();
        let (mut handler, event, seen) = double();
        handler.fails = true;

        assert!(worker.attach(handler).is_err());
        event.write(1).unwrap();

        quiet(&seen);
        let (handler, _event, seen) = double();
        let _attached = worker.attach(handler).unwrap();
        assert_eq!(next(&seen), Seen::Started, "the thread serves others");
    }

    #[test]
    fn several_handlers_share_a_thread_and_each_gets_its_own_events() {
        let worker = Worker::start("test", || Ok(())).unwrap();
        let (first, first_event, first_seen) = double();
        let (second, second_event, second_seen) = double();
        let first = worker.attach(first).unwrap();
        let _second = worker.attach(second).unwrap();
        assert_eq!((next(&first_seen), next(&second_seen)), (Seen::Started, Seen::Started));

        second_event.write(1).unwrap();

        assert_eq!(next(&second_seen), Seen::Ready(7));
        quiet(&first_seen);
        drop(first);
        first_event.write(1).unwrap();
        second_event.write(1).unwrap();
        assert_eq!(next(&second_seen), Seen::Ready(7));
    }

    #[test]
    fn a_thread_that_cannot_be_confined_is_no_worker() {
        let error = Worker::start("test", || Err(io::Error::other("no filter"))).err().unwrap();

        assert_eq!(error.to_string(), "no filter");
    }

    #[test]
    fn the_thread_ends_with_its_last_user() {
        let threads = || {
            let names = std::fs::read_dir("/proc/self/task")
                .unwrap()
                .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
            names.filter(|name| name == "short-lived\n").count()
        };
        let worker = Worker::start("short-lived", || Ok(())).unwrap();
        let (handler, _event, _seen) = double();
        let attached = worker.attach(handler).unwrap();
        drop(worker);
        assert_eq!(threads(), 1);

        drop(attached);

        // Joined, it is no more; the kernel takes it out of /proc a moment later.
        let joined = std::time::Instant::now();
        while threads() > 0 {
            assert!(joined.elapsed() < std::time::Duration::from_secs(10), "it goes on");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
