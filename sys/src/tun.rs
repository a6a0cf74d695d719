//! Tap devices (tun(4) of the kernel's documentation, networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// What the reader of a tap can take: checksums that are not there yet (TUN_F_CSUM).
pub const OFFLOAD_CHECKSUM: u32 = 1;
/// TCP segments over IPv4 of more than the MTU (TUN_F_TSO4). Needs [`OFFLOAD_CHECKSUM`].
pub const OFFLOAD_TSO4: u32 = 2;
/// The same over IPv6 (TUN_F_TSO6).
pub const OFFLOAD_TSO6: u32 = 4;
/// Also segments with explicit congestion notification (TUN_F_TSO_ECN).
pub const OFFLOAD_TSO_ECN: u32 = 8;

/// Longest name of an interface.
const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

/// Makes a tap of this name in the calling thread's network namespace: whole Ethernet frames, each with a virtio-net
/// header. It is gone with the last copy of the descriptor, which is non-blocking.
///
/// # Errors
/// No /dev/net/tun, no CAP_NET_ADMIN in the namespace, or the name is taken (EBUSY, EINVAL).
pub fn make_tap(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains(['/', '%', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this cannot name an interface"));
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: all of ifreq's fields are numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result == 0 { Ok(device.into()) } else { Err(io::Error::last_os_error()) }
}

/// Says how long the virtio-net header before each frame is, in bytes (TUNSETVNETHDRSZ).
///
/// # Errors
/// It is no tap, or the length is none.
pub fn set_header_length(tap: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives until the call returns.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Says what the reader can take (TUNSETOFFLOAD): a sum of `OFFLOAD_` constants.
///
/// # Errors
/// It is no tap, or the sum makes no sense.
pub fn set_offload(tap: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// On a thread with a network namespace of its own, which ends with it.
    fn elsewhere(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            crate::namespace::unshare(crate::namespace::Namespaces::NET).unwrap();
            test();
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_tap_is_made_in_the_threads_namespace_and_goes_with_its_descriptor() {
        elsewhere(|| {
            let exists = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("tap7:");
            let tap = make_tap("tap7").unwrap();
            assert!(exists());
            assert!(make_tap("tap7").is_err());
            set_header_length(tap.as_fd(), 12).unwrap();
            assert!(set_header_length(tap.as_fd(), 1).is_err());
            set_offload(tap.as_fd(), OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6).unwrap();
            assert!(set_offload(tap.as_fd(), 1 << 20).is_err());
            drop(tap);
            assert!(!exists());
        });
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a/b", "tap%d", "sixteen-letters-", "a\0b"] {
            assert!(make_tap(name).is_err(), "{name:?}");
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(set_header_length(null.as_fd(), 12).is_err());
        assert!(set_offload(null.as_fd(), 0).is_err());
    }
}
