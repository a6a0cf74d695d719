//! User namespaces: what one maps, and the program that makes one with a pod's other namespaces inside it.
//!
//! A process with threads, as hulld is, cannot enter a user namespace (setns(2)). So hulld starts this program once more
//! (`hull-agent user-namespace UIDS GIDS`, each mapping as `CONTAINER:HOST:LENGTH`), with a socket as its standard
//! input, takes the namespaces as descriptors from that, and is done with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::descriptor::{recv_with_fds, send_with_fds};
use hull_sys::namespace::{self, Namespaces};
use hull_sys::process::{self, Clone3, Cloned};
use hull_sys::{privilege, signal};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::protocol::messages;

/// First word of the program's arguments when it is to make namespaces.
pub const COMMAND: &str = "user-namespace";
/// Bytes of an answer: a mark and, after a failure, the reason.
const MAX_ANSWER: usize = 512;
/// The marks of an answer.
const MADE: u8 = b'+';
const FAILED: u8 = b'-';

/// A range of ids and what they are outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    container: u32,
    host: u32,
    length: u32,
}

impl IdMap {
    /// `None` if a range is empty or does not end before the id that is none (4294967295).
    pub fn new(container: u32, host: u32, length: u32) -> Option<Self> {
        let fits = |first: u32| first.checked_add(length).is_some();
        (length > 0 && fits(container) && fits(host)).then_some(Self { container, host, length })
    }

    pub(crate) fn from_message(message: Option<&messages::IdMapping>) -> Option<Self> {
        let message = message?;
        Self::new(message.container_id, message.host_id, message.length)
    }

    /// What an id of the container's is outside; `None`: nothing.
    pub fn outside(&self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.container).filter(|offset| *offset < self.length)?;
        self.host.checked_add(offset)
    }

    /// As the agent's protocol has it.
    pub const fn message(&self) -> messages::IdMapping {
        messages::IdMapping { container_id: self.container, host_id: self.host, length: self.length }
    }

    /// As an argument of the program.
    pub fn argument(&self) -> String {
        format!("{}:{}:{}", self.container, self.host, self.length)
    }

    fn parse(argument: &str) -> Option<Self> {
        let numbers: Vec<u32> = argument.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [container, host, length] = numbers[..] else { return None };
        Self::new(container, host, length)
    }

    /// As the files of user_namespaces(7) want it.
    fn line(&self) -> String {
        format!("{} {} {}\n", self.container, self.host, self.length)
    }
}

/// The user namespace that a pod's containers live in. The agent itself does not.
#[derive(Debug)]
pub struct UserNamespace {
    namespace: OwnedFd,
    /// User ids.
    pub uids: IdMap,
    /// Group ids.
    pub gids: IdMap,
}

impl PartialEq for UserNamespace {
    fn eq(&self, other: &Self) -> bool {
        (self.uids, self.gids) == (other.uids, other.gids)
    }
}

impl Eq for UserNamespace {}

impl UserNamespace {
    pub(crate) const fn new(namespace: OwnedFd, uids: IdMap, gids: IdMap) -> Self {
        Self { namespace, uids, gids }
    }

