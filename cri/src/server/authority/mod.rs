//! Lets clients in that name the socket's path as HTTP/2 `:authority`.
//!
//! grpc-go before 1.59 (crictl to 1.30) and grpc-core send `/run/hull/hull.sock` or `run%2Fhull.sock` there, which is
//! no authority (RFC 3986, 3.2); h2 answers with a stream error before anything of hull's sees the request. So each
//! connection is read through [`AuthorityShim`]: it looks at the first header block. If its authority is fine, which is
//! nearly always, the shim steps aside for good. Otherwise every header block of the connection is decoded and written
//! anew with `localhost` in place of what is no authority; all other frames pass as they are.

mod frames;
mod hpack;
mod huffman;
mod static_table;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use frames::Inbound;

/// A connection whose incoming requests have an authority that h2 accepts.
#[derive(Debug)]
pub struct AuthorityShim<S> {
    stream: S,
    inbound: Inbound,
}

impl<S> AuthorityShim<S> {
    /// Wraps a connection from which nothing has been read yet.
    pub fn new(stream: S) -> Self {
        AuthorityShim { stream, inbound: Inbound::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityShim<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            this.inbound.advance()?;
            if !this.inbound.ready.is_empty() {
                let length = this.inbound.ready.len().min(buf.remaining());
                buf.put_slice(&this.inbound.ready[..length]);
                this.inbound.ready.advance(length);
                return Poll::Ready(Ok(()));
            }
            if this.inbound.passes_through() {
                return Pin::new(&mut this.stream).poll_read(cx, buf);
            }
            let mut chunk = [0u8; 4096];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut chunk))?;
            match chunk.filled() {
                [] if this.inbound.end() => return Poll::Ready(Ok(())),
                filled => this.inbound.pending.extend_from_slice(filled),
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityShim<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: Connected> Connected for AuthorityShim<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}
