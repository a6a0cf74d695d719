//! vsock addresses, which rustix does not know.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The host, as a guest addresses it (VMADDR_CID_HOST).
pub const HOST: u32 = 2;

/// Connections that may wait to be accepted.
const BACKLOG: libc::c_int = 64;

/// A non-blocking, close-on-exec stream socket.
fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Listens on `port` of every address of this machine. The socket does not block.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a sockaddr_vm of the length given and lives across the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: listen(2) takes two numbers.
    if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Begins to connect to `port` of `cid`. The socket does not block; it becomes writable when it is connected or has
/// failed, which a write tells.
pub fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: `address` is a sockaddr_vm of the length given and lives across the call.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) } != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(socket)
}