    /// What the container's root is outside: user and group. `None` if either is nothing.
    pub fn root(&self) -> Option<(u32, u32)> {
        Some((self.uids.outside(0)?, self.gids.outside(0)?))
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// New namespaces of a pod; the first owns the others.
#[derive(Debug)]
pub struct PodNamespaces {
    /// User ids and capabilities.
    pub user: OwnedFd,
    /// A network with nothing but a loopback interface that is down.
    pub network: OwnedFd,
    /// System V and POSIX IPC.
    pub ipc: OwnedFd,
    /// Host name.
    pub uts: OwnedFd,
}

impl PodNamespaces {
    const KINDS: [&str; 4] = ["user", "net", "ipc", "uts"];

    /// Makes them. The caller must have one thread, and be allowed to map these ids.
    pub fn make(uids: IdMap, gids: IdMap) -> io::Result<Self> {
        let (mapped, map) = pipe_with(PipeFlags::CLOEXEC)?;
        let (made, make) = pipe_with(PipeFlags::CLOEXEC)?;
        match process::clone3(&Clone3 { namespaces: Namespaces::USER, ..Clone3::default() })? {
            Cloned::Child => {
                drop((map, made));
                let done = Self::inside(&mapped, &make);
                process::exit_now(i32::from(done.is_err()))
            }
            Cloned::Parent { pid, pidfd } => {
                drop((mapped, make));
                let taken = Self::take(pid, uids, gids, &map, &made);
                drop(map);
                process::wait(pidfd.as_fd())?;
                Self::from_fds(taken?)
            }
        }
    }

    /// The process inside: becomes its root, so that what the namespaces contain is that root's; makes them; waits until
    /// they were taken.
    fn inside(mapped: &OwnedFd, make: &OwnedFd) -> io::Result<()> {
        let mut byte = [0];
        if rustix::io::read(mapped, &mut byte)? == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        privilege::become_user(0, 0, &[])?;
        let made = namespace::unshare(Namespaces::NET | Namespaces::IPC | Namespaces::UTS);
        let errno = made.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0);
        rustix::io::write(make, &errno.to_ne_bytes())?;
        made?;
        rustix::io::read(mapped, &mut byte)?;
        Ok(())
    }

    fn take(pid: i32, uids: IdMap, gids: IdMap, map: &OwnedFd, made: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let process = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())?;
        for (file, ids) in [("uid_map", uids), ("gid_map", gids)] {
            let file = rustix::fs::openat(&process, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::io::write(&file, ids.line().as_bytes())?;
        }
        rustix::io::write(map, &[1])?;
        let mut errno = [0; 4];
        match rustix::io::read(made, &mut errno)? {
            4 if errno == [0; 4] => {}
            4 => return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            _ => return Err(io::Error::other("the process inside it cannot become its root")),
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |kind| Ok(rustix::fs::openat(&process, format!("ns/{kind}"), flags, Mode::empty())?);
        Self::KINDS.into_iter().map(open).collect()
    }

    /// In the order of `KINDS`.
    fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Self> {
        match <[OwnedFd; 4]>::try_from(fds) {
            Ok([user, network, ipc, uts]) => Ok(Self { user, network, ipc, uts }),
            Err(fds) => Err(io::Error::other(format!("{} namespaces came, not 4", fds.len()))),
        }
    }

    /// Takes them from the socket that the program was started with. Blocks until it has answered.
    pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let (mut answer, mut fds) = ([0; MAX_ANSWER], Vec::new());
        let length = recv_with_fds(socket, &mut answer, &mut fds)?;
        match answer[..length].split_first() {
            Some((&MADE, [])) => Self::from_fds(fds),
            Some((&FAILED, reason)) => Err(io::Error::other(String::from_utf8_lossy(reason).into_owned())),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The program: makes the namespaces that the arguments after [`COMMAND`] describe, answers on standard input, ends.
pub fn main(arguments: &[String]) -> io::Result<()> {
    signal::reset_all();
    let made = match arguments {
        [uids, gids] => match (IdMap::parse(uids), IdMap::parse(gids)) {
            (Some(uids), Some(gids)) => PodNamespaces::make(uids, gids),
            _ => Err(io::Error::other("a mapping is CONTAINER:HOST:LENGTH")),
        },
        _ => Err(io::Error::other("two mappings are wanted: of users and of groups")),
    };
    let socket = rustix::stdio::stdin();
    match made {
        Ok(PodNamespaces { user, network, ipc, uts }) => {
            let all = [user.as_fd(), network.as_fd(), ipc.as_fd(), uts.as_fd()];
            send_with_fds(socket, &[MADE], &all)?;
        }
        Err(error) => {
            let mut answer = vec![FAILED];
            answer.extend(error.to_string().bytes().take(MAX_ANSWER - 1));
            send_with_fds(socket, &answer, &[])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_outside_only_if_it_is_mapped() {
        let map = IdMap::new(0, 100_000, 65_536).unwrap();
        assert_eq!(map.outside(0), Some(100_000));
        assert_eq!(map.outside(65_535), Some(165_535));
        assert_eq!(map.outside(65_536), None);
        assert_eq!(IdMap::new(10, 5, 1).unwrap().outside(9), None);
        assert_eq!(IdMap::parse(&map.argument()), Some(map));
    }

    #[test]
    fn ranges_that_no_kernel_maps_are_refused() {
        assert_eq!(IdMap::new(0, 1, 0), None);
        assert_eq!(IdMap::new(0, u32::MAX, 1), None);
        assert_eq!(IdMap::new(0, 1, u32::MAX), None);
        assert!(IdMap::new(0, 1, u32::MAX - 1).is_some());
        for text in ["", "0:1", "0:1:2:3", "a:1:2", "-1:0:1", "0:1:4294967296"] {
            assert_eq!(IdMap::parse(text), None, "{text:?}");
        }
    }
}
