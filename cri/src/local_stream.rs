//! Unix streams that wake the runtime only for what comes in.
//!
//! A `tokio::net::UnixStream` is watched for room to write as well, so each time the peer reads what was sent a thread
//! wakes to learn that there is room, which there nearly always was. The kernel takes that wake-up for a handing-over and
//! places the thread where the peer runs; while an agent works there, the next request waited behind it (0.4 ms of a
//! start). Here room is watched for only while it is missing.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tonic::transport::server::{Connected, UdsConnectInfo};

/// Pause before the next try where a socket cannot be watched for room.
const UNWATCHED: Duration = Duration::from_millis(20);

/// A connected, non-blocking unix stream.
#[derive(Debug)]
pub(crate) struct LocalStream {
    socket: AsyncFd<UnixStream>,
    /// The same socket, while [`AsyncWrite`] waits for room.
    full: Option<AsyncFd<UnixStream>>,
    peer: UdsConnectInfo,
}

impl LocalStream {
    /// Takes over a connected socket. Must be called inside the runtime.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let peer = UdsConnectInfo { peer_addr: None, peer_cred: None };
        Ok(Self { socket: watch(socket, Interest::READABLE)?, full: None, peer })
    }

    /// Takes over a socket that was accepted, and remembers who is at its other end.
    pub(crate) fn accepted(socket: tokio::net::UnixStream) -> io::Result<Self> {
        let peer = socket.connect_info();
        Ok(Self { peer, ..Self::new(socket.into_std()?)? })
    }

    /// Calls `receive` as soon as something may have come, until it does not answer with `WouldBlock`.
    pub(crate) async fn receive_with<T>(&self, mut receive: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.socket.async_io(Interest::READABLE, |_| receive()).await
    }

    /// Calls `send` as soon as there may be room, until it does not answer with `WouldBlock`.
    pub(crate) async fn send_with<T>(&self, mut send: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match send() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            match self.watched_for_room() {
                Ok(full) => return full.async_io(Interest::WRITABLE, |_| send()).await,
                // For want of a descriptor, mostly: no reason to give the connection up.
                Err(_) => tokio::time::sleep(UNWATCHED).await,
            }
        }
    }

    /// A second descriptor for the socket: one can be watched once.
    fn watched_for_room(&self) -> io::Result<AsyncFd<UnixStream>> {
        watch(self.socket.get_ref().try_clone()?, Interest::WRITABLE)
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        mut send: impl FnMut(&UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if self.full.is_none() {
            match send(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.full = Some(self.watched_for_room()?);
                }
                done => return Poll::Ready(done),
            }
        }
        let sent = loop {
            let Some(full) = &self.full else { return Poll::Ready(send(self.socket.get_ref())) };
            let mut room = ready!(full.poll_write_ready(cx))?;
            if let Ok(sent) = room.try_io(|socket| send(socket.get_ref())) {
                break sent;
            }
        };
        self.full = None;
        Poll::Ready(sent)
    }
}

#[expect(
    deprecated,
    reason = "what replaces it is unsafe for other types, and the same for a stream of std's"
)]
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

impl AsFd for LocalStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

impl AsyncRead for LocalStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut readable = ready!(self.socket.poll_read_ready(cx))?;
            let unfilled = buf.initialize_unfilled();
            match self.socket.get_ref().read(unfilled) {
                Ok(count) => {
                    // The kernel tells of what comes later: no need to ask once more to learn that nothing has.
                    if 0 < count && count < unfilled.len() {
                        readable.clear_ready();
                    }
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, |mut socket| socket.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, |mut socket| socket.write_vectored(pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.get_ref().shutdown(Shutdown::Write))
    }
}

impl Connected for LocalStream {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (LocalStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (LocalStream::new(ours).unwrap(), theirs)
    }

    #[tokio::test]
    async fn far_more_than_fits_arrives_whole_while_the_peer_is_slow() {
        let (mut ours, theirs) = pair();
        let bytes: Vec<u8> = (0..4_000_000_u32).map(|index| (index % 251) as u8).collect();
        let expected = bytes.clone();
        let reading = std::thread::spawn(move || {
            let mut theirs = theirs;
            let (mut all, mut piece) = (Vec::new(), [0; 70_000]);
            loop {
                std::thread::sleep(Duration::from_millis(1));
                match theirs.read(&mut piece).unwrap() {
                    0 => return all,
                    count => all.extend_from_slice(&piece[..count]),
                }
            }
        });
        let sending = async {
            ours.write_all(&bytes).await.unwrap();
            assert!(ours.full.is_none(), "room is watched for only while it is missing");
            ours.shutdown().await.unwrap();
        };
        timeout(PATIENCE, sending).await.unwrap();
        let received = tokio::task::spawn_blocking(move || reading.join().unwrap()).await.unwrap();
        assert_eq!(received.len(), expected.len());
        assert!(received == expected);
    }

    #[tokio::test]
    async fn what_comes_in_pieces_is_read_and_the_end_is_seen() {
        let (mut ours, mut theirs) = pair();
        let writing = std::thread::spawn(move || {
            for _ in 0..20 {
                theirs.write_all(b"piece").unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut all = Vec::new();
        timeout(PATIENCE, ours.read_to_end(&mut all)).await.unwrap().unwrap();
        writing.join().unwrap();
        assert_eq!(all, b"piece".repeat(20));
    }

    #[tokio::test]
    async fn a_write_to_a_full_socket_goes_on_when_there_is_room_and_fails_when_there_is_no_peer() {
        let (ours, mut theirs) = pair();
        let fill = || rustix::io::write(&ours, &[7; 4096]).map_err(io::Error::from);
        while fill().is_ok() {}
        let waits = timeout(Duration::from_millis(50), ours.send_with(fill)).await;
        assert!(waits.is_err(), "there is no room");
        // The kernel speaks of room when most of what was sent has been taken.
        theirs.set_nonblocking(true).unwrap();
        let mut some = [0; 4096];
        let (sent, ()) =
            tokio::join!(ours.send_with(fill), async { while theirs.read(&mut some).is_ok() {} });
        assert_eq!(sent.unwrap(), 4096);
        while fill().is_ok() {}
        let (sent, ()) = tokio::join!(ours.send_with(fill), async { drop(theirs) });
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
