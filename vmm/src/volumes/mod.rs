//! hull-virtiofsd: serves the host's directories and files of a pod to its guest, over virtio-fs.
//!
//! A process of its own for each pod that has such a volume, started with the first one: it alone has capabilities over
//! files, in the pod's user namespace and over nothing but /volumes. hulld attaches each volume there at any time
//! ([`crate::attach`]); the guest mounts the whole of it once and finds the volumes in it by number. The VMM hands over
//! guest memory and the queues; requests are carried out by `virtiofsd::passthrough`.
//!
//! What the guest sees of the host's files is never older than its last look: names and attributes are asked for each
//! time, file data is cached in the guest while a file is open and dropped when it is opened again. Locks are the
//! guest's own: they hold between the containers of the pod and not towards the host.

/// One request.
mod requests;
/// Queues in guest memory, shared by the threads that serve them.
mod ring;
/// From the hand-over of the queues to their return.
mod session;
/// The threads.
mod workers;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::passthrough::{CachePolicy, Config, NegotiationMode, PassthroughFs};

use crate::jail::{self, BornForVolumes, ThreadKind};
use crate::protocol::messages::{
    self, Message, error::Code, message::Body, request::Call, response::Outcome,
};
use crate::protocol::{BlockingConnection, Descriptors, Frame};
#[doc(hidden)]
pub use requests::Alone;
use requests::Requests;
use session::{Session, SessionError};
use workers::Workers;

/// Where the volumes are, in the process's own root.
const ROOT: &str = "/volumes";
/// Threads for requests; each waits for one disk at a time.
const REQUEST_THREADS: usize = 4;

/// The program. Ends with the VMM.
pub fn main() -> ExitCode {
    // hulld has been told the reason of a failure.
    let Ok(born) = jail::enter_for_volumes() else { return ExitCode::FAILURE };
    let BornForVolumes { vmm, open_files, own_descriptors, birth } = born;
    let prepared = Server::prepare(ROOT, open_files, own_descriptors, jail::confine)
        .and_then(|server| jail::confine(ThreadKind::VolumesControl).map(|()| server));
    match prepared {
        Ok(mut server) => {
            drop(birth.ready());
            match server.run(vmm) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("the connection to the VMM failed: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Err(error) => {
            birth.failed(&format!("cannot prepare to serve volumes: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The server without its confinement.
struct Server {
    workers: Workers,
    session: Option<Arc<Session>>,
}

impl Server {
    /// Starts the threads, each of which confines itself. `own_descriptors` is this process's /proc/self/fd.
    fn prepare(
        root: &str,
        open_files: u64,
        own_descriptors: OwnedFd,
        confine: fn(ThreadKind) -> io::Result<()>,
    ) -> io::Result<Self> {
        let requests =
            Arc::new(Requests::new(PassthroughFs::new(config(root, open_files, own_descriptors))?)?);
        Ok(Self { workers: Workers::start(&requests, REQUEST_THREADS, confine)?, session: None })
    }

    /// Serves the VMM's requests until it closes the connection.
    fn run(&mut self, vmm: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&vmm, false)?;
        let mut connection = BlockingConnection::new(vmm);
        let result = loop {
            match connection.recv() {
                Ok(Some(frame)) => self.answer(&mut connection, frame)?,
                Ok(None) => break Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.halt();
        result
    }

    fn answer(&mut self, connection: &mut BlockingConnection, frame: Frame) -> io::Result<()> {
        let Some(Body::Request(request)) = frame.message.body else {
            return Err(io::Error::other("it sent something that is no request"));
        };
        let outcome = match request.call {
            Some(Call::ServeQueues(call)) => match self.serve(&call, Descriptors::new(frame.fds)) {
                Ok(()) => Outcome::Done(messages::Empty {}),
                Err(error) => refusal(Code::Invalid, error.to_string()),
            },
            Some(Call::HaltQueues(_)) => match self.halt() {
                Some(positions) => Outcome::Halted(messages::QueuePositions { positions }),
                None => refusal(Code::FailedPrecondition, "no queues are being served".to_owned()),
            },
            _ => refusal(Code::UnknownCall, "this hull-virtiofsd does not know the request".to_owned()),
        };
        connection.send(&Message::response(frame.message.id, outcome), &[])
    }

    fn serve(&mut self, call: &messages::ServeQueues, fds: Descriptors) -> Result<(), SessionError> {
        if self.session.is_some() {
            return Err(SessionError::Busy);
        }
        let session = Arc::new(Session::new(call, fds)?);
        self.workers.serve(Arc::clone(&session));
        self.session = Some(session);
        Ok(())
    }

    /// Waits for the requests under way; where the queues stand then.
    fn halt(&mut self) -> Option<Vec<messages::QueuePosition>> {
        let session = self.session.take()?;
        session.stop();
        self.workers.rest();
        Some(session.positions())
    }
}

/// The server without its process and its connections, for the fuzz target.
#[doc(hidden)]
pub struct ServerAlone(Server);

impl ServerAlone {
    /// Serves the directory, on threads that share the caller's root.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(root: &str, own_descriptors: OwnedFd) -> io::Result<Self> {
        Server::prepare(root, 1000, own_descriptors, |_| Ok(())).map(Self)
    }

    /// Takes queues over, as the VMM hands them over with these descriptors.
    ///
    /// # Errors
    /// They make no sense, or others are being served.
    pub fn serve(&mut self, call: &messages::ServeQueues, fds: Vec<OwnedFd>) -> Result<(), String> {
        self.0.serve(call, Descriptors::new(fds)).map_err(|error| error.to_string())
    }

    /// Gives the queues back; whether there were any.
    pub fn halt(&mut self) -> bool {
        self.0.halt().is_some()
    }
}

/// How `root` is served.
fn config(root: &str, open_files: u64, own_descriptors: OwnedFd) -> Config {
    Config {
        root_dir: root.to_owned(),
        proc_sfd_rawfd: Some(File::from(own_descriptors)),
        cache_policy: CachePolicy::Auto,
        entry_timeout: Duration::ZERO,
        attr_timeout: Duration::ZERO,
        // Each volume is a file system of its own to the guest: inode numbers of two may be the same.
        announce_submounts: true,
        guest_fd_limit: open_files,
        xattr: true,
        // Set-user-ID bits go with a write, without a question about each of them before.
        killpriv_v2: true,
        // Otherwise the guest would take the mask of an access list for the group's permissions.
        posix_acl: NegotiationMode::Auto,
        ..Config::default()
    }
}

fn refusal(code: Code, message: String) -> Outcome {
    Outcome::Error(messages::Error { code: code.into(), message, errno: 0 })
}
