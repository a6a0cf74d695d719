//! The start of an HTTP/2 connection: frames and HPACK blocks, rewritten where the authority is none.
#![no_main]

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use hull_cri::server::authority::AuthorityShim;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, ReadBuf};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Gives the bytes in pieces of one length.
struct Pieces<'d> {
    bytes: &'d [u8],
    length: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.length.min(self.bytes.len()).min(into.remaining());
        let (piece, rest) = self.bytes.split_at(length);
        into.put_slice(piece);
        self.bytes = rest;
        Poll::Ready(Ok(()))
    }
}

fn through(bytes: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut shim = pin!(AuthorityShim::new(Pieces { bytes, length }));
    let mut context = Context::from_waker(Waker::noop());
    let mut result = Vec::new();
    loop {
        let mut buffer = [0; 1024];
        let mut buffer = ReadBuf::new(&mut buffer);
        match shim.as_mut().poll_read(&mut context, &mut buffer) {
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => return Some(result),
            Poll::Ready(Ok(())) => result.extend_from_slice(buffer.filled()),
            Poll::Ready(Err(_)) => return None,
            Poll::Pending => panic!("bytes are there"),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    let stream = [PREFACE, bytes].concat();
    let whole = through(&stream, stream.len());
    let in_pieces = through(&stream, usize::from(*first) % 64 + 1);
    assert_eq!(whole, in_pieces, "how the bytes arrive makes no difference");
});
