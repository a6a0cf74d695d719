//! Feed the kernel's random number generator.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most bytes that are taken at once.
pub const MAX_ENTROPY: usize = 512;

const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` (linux/random.h) with room for [`MAX_ENTROPY`].
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buffer_size: libc::c_int,
    buffer: [u8; MAX_ENTROPY],
}

/// Gives `bytes` to the generator, counted as full entropy, and seeds it anew at once, so that no number from before
/// tells of one from after. `device` is /dev/urandom or /dev/random. Needs CAP_SYS_ADMIN.
pub fn reseed(device: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() || bytes.len() > MAX_ENTROPY {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut info = PoolInfo {
        entropy_count: (bytes.len() * 8) as libc::c_int,
        buffer_size: bytes.len() as libc::c_int,
        buffer: [0; MAX_ENTROPY],
    };
    info.buffer[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: RNDADDENTROPY reads two numbers and `buffer_size` bytes after them, all inside of `info`.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_generator_takes_bytes_and_refuses_none_or_too_many() {
        let device = std::fs::File::open("/dev/urandom").unwrap();
        match reseed(device.as_fd(), &[7; 32]) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => eprintln!("skipped: not root"),
            Err(error) => panic!("{error}"),
        }
        assert!(reseed(device.as_fd(), &[]).is_err());
        assert!(reseed(device.as_fd(), &[0; MAX_ENTROPY + 1]).is_err());
    }
}
