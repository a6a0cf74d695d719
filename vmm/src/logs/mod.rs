//! The log files of the guest's containers, written here so that nothing of the guest and nothing of hulld is needed for a
//! line to be in its file.
//!
//! The agent connects to port [`LOG_PORT`] once for each output of a container; the connection begins with one frame that
//! holds a `LogHello`, and raw bytes follow. They become lines of the CRI log format by the agent's own formatter and go
//! to the file that hulld gave for that container ([`LogsHandle::set`]), both outputs of a container line by line into
//! one file. What cannot be written (full disk, quota) is dropped and counted, as for containers on the host.
//!
//! * Until a container has a file its connections are not read: the guest writes until its credit is used up, and waits.
//! * A connection is closed from here only after all that came over it is in the file. The agent ends its side, waits
//!   for that, and reports the container's exit only then: a reported exit means a complete log.
//! * Rotation is another [`LogsHandle::set`]: a file gets whole lines only.

/// How a connection begins.
mod greeting;
/// The thread's part.
mod writer;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_agent::stdio::LogFile;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::vsock::Service;
use crate::devices::virtio::{Attached, Worker};
use writer::Writer;

/// The host's port for output of containers.
pub const LOG_PORT: u32 = 1025;
/// Most connections at a time; what comes on top is closed.
const MOST_CONNECTIONS: usize = 512;

/// The logs of one machine, as long as this lives.
pub struct Logs {
    shared: Arc<Shared>,
    _writer: Attached<Writer>,
}

/// Gives the logs their files and asks about them. Cheap to clone; works from any thread.
#[derive(Clone)]
pub struct LogsHandle {
    shared: Arc<Shared>,
}

/// What has become of a container's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogState {
    /// Whether there is a file, or it was said that there is none.
    pub is_set: bool,
    /// Connections that have said that they are this container's and have not ended.
    pub open: u32,
    /// Bytes that could not be written.
    pub dropped: u64,
}

#[derive(Default)]
struct Log {
    file: LogFile,
    is_set: bool,
    /// stdout, stderr: whether its connection is open.
    open: [bool; 2],
}

struct Shared {
    logs: Mutex<BTreeMap<String, Log>>,
    arrivals: Mutex<Vec<OwnedFd>>,
    wake: EventFd,
}

impl Shared {
    fn logs(&self) -> MutexGuard<'_, BTreeMap<String, Log>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = self.wake.write(1);
    }
}

impl Logs {
    /// Begins to serve on `worker`'s thread, which waits for disks: no device should share it.
    ///
    /// # Errors
    /// There are no descriptors, or the thread is gone.
    pub fn start(worker: &Worker) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { logs: Mutex::default(), arrivals: Mutex::default(), wake });
        let writer = worker.attach(Writer::new(shared.clone()))?;
        Ok(Self { shared, _writer: writer })
    }

    /// For control requests, and as the [`Service`] of port [`LOG_PORT`].
    #[must_use]
    pub fn handle(&self) -> LogsHandle {
        LogsHandle { shared: self.shared.clone() }
    }
}

impl LogsHandle {
    /// From now on this container's lines go to `file`, open for appending, or nowhere. Lines that were complete before
    /// are in the former file when this returns.
    pub fn set(&self, container: &str, file: Option<OwnedFd>) {
        {
            let mut logs = self.shared.logs();
            let log = logs.entry(container.to_owned()).or_default();
            log.is_set = true;
            match file {
                Some(file) => log.file.replace(file),
                None => log.file.close(),
            }
        }
        self.shared.wake();
    }

    /// Forgets the container. What its connections still bring is dropped, and they end as they would.
    pub fn remove(&self, container: &str) {
        self.shared.logs().remove(container);
    }

    /// What has become of this container's output; `None` if nobody ever spoke of it.
    #[must_use]
    pub fn state(&self, container: &str) -> Option<LogState> {
        let logs = self.shared.logs();
        let log = logs.get(container)?;
        let open = log.open.iter().filter(|open| **open).count() as u32;
        Some(LogState { is_set: log.is_set, open, dropped: log.file.dropped() })
    }

    /// The containers that a file was given for, or that were said to have none.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        let logs = self.shared.logs();
        logs.iter().filter(|(_, log)| log.is_set).map(|(container, _)| container.clone()).collect()
    }

    /// Bytes that could not be written, of all containers that are not removed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.logs().values().map(|log| log.file.dropped()).sum()
    }
}

impl Service for LogsHandle {
    fn accept(&self, stream: OwnedFd) {
        self.shared.arrivals().push(stream);
        self.shared.wake();
    }
}
