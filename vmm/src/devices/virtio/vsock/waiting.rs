//! What the guest has sent and the host has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::net::{SendAncillaryBuffer, SendFlags};
use vm_memory::VolatileSlice;

/// Copied at once between guest memory and the queue.
const STEP: usize = 4 << 10;

/// A queue of bytes that holds no memory while it is empty. Its bound is the stream's credit.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    bytes: VecDeque<u8>,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Appends what is in these pieces; `bound` is the most that may ever be in the queue.
    pub(super) fn push(&mut self, pieces: &[VolatileSlice<'_>], bound: usize) {
        let length: usize = pieces.iter().map(VolatileSlice::len).sum();
        let needed = self.bytes.len() + length;
        if needed > self.bytes.capacity() {
            // Doubling, but not beyond what credit allows.
            let capacity = needed.max((self.bytes.capacity() * 2).min(bound));
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        let mut step = [0; STEP];
        for piece in pieces {
            let mut at = 0;
            while let Ok(rest) = piece.offset(at)
                && !rest.is_empty()
            {
                let count = rest.copy_to(&mut step[..]);
                self.bytes.extend(&step[..count.min(STEP)]);
                at += count;
            }
        }
    }

    /// Writes as much as the socket takes; returns how much that was.
    pub(super) fn write_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (first, second) = self.bytes.as_slices();
        let sent = rustix::net::sendmsg(
            socket,
            &[IoSlice::new(first), IoSlice::new(second)],
            &mut SendAncillaryBuffer::default(),
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        self.bytes.drain(..sent.min(self.bytes.len()));
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
        Ok(sent)
    }

    /// Drops everything; returns how much that was.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(&mut self.bytes).len()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_leave_in_order_and_the_memory_with_the_last() {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut memory: Vec<u8> = (0..30_000_u32).map(|n| n as u8).collect();
        let pieces = [VolatileSlice::from(&mut memory[..])];
        let mut waiting = Waiting::default();
        let (mut sent, mut seen) = (0, Vec::new());
        for _ in 0..20 {
            waiting.push(&pieces, 1 << 20);
        }
        while !waiting.is_empty() {
            match waiting.write_to(socket.as_fd()) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    let mut some = vec![0; 100_000];
                    let count = peer.read(&mut some).unwrap();
                    seen.extend_from_slice(&some[..count]);
                }
            }
        }
        assert_eq!((sent, waiting.bytes.capacity()), (600_000, 0));
        drop(socket);
        peer.read_to_end(&mut seen).unwrap();
        assert!(seen.chunks(30_000).all(|chunk| chunk == &memory[..]));
    }

    #[test]
    fn the_memory_never_exceeds_the_bound() {
        let mut memory = [7; 100];
        let pieces = [VolatileSlice::from(&mut memory[..])];
        let mut waiting = Waiting::default();
        for _ in 0..40 {
            waiting.push(&pieces, 4096);
        }
        assert!(waiting.bytes.capacity() <= 4096, "{}", waiting.bytes.capacity());
        assert_eq!((waiting.clear(), waiting.bytes.capacity()), (4000, 0));
    }
}
