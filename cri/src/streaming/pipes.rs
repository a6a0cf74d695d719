//! Pipes between hulld and a process: hulld's ends never block, the others are ordinary ones.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use rustix::pipe::PipeFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::command::Output;

/// What one read takes.
const CHUNK: usize = 32 << 10;
/// How long output is waited for after the process has ended: something that it left behind may hold the pipe open.
const AFTERMATH: Duration = Duration::from_secs(1);

/// hulld reads, the process writes.
pub fn output() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((pipe::Receiver::from_owned_fd(ours)?, theirs))
}

/// hulld writes, the process reads.
pub fn input() -> io::Result<(pipe::Sender, OwnedFd)> {
    let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((pipe::Sender::from_owned_fd(ours)?, theirs))
}

/// Passes on what the client types, to its end, and returns the pipe: dropped, the process sees the end too. A process that
/// reads no more ends it as well.
pub async fn feed(mut from: mpsc::Receiver<Bytes>, mut to: pipe::Sender) -> pipe::Sender {
    while let Some(bytes) = from.recv().await {
        if to.write_all(&bytes).await.is_err() {
            break;
        }
    }
    to
}

/// Passes on what the process writes until nobody can write any more, or, once `over`, until nothing comes for a
/// while. A client that takes no more closes the pipe, so that the process notices.
pub async fn show(mut from: pipe::Receiver, to: &Output, over: &CancellationToken) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let quiet = async {
            over.cancelled().await;
            tokio::time::sleep(AFTERMATH).await;
        };
        let length = tokio::select! {
            biased;
            read = from.read(&mut buffer) => read.unwrap_or(0),
            () = quiet => 0,
        };
        if length == 0 || to.write(&buffer[..length]).await.is_err() {
            break;
        }
    }
    drop(from);
    // The client may have gone.
    let _ = to.finish().await;
}
