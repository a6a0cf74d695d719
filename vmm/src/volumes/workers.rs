use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::requests::Requests;
use super::session::Session;
use crate::jail::ThreadKind;

/// Address space for a thread's stack; only what it touches is memory.
const STACK: usize = 256 << 10;
/// Virtio 1.2, 5.11.2: the queue for forgets comes first, then those for requests.
const FORGETS: usize = 0;
const REQUESTS: usize = 1;

/// The threads that carry requests out. They rest until there is a session, and between two.
pub(super) struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    /// Counts sessions, so that a thread does not take one up twice.
    number: u64,
    /// Threads that are in it still.
    busy: usize,
    threads: usize,
}

impl Workers {
    /// One thread for forgets and `count` for requests, each confined before it does anything.
    pub(super) fn start(
        requests: &Arc<Requests>,
        count: usize,
        confine: fn(ThreadKind) -> io::Result<()>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let queues = std::iter::once(FORGETS).chain(std::iter::repeat_n(REQUESTS, count));
        for (number, queue) in queues.enumerate() {
            let (sender, confined) = channel();
            let (shared, requests) = (Arc::clone(&shared), Arc::clone(requests));
            let body = move || {
                // Requests change the current directory and the umask.
                let ready = hull_sys::namespace::unshare_filesystem_attributes()
                    .and_then(|()| confine(ThreadKind::Volumes));
                let failed = ready.is_err();
                let _ = sender.send(ready);
                if !failed {
                    shared.work(queue, &requests);
                }
            };
            let name = if queue == FORGETS { "forgets".to_owned() } else { format!("requests{number}") };
            std::thread::Builder::new().name(name).stack_size(STACK).spawn(body)?;
            confined.recv().map_err(|_| io::Error::other("a thread ended at once"))??;
        }
        shared.lock().threads = count + 1;
        Ok(Self { shared })
    }

    /// Lets the threads serve the session. The one before must have been left.
    pub(super) fn serve(&self, session: Arc<Session>) {
        let mut state = self.shared.lock();
        state.session = Some(session);
        state.number += 1;
        state.busy = state.threads;
        self.shared.changed.notify_all();
    }

    /// Waits until every thread has left the session, which has been stopped.
    pub(super) fn rest(&self) {
        let mut state = self.shared.lock();
        while state.busy > 0 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.session = None;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, queue: usize, requests: &Requests) {
        let mut last = 0;
        loop {
            let session = self.next_session(&mut last);
            if let Some((ring, stop)) = session.ring(queue) {
                while let Some(chain) = ring.next(&session.memory, stop) {
                    let head = chain.head_index();
                    let length = requests.handle(&session.memory, chain);
                    ring.give_back(&session.memory, head, length);
                }
            }
            drop(session);
            self.lock().busy -= 1;
            self.changed.notify_all();
        }
    }

    fn next_session(&self, last: &mut u64) -> Arc<Session> {
        let mut state = self.lock();
        loop {
            if let Some(session) = state.session.as_ref().filter(|_| state.number != *last) {
                *last = state.number;
                return Arc::clone(session);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
