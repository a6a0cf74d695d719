//! A plain stream of bytes inside a WebSocket: `SPDY/3.1+portforward.k8s.io`.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::channels::{Channels, Coding, Role};
use crate::streaming::spdy::Transport;

/// Bytes that may wait in each direction.
const BUFFER: usize = 64 << 10;
const CHUNK: usize = 32 << 10;

/// The bytes inside the messages of a WebSocket, after its handshake. Must be called inside the runtime; everything
/// ends when the returned end is dropped.
pub fn tunnel(transport: impl Transport, role: Role) -> DuplexStream {
    let coding = Coding { ends: false, numbered: false };
    let (channels, [mut incoming]) = Channels::start(transport, role, coding, [0]);
    let (inside, outside) = tokio::io::duplex(BUFFER);
    let (mut reader, mut writer) = tokio::io::split(outside);
    tokio::spawn(async move {
        let output = channels.writer(0);
        let back = async {
            let mut buffer = vec![0; CHUNK];
            while let Ok(length) = reader.read(&mut buffer).await {
                if length == 0 || output.write(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        };
        let there = async {
            while let Some(bytes) = incoming.recv().await {
                if writer.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = back => channels.close().await,
            () = there => {}
        }
    });
    inside
}
