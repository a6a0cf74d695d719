//! Channels: the first byte of each message says which stream it belongs to (v4 and v5.channel.k8s.io).

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::frame::{Message, MessageReader, Opcode, broken, encode};
use crate::streaming::spdy::Transport;

/// Pieces of one channel that may wait for their reader.
const QUEUE: usize = 4;
/// Most bytes of a message that is sent.
const CHUNK: usize = 32 << 10;
/// The channel on which v5 tells of the end of another one.
const END: u8 = 255;
/// How long the peer may take to close after hull has.
const FAREWELL: Duration = Duration::from_secs(2);
/// An ordinary end (RFC 6455, 7.4.1).
const NORMAL: u16 = 1000;
const PROTOCOL_ERROR: u16 = 1002;

/// Which side of the connection this is: a client masks what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// hulld.
    Server,
    /// The hull command.
    Client,
}

/// How messages are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coding {
    /// v5: the end of a single channel can be told.
    pub ends: bool,
    /// The first byte names the channel. Otherwise everything belongs to channel 0, as in a tunnel.
    pub numbered: bool,
}

type BoxTransport = Pin<Box<dyn Transport>>;

struct Shared {
    writer: Mutex<WriteHalf<BoxTransport>>,
    role: Role,
    coding: Coding,
    gone: CancellationToken,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("role", &self.role).finish_non_exhaustive()
    }
}

/// One connection. Dropping it ends every channel.
#[derive(Debug)]
pub struct Channels {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

/// One channel towards the peer.
#[derive(Clone, Debug)]
pub struct ChannelWriter {
    number: u8,
    shared: Arc<Shared>,
}

impl Channels {
    /// Speaks over `transport`, after the handshake. Gives a receiver for each of the channels that the peer may write
    /// to. Must be called inside the runtime.
    pub fn start<const N: usize>(
        transport: impl Transport,
        role: Role,
        coding: Coding,
        incoming: [u8; N],
    ) -> (Self, [mpsc::Receiver<Bytes>; N]) {
        let transport: BoxTransport = Box::pin(transport);
        let (input, output) = tokio::io::split(transport);
        let gone = CancellationToken::new();
        let shared = Arc::new(Shared { writer: Mutex::new(output), role, coding, gone });
        let mut senders = HashMap::new();
        let receivers = incoming.map(|number| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            senders.insert(number, sender);
            receiver
        });
        let reader = Reader { input, senders, shared: Arc::clone(&shared) };
        let reader = tokio::spawn(reader.run()).abort_handle();
        (Self { shared, reader }, receivers)
    }

    /// A channel to write to.
    pub fn writer(&self, number: u8) -> ChannelWriter {
        ChannelWriter { number, shared: Arc::clone(&self.shared) }
    }

    /// Cancelled once the peer has gone.
    pub fn gone(&self) -> CancellationToken {
        self.shared.gone.clone()
    }

    /// Ends the connection, and gives the peer a moment to take what was sent.
    pub async fn close(self) {
        let farewell = async {
            self.shared.close(NORMAL).await;
            self.shared.gone.cancelled().await;
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.reader.abort();
        self.shared.gone.cancel();
    }
}

impl Shared {
    async fn send(&self, opcode: Opcode, parts: &[&[u8]]) -> io::Result<()> {
        let mask = match self.role {
            Role::Server => None,
            Role::Client => Some(rand::random::<[u8; 4]>()),
        };
        let frame = encode(opcode, mask, parts);
        let mut writer = self.writer.lock().await;
        writer.write_all(&frame).await?;
        writer.flush().await
    }

    async fn close(&self, status: u16) {
        // The peer may have gone.
        let _ = self.send(Opcode::Close, &[&status.to_be_bytes()]).await;
    }
}

impl ChannelWriter {
    /// Sends all of `bytes`; waits while the peer does not take them. Nothing is a message too.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if self.shared.gone.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let number: &[u8] = if self.shared.coding.numbered { &[self.number] } else { &[] };
        if bytes.is_empty() {
            return self.shared.send(Opcode::Binary, &[number]).await;
        }
        for chunk in bytes.chunks(CHUNK) {
            self.shared.send(Opcode::Binary, &[number, chunk]).await?;
        }
        Ok(())
    }

