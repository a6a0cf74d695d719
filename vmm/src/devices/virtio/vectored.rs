//! The buffers of a chain, and system calls straight into and out of guest memory, without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, VolatileSlice};

use super::{Chain, GuestMemory};

/// Most pieces that one system call may take (UIO_MAXIOV), less one for a head that is not in guest memory.
pub(crate) const MOST_PIECES: usize = 1023;

/// Which way the buffers of a chain go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The device reads them.
    FromDriver,
    /// The device writes them.
    ToDriver,
}

/// A chain that no driver should have made.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum ChainFault {
    #[error("a buffer goes the wrong way")]
    Direction,
    #[error("it has too many buffers")]
    TooMany,
    #[error("a buffer lies outside guest memory")]
    OutOfRange,
}

/// Appends the pieces of guest memory that the chain's buffers are, in order; at most `most` pieces. Returns how many
/// bytes they are together. What was appended before a fault is taken back.
pub(crate) fn collect<'m>(
    memory: &'m GuestMemory,
    chain: Chain,
    direction: Direction,
    most: usize,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<usize, ChainFault> {
    let before = pieces.len();
    let result = collect_some(memory, chain, direction, before + most, pieces);
    if result.is_err() {
        pieces.truncate(before);
    }
    result
}

fn collect_some<'m>(
    memory: &'m GuestMemory,
    chain: Chain,
    direction: Direction,
    most: usize,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<usize, ChainFault> {
    let mut total = 0;
    // An indirect table may have 65,535 entries, also of no length: they count.
    for (number, descriptor) in chain.enumerate() {
        check(&descriptor, direction)?;
        if number >= most {
            return Err(ChainFault::TooMany);
        }
        let length = descriptor.len() as usize;
        for piece in memory.get_slices(descriptor.addr(), length) {
            if pieces.len() >= most {
                return Err(ChainFault::TooMany);
            }
            pieces.push(piece.map_err(|_| ChainFault::OutOfRange)?);
        }
        // The chain yields at most 2^32 bytes together.
        total += length;
    }
    Ok(total)
}

fn check(descriptor: &Descriptor, direction: Direction) -> Result<(), ChainFault> {
    let is_right = descriptor.is_write_only() == (direction == Direction::ToDriver);
    if is_right { Ok(()) } else { Err(ChainFault::Direction) }
}

/// Takes `count` bytes off the beginning; what is shorter becomes empty.
pub(crate) fn skip(pieces: &mut Vec<VolatileSlice<'_>>, mut count: usize) {
    let mut whole = 0;
    for piece in pieces.iter_mut() {
        if count < piece.len() {
            if let Ok(rest) = piece.offset(count) {
                *piece = rest;
            }
            break;
        }
        count -= piece.len();
        whole += 1;
    }
    pieces.drain(..whole);
}

/// Keeps only the first `count` bytes.
pub(crate) fn limit(pieces: &mut Vec<VolatileSlice<'_>>, mut count: usize) {
    let mut kept = 0;
    for piece in pieces.iter_mut() {
        if count == 0 {
            break;
        }
        if count < piece.len() {
            if let Ok(first) = piece.subslice(0, count) {
                *piece = first;
            }
            kept += 1;
            break;
        }
        count -= piece.len();
        kept += 1;
    }
    pieces.truncate(kept);
}

/// Copies from the beginning into `bytes`; returns how many there were.
pub(crate) fn copy_out(pieces: &[VolatileSlice<'_>], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
        done += piece.copy_to(rest);
    }
    done
}

/// Copies `bytes` to the beginning; returns how many there was room for.
pub(crate) fn copy_in(pieces: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut rest = bytes;
    for piece in pieces {
        if rest.is_empty() {
            break;
        }
        let count = rest.len().min(piece.len());
        let (now, later) = rest.split_at(count);
        piece.copy_from(now);
        rest = later;
    }
    bytes.len() - rest.len()
}

/// readv(2) into guest memory and then, if there is more, into `tail`.
#[allow(unsafe_code)]
pub(crate) fn read(from: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], tail: &mut [u8]) -> io::Result<usize> {
    let mut vectors = vectors(&[], pieces);
    if !tail.is_empty() {
        vectors.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
    }
    // SAFETY: each vector is `tail`, which is borrowed for the call, or a piece of mapped memory that `pieces` keeps
    // mapped, and that the guest shares anyway: no reference to it exists. There are at most UIO_MAXIOV, so the count
    // fits.
    let count = unsafe { libc::readv(from.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
    outcome(count)
}

/// writev(2) of `head` and then of guest memory.
#[allow(unsafe_code)]
pub(crate) fn write(to: BorrowedFd<'_>, head: &[u8], pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let vectors = vectors(head, pieces);
    // SAFETY: as in `read`; writev only reads.
    let count = unsafe { libc::writev(to.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
    outcome(count)
}

/// sendmsg(2) of guest memory on a stream socket, without waiting and without a SIGPIPE.
#[allow(unsafe_code)]
pub(crate) fn send(to: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = vectors(&[], pieces);
    // SAFETY: all of msghdr's fields are numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    // SAFETY: `message` names nothing but `vectors`, which live until the call returns and of which see `read`.
    let count =
        unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    outcome(count)
}

fn vectors(head: &[u8], pieces: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    let mut vectors = Vec::with_capacity(pieces.len() + 1);
    if !head.is_empty() {
        vectors.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
    }
    // The guards of mapped memory do nothing: only Xen's need to live.
    vectors.extend(
        pieces.iter().take(MOST_PIECES).map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        }),
    );
    vectors
}

fn outcome(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemory {
        // Two regions that touch: a buffer may lie across.
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    fn across(memory: &GuestMemory) -> Vec<VolatileSlice<'_>> {
        memory.get_slices(GuestAddress(0xff0), 32).map(Result::unwrap).collect()
    }

    #[test]
    fn bytes_go_in_and_out_across_pieces() {
        let memory = memory();
        let pieces = across(&memory);
        assert_eq!(pieces.len(), 2);
        let bytes: Vec<u8> = (0..40).collect();
        assert_eq!(copy_in(&pieces, &bytes), 32);
        let mut back = [0; 40];
        assert_eq!(copy_out(&pieces, &mut back), 32);
        assert_eq!(back[..32], bytes[..32]);
        assert_eq!(copy_out(&pieces, &mut back[..20]), 20);
    }

    #[test]
    fn pieces_are_cut_at_both_ends() {
        let memory = memory();
        for (skipped, kept) in [(0, 32), (5, 20), (16, 16), (20, 3), (16, 0), (31, 1), (32, 0)] {
            let mut pieces = across(&memory);
            skip(&mut pieces, skipped);
            limit(&mut pieces, kept);
            assert_eq!(pieces.iter().map(VolatileSlice::len).sum::<usize>(), kept, "{skipped} {kept}");
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
        let mut pieces = across(&memory);
        skip(&mut pieces, 100);
        assert!(pieces.is_empty());
    }

    #[test]
    fn sockets_read_and_write_guest_memory() {
        let memory = memory();
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(b"straight into guest memory").unwrap();
        let pieces = across(&memory);
        assert_eq!(read(right.as_fd(), &pieces, &mut []).unwrap(), 26);
        let mut text = [0; 26];
        memory.read_slice(&mut text, GuestAddress(0xff0)).unwrap();
        assert_eq!(&text, b"straight into guest memory");

        assert_eq!(write(right.as_fd(), b"head ", &pieces).unwrap(), 37);
        assert_eq!(send(right.as_fd(), &pieces).unwrap(), 32);
        drop(left);
        assert_eq!(send(right.as_fd(), &pieces).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
