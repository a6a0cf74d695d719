use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Most descriptors in one message (SCM_MAX_FD of the kernel).
pub const MAX_DESCRIPTORS: usize = 253;

const SPACE: usize = rustix::cmsg_space!(ScmRights(253));

/// Sends bytes with descriptors on a connected unix socket and returns how many bytes were taken.
///
/// If at least one byte was taken all descriptors were; what remains of `bytes` is sent without them. At most
/// [`MAX_DESCRIPTORS`]; descriptors need at least one byte to ride on. `WouldBlock` passes through on a non-blocking
/// socket, SIGPIPE is never raised.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_DESCRIPTORS || (bytes.is_empty() && !fds.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if fds.is_empty() {
        return Ok(rustix::io::retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL))?);
    }
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(sent)
}

/// Receives bytes into `bytes` and appends the descriptors that came with them to `fds`, close-on-exec; returns the
/// number of bytes, 0 at the end of the stream.
///
/// `WouldBlock` passes through. If the kernel had to drop descriptors (this process's table is full) that is an error,
/// and those that came are closed.
pub fn recv_with_fds(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let already = fds.len();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        fds.truncate(already);
        return Err(io::Error::other("descriptors were lost on the way: this process has too many open"));
    }
    Ok(message.bytes)
}

/// Another descriptor of the same open file, close-on-exec, for types that can only tell their number.
pub fn duplicate(of: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: a number that is no descriptor is an error and nothing worse; no memory is passed.
    let fd = unsafe { libc::fcntl(of.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_arrive_usable_and_close_on_exec() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/proc/self/comm").unwrap();
        let many = vec![file.as_fd(); MAX_DESCRIPTORS];
        assert_eq!(send_with_fds(left.as_fd(), b"hello", &many).unwrap(), 5);
        let (mut bytes, mut fds) = ([0; 16], Vec::new());
        assert_eq!(recv_with_fds(right.as_fd(), &mut bytes, &mut fds).unwrap(), 5);
        assert_eq!(fds.len(), MAX_DESCRIPTORS);
        let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let mut text = String::new();
        std::fs::File::from(fds.remove(0)).read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
    }

    #[test]
    fn too_many_descriptors_or_none_to_ride_on_are_refused() {
        let (left, _right) = UnixStream::pair().unwrap();
        let many = vec![left.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(send_with_fds(left.as_fd(), b"x", &many).is_err());
        assert!(send_with_fds(left.as_fd(), b"", &many[..1]).is_err());
    }

    #[test]
    fn an_empty_non_blocking_socket_would_block_and_a_closed_one_ends() {
        let (left, right) = UnixStream::pair().unwrap();
        right.set_nonblocking(true).unwrap();
        let (mut bytes, mut fds) = ([0; 16], Vec::new());
        let error = recv_with_fds(right.as_fd(), &mut bytes, &mut fds).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(left);
        assert_eq!(recv_with_fds(right.as_fd(), &mut bytes, &mut fds).unwrap(), 0);
    }
}
