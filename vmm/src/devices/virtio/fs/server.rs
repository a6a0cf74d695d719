use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use hull_sys::descriptor::duplicate;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use thiserror::Error;
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};

use crate::devices::virtio::{Activation, ActiveQueue};
use crate::protocol::BlockingConnection;
use crate::protocol::messages::{
    HaltQueues, MemoryRegion, Message, Queue, QueuePosition, ServeQueues, message::Body, request::Call,
    response::Outcome,
};

/// How long the server may take to answer. It maps memory and starts nothing; a halt waits for the requests under way,
/// and a disk may be slow.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why hull-virtiofsd does not serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Only one can.
    #[error("another hull-virtiofsd serves the volumes already")]
    Occupied,
    /// It could not be spoken to.
    #[error("hull-virtiofsd does not answer: {0}")]
    Connection(#[from] io::Error),
    /// It said no.
    #[error("hull-virtiofsd refuses: {0}")]
    Refused(String),
    /// It answered something else.
    #[error("hull-virtiofsd answered what was not asked")]
    Nonsense,
    /// The guest's memory is not of the kind that another process can map.
    #[error("the guest's memory cannot be shared with another process")]
    Memory,
}

/// The connection to hull-virtiofsd. What comes over it is checked: the server has read what the guest has written.
pub(super) struct Server {
    connection: BlockingConnection,
    next_id: u64,
}

impl Server {
    pub(super) fn new(socket: OwnedFd) -> Result<Self, ServeError> {
        rustix::io::ioctl_fionbio(&socket, false).map_err(io::Error::from)?;
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, direction, Some(PATIENCE)).map_err(io::Error::from)?;
        }
        Ok(Self { connection: BlockingConnection::new(socket), next_id: 0 })
    }

    /// Hands over the queues of an active device.
    pub(super) fn begin(&mut self, activation: &Activation) -> Result<(), ServeError> {
        let mut fds = Vec::new();
        let regions = regions(activation, &mut fds)?;
        let mut lines = Vec::new();
        let mut queues = Vec::new();
        for queue in &activation.queues {
            queues.push(hand_over(queue, fds.len() + lines.len()));
            lines.push(duplicate(queue)?);
            lines.push(duplicate(&activation.interrupt.irqfd(queue.index)?)?);
        }
        fds.extend(lines.iter().map(AsFd::as_fd));
        let call = ServeQueues { regions, features: activation.features, queues };
        match self.ask(Call::ServeQueues(call), &fds)? {
            Outcome::Done(_) => Ok(()),
            _ => Err(ServeError::Nonsense),
        }
    }

    /// Takes the queues back; when this returns without an error, the server has left them.
    pub(super) fn halt(&mut self, queues: &mut [ActiveQueue]) -> Result<(), ServeError> {
        let Outcome::Halted(halted) = self.ask(Call::HaltQueues(HaltQueues {}), &[])? else {
            return Err(ServeError::Nonsense);
        };
        if halted.positions.len() != queues.len() {
            return Err(ServeError::Nonsense);
        }
        for (queue, position) in queues.iter_mut().zip(halted.positions) {
            let narrow = |index| u16::try_from(index).map_err(|_| ServeError::Nonsense);
            queue.continue_at(narrow(position.next_available)?, narrow(position.next_used)?);
        }
        Ok(())
    }

    fn ask(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Outcome, ServeError> {
        self.next_id += 1;
        self.connection.send(&Message::request(self.next_id, call, fds.len()), fds)?;
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let frame = self.connection.recv()?.ok_or_else(gone)?;
        if frame.message.id != self.next_id {
            return Err(ServeError::Nonsense);
        }
        match frame.message.body {
            Some(Body::Response(response)) => match response.outcome {
                Some(Outcome::Error(error)) => Err(ServeError::Refused(error.message)),
                Some(outcome) => Ok(outcome),
                None => Err(ServeError::Nonsense),
            },
            _ => Err(ServeError::Nonsense),
        }
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.connection.as_fd().as_raw_fd()
    }
}

/// The memory, and its files appended to `fds`, each once.
fn regions<'a>(
    activation: &'a Activation,
    fds: &mut Vec<BorrowedFd<'a>>,
) -> Result<Vec<MemoryRegion>, ServeError> {
    let mut regions = Vec::new();
    for region in activation.memory.iter() {
        let file = region.file_offset().ok_or(ServeError::Memory)?;
        let fd = file.file().as_fd();
        let known = fds.iter().position(|other| other.as_raw_fd() == fd.as_raw_fd());
        let number = known.unwrap_or_else(|| {
            fds.push(fd);
            fds.len() - 1
        });
        regions.push(MemoryRegion {
            address: region.start_addr().raw_value(),
            size: region.len(),
            offset: file.start(),
            file: number as u32,
        });
    }
    Ok(regions)
}

/// The queue, whose kick has this number among the descriptors and whose interrupt has the next.
fn hand_over(queue: &ActiveQueue, kick: usize) -> Queue {
    let state = queue.state();
    Queue {
        // One that the driver has not set up has no entries.
        size: if queue.ready() { state.size.into() } else { 0 },
        descriptor_table: state.desc_table,
        available_ring: state.avail_ring,
        used_ring: state.used_ring,
        position: Some(QueuePosition {
            next_available: state.next_avail.into(),
            next_used: state.next_used.into(),
        }),
        kick: kick as u32,
        call: kick as u32 + 1,
    }
}
