use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::server::{ServeError, Server};
use super::{OnFault, TAG};
use crate::devices::virtio::{self, Activation, Registrar, SavedQueue};

const WAKE: u32 = 0;
const SERVER: u32 = 1;
/// How long whoever brings a server waits for the device's thread, which itself waits for the server.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the device and its handles share.
pub(super) struct Shared {
    server: Mutex<Place>,
    /// Wakes the device's thread when a server has come.
    wake: EventFd,
    /// A driver has set the device up: there is a thread to wake.
    active: AtomicBool,
    /// Some server was given the queues once.
    served: AtomicBool,
    on_fault: OnFault,
}

/// Who serves.
enum Place {
    Nobody,
    /// Brought while the device's thread has not looked yet.
    Offered(Server, Sender<Result<(), ServeError>>),
    Taken(Server),
}

impl Shared {
    pub(super) fn new(on_fault: OnFault) -> io::Result<Self> {
        Ok(Self {
            server: Mutex::new(Place::Nobody),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            active: AtomicBool::new(false),
            served: AtomicBool::new(false),
            on_fault,
        })
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_server(&self) -> bool {
        !matches!(*self.place(), Place::Nobody)
    }

    pub(super) fn has_served(&self) -> bool {
        self.served.load(Ordering::SeqCst)
    }

    pub(super) fn offer(&self, socket: OwnedFd) -> Result<(), ServeError> {
        let server = Server::new(socket)?;
        let (sender, outcome) = channel();
        {
            let mut place = self.place();
            if !matches!(*place, Place::Nobody) {
                return Err(ServeError::Occupied);
            }
            if !self.active.load(Ordering::SeqCst) {
                *place = Place::Taken(server);
                return Ok(());
            }
            *place = Place::Offered(server, sender);
        }
        self.wake.write(1)?;
        outcome
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
    }

    fn lose(&self, why: &str) {
        *self.place() = Place::Nobody;
        (self.on_fault)(TAG, &format!("the volumes are not served any more: {why}"));
    }
}

/// An active device on its worker's thread.
pub(super) struct Handler {
    shared: Arc<Shared>,
    activation: Activation,
    serving: bool,
}

impl Handler {
    pub(super) fn new(shared: Arc<Shared>, activation: Activation) -> Self {
        Self { shared, activation, serving: false }
    }

    pub(super) fn saved_queues(&self) -> Vec<SavedQueue> {
        self.activation.queues.iter().map(virtio::ActiveQueue::save).collect()
    }

    /// Gives the queues to the server that is there, if one is.
    fn begin(&mut self, registrar: &mut Registrar<'_>) {
        let shared = Arc::clone(&self.shared);
        let mut place = shared.place();
        let (mut server, waiting) = match std::mem::replace(&mut *place, Place::Nobody) {
            Place::Nobody => return,
            Place::Offered(server, sender) => (server, Some(sender)),
            Place::Taken(server) => (server, None),
        };
        let began = server.begin(&self.activation).and_then(|()| {
            registrar.watch(&server, SERVER, EventSet::IN | EventSet::READ_HANG_UP)?;
            Ok(())
        });
        let failure = began.as_ref().err().map(ToString::to_string);
        if failure.is_none() {
            *place = Place::Taken(server);
            self.serving = true;
            shared.served.store(true, Ordering::SeqCst);
        }
        drop(place);
        match (waiting, failure) {
            // Whoever brought it is told, and reports it.
            (Some(sender), _) => drop(sender.send(began)),
            (None, Some(why)) => shared.lose(&why),
            (None, None) => {}
        }
    }
}

impl virtio::Handler for Handler {
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
        registrar.watch(&self.shared.wake, WAKE, EventSet::IN)?;
        self.shared.active.store(true, Ordering::SeqCst);
        self.begin(registrar);
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, registrar: &mut Registrar<'_>) {
        if token == WAKE {
            let _ = self.shared.wake.read();
            if !self.serving {
                self.begin(registrar);
            }
        } else if self.serving {
            // It speaks only when asked, so this is its end or as good as that.
            self.serving = false;
            if let Place::Taken(server) = &*self.shared.place() {
                registrar.remove(server);
            }
            self.shared.lose("hull-virtiofsd has gone");
        }
    }

    fn stop(&mut self) {
        self.shared.active.store(false, Ordering::SeqCst);
        if !std::mem::take(&mut self.serving) {
            return;
        }
        let halted = match &mut *self.shared.place() {
            Place::Taken(server) => server.halt(&mut self.activation.queues),
            _ => Ok(()),
        };
        if let Err(error) = halted {
            // Without its connection it ends, and its end takes it off the guest's memory.
            self.shared.lose(&error.to_string());
        }
    }
}