    /// Nothing more will come: a client can say so since v5.
    pub async fn finish(&self) -> io::Result<()> {
        match self.shared.coding.ends && self.shared.role == Role::Client {
            true => self.shared.send(Opcode::Binary, &[&[END, self.number]]).await,
            false => Ok(()),
        }
    }
}

struct Reader {
    input: ReadHalf<BoxTransport>,
    senders: HashMap<u8, mpsc::Sender<Bytes>>,
    shared: Arc<Shared>,
}

impl Reader {
    async fn run(mut self) {
        if let Err(error) = self.messages().await {
            tracing::debug!(%error, "a WebSocket ends");
            if error.kind() == io::ErrorKind::InvalidData {
                let _ = tokio::time::timeout(FAREWELL, self.shared.close(PROTOCOL_ERROR)).await;
            }
        }
        self.shared.gone.cancel();
    }

    async fn messages(&mut self) -> io::Result<()> {
        let mut reader = MessageReader::new(self.shared.role == Role::Server);
        while let Some(message) = reader.read(&mut self.input).await? {
            match message.opcode {
                Opcode::Ping => self.shared.send(Opcode::Pong, &[&message.bytes]).await?,
                Opcode::Pong => {}
                Opcode::Close => {
                    self.shared.close(NORMAL).await;
                    return Ok(());
                }
                _ => self.data(message).await?,
            }
        }
        Ok(())
    }

    async fn data(&mut self, message: Message) -> io::Result<()> {
        let mut bytes = Bytes::from(message.bytes);
        let number = if self.shared.coding.numbered {
            // An empty message is a sign of life.
            let Some(number) = bytes.first().copied() else { return Ok(()) };
            bytes = bytes.slice(1..);
            number
        } else {
            0
        };
        if self.shared.coding.ends && self.shared.coding.numbered && number == END {
            let ended = *bytes.first().ok_or_else(|| broken("the end of no channel"))?;
            self.senders.remove(&ended);
            return Ok(());
        }
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(sender) = self.senders.get(&number) {
            // Nobody reads it any more: dropped.
            let _ = sender.send(bytes).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V5: Coding = Coding { ends: true, numbered: true };

    fn pair() -> (Channels, mpsc::Receiver<Bytes>, Channels, [mpsc::Receiver<Bytes>; 2]) {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (server, [stdin]) = Channels::start(ours, Role::Server, V5, [0]);
        let (client, outputs) = Channels::start(theirs, Role::Client, V5, [1, 3]);
        (server, stdin, client, outputs)
    }

    #[tokio::test]
    async fn channels_carry_both_directions_and_the_client_can_end_one() {
        let (server, mut stdin, client, [mut stdout, mut error]) = pair();
        client.writer(0).write(b"typed").await.unwrap();
        client.writer(0).finish().await.unwrap();
        assert_eq!(stdin.recv().await.unwrap(), "typed");
        assert_eq!(stdin.recv().await, None);
        server.writer(1).write(b"").await.unwrap();
        server.writer(1).write(&[7; 100_000]).await.unwrap();
        server.writer(3).write(b"{}").await.unwrap();
        let mut shown = 0;
        while shown < 100_000 {
            shown += stdout.recv().await.unwrap().len();
        }
        assert_eq!(error.recv().await.unwrap(), "{}");
        server.close().await;
        assert_eq!(stdout.recv().await, None);
        client.gone().cancelled().await;
    }

    #[tokio::test]
    async fn a_peer_that_breaks_the_rules_or_goes_ends_the_channels() {
        for garbage in [&b"\xff\xff\xff\xff"[..], b"\x82\x01x", b""] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            let (server, [mut stdin]) = Channels::start(ours, Role::Server, V5, [0]);
            theirs.write_all(garbage).await.unwrap();
            theirs.shutdown().await.unwrap();
            server.gone().cancelled().await;
            assert_eq!(stdin.recv().await, None);
            assert!(server.writer(1).write(b"x").await.is_err());
        }
    }
}
