use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::message::{Batch, HEADER};
use crate::NetworkError;

const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The table changed while it was listed: list again.
const F_DUMP_INTERRUPTED: u16 = 0x10;
/// Listings come in pieces of at most 32 KiB.
const RECEIVE: usize = 64 * 1024;

/// A message that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {errno}")]
pub(crate) struct NetlinkError {
    pub(crate) what: String,
    pub(crate) errno: Errno,
}

impl From<NetlinkError> for NetworkError {
    fn from(error: NetlinkError) -> Self {
        Self::Kernel { action: error.what, source: error.errno.into() }
    }
}

/// A netlink socket of the network namespace in which the calling thread was when it was opened.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// For links, addresses and routes.
    pub(crate) fn route() -> Result<Self, NetlinkError> {
        // NETLINK_ROUTE is protocol 0, for which rustix has no Protocol value: it is the default.
        Self::open(None, "opening a rtnetlink socket")
    }

    /// For nf_tables.
    pub(crate) fn netfilter() -> Result<Self, NetlinkError> {
        Self::open(Some(netlink::NETFILTER), "opening a nfnetlink socket")
    }

    fn open(protocol: Option<Protocol>, what: &str) -> Result<Self, NetlinkError> {
        let open = || {
            let fd = rustix::net::socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                protocol,
            )?;
            rustix::net::connect(&fd, &SocketAddrNetlink::new(0, 0))?;
            Ok(fd)
        };
        Ok(Self { fd: open().map_err(|errno| NetlinkError { what: what.to_owned(), errno })? })
    }

    /// Sends the batch and returns the first error that was not tolerated.
    pub(crate) fn execute(&self, batch: &Batch) -> Result<(), NetlinkError> {
        if batch.is_empty() {
            return Ok(());
        }
        let failure = |index: usize, errno| NetlinkError {
            what: batch.entries.get(index).map_or("netlink", |entry| &*entry.what).to_owned(),
            errno,
        };
        rustix::net::send(&self.fd, &batch.bytes, SendFlags::empty()).map_err(|errno| failure(0, errno))?;
        let mut first: Option<(usize, Errno)> = None;
        let mut waiting = batch.entries.iter().filter(|entry| entry.acknowledged).count();
        self.receive_available(|message| {
            let Some((index, errno)) = message.acknowledgement() else { return };
            let Some(entry) = batch.entries.get(index) else { return };
            waiting -= usize::from(entry.acknowledged && waiting > 0);
            if let Some(errno) = errno
                && !entry.tolerated.contains(&errno)
                && first.is_none_or(|(earlier, _)| index < earlier)
            {
                first = Some((index, errno));
            }
        })
        .map_err(|errno| failure(0, errno))?;
        match first {
            Some((index, errno)) => Err(failure(index, errno)),
            None if waiting > 0 => Err(failure(0, Errno::NOBUFS)),
            None => Ok(()),
        }
    }

    /// Sends one listing (a batch of one message with F_DUMP) and gives each item's type and payload to `item`.
    pub(crate) fn list(&self, batch: &Batch, mut item: impl FnMut(u16, &[u8])) -> Result<(), NetlinkError> {
        let failure = |errno| NetlinkError {
            what: batch.entries.first().map_or("netlink", |entry| &*entry.what).to_owned(),
            errno,
        };
        // Listings that a change interrupts repeat items at worst; whoever lists tolerates that.
        for _ in 0..8 {
            match self.list_once(batch, &mut item) {
                Err(Errno::AGAIN) => continue,
                other => return other.map_err(failure),
            }
        }
        Err(failure(Errno::AGAIN))
    }

    fn list_once(&self, batch: &Batch, item: &mut impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        rustix::net::send(&self.fd, &batch.bytes, SendFlags::empty())?;
        let mut interrupted = false;
        loop {
            let mut end = None;
            self.receive(RecvFlags::empty(), |message| {
                interrupted |= message.flags & F_DUMP_INTERRUPTED != 0;
                match message.kind {
                    DONE => end = Some(message.errno()),
                    ERROR => end = Some(message.errno().or(Some(Errno::PROTO))),
                    kind => item(kind, message.payload),
                }
            })?;
            match end {
                None => {}
                Some(Some(errno)) => return Err(errno),
                Some(None) if interrupted => return Err(Errno::AGAIN),
                Some(None) => return Ok(()),
            }
        }
    }

    /// Hands over all messages that are queued now.
    fn receive_available(&self, mut each: impl FnMut(Received<'_>)) -> Result<(), Errno> {
        loop {
            match self.receive(RecvFlags::DONTWAIT, &mut each) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }

    fn receive(&self, flags: RecvFlags, mut each: impl FnMut(Received<'_>)) -> Result<(), Errno> {
        let mut buffer = vec![0; RECEIVE];
        let (length, _) = rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, &mut buffer[..], flags))?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some(message) = Received::parse(&mut rest) {
            each(message);
        }
        Ok(())
    }
}

/// One received message.
struct Received<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Received<'a> {
    fn parse(rest: &mut &'a [u8]) -> Option<Self> {
        let head = rest.first_chunk::<HEADER>()?;
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let message = Self {
            kind: u16::from_ne_bytes([head[4], head[5]]),
            flags: u16::from_ne_bytes([head[6], head[7]]),
            sequence: u32::from_ne_bytes([head[8], head[9], head[10], head[11]]),
            payload: rest.get(HEADER..length)?,
        };
        *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }

    /// The error number at the start of an ERROR or DONE message; `None` for 0.
    fn errno(&self) -> Option<Errno> {
        let code = i32::from_ne_bytes(*self.payload.first_chunk::<4>()?);
        (code != 0).then(|| Errno::from_raw_os_error(-code))
    }

    /// For an ERROR message: the index in the batch of the message it answers, and its error.
    fn acknowledgement(&self) -> Option<(usize, Option<Errno>)> {
        (self.kind == ERROR).then(|| ((self.sequence as usize).wrapping_sub(1), self.errno()))
    }
}

impl From<NetlinkError> for io::Error {
    fn from(error: NetlinkError) -> Self {
        io::Error::new(io::Error::from(error.errno).kind(), error.to_string())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
