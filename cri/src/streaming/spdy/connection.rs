//! The streams of one connection.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::error::SpdyError;
use super::frame::{self, Control, HEAD, Head, Reset};
use super::headers::{HeaderReader, HeaderWriter, Headers};

/// Pieces of data of one stream that may wait for its reader, each of at most [`CHUNK`] bytes.
pub(super) const QUEUE: usize = 4;
/// Most bytes read or written at once.
const CHUNK: usize = 32 << 10;
/// Most streams of a connection that are open at a time: a port-forward has two for each connection.
const MAX_STREAMS: usize = 512;
/// How long the peer may take to close its side after hull has said all.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a connection runs over.
pub trait Transport: AsyncRead + AsyncWrite + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + 'static> Transport for T {}

type BoxTransport = Pin<Box<dyn Transport>>;

/// One connection. Dropping it ends every stream.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

struct Shared {
    writer: Mutex<Writer>,
    streams: StdMutex<HashMap<u32, Open>>,
    /// The number of the next stream that hull opens.
    opened: AtomicU32,
    gone: CancellationToken,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

struct Writer {
    io: WriteHalf<BoxTransport>,
    headers: HeaderWriter,
}

/// A stream that has not ended in both directions.
struct Open {
    /// None once the peer has ended its direction.
    incoming: Option<mpsc::Sender<Bytes>>,
    /// hull may still write.
    writable: bool,
}

/// A stream that the client opened.
#[derive(Debug)]
pub struct Stream {
    /// What the client said of it.
    pub headers: Headers,
    /// What the client sends; ends with the stream, a reset, or the connection.
    pub incoming: mpsc::Receiver<Bytes>,
    /// The other direction.
    pub writer: StreamWriter,
}

/// hull's direction of a stream.
#[derive(Clone, Debug)]
pub struct StreamWriter {
    id: u32,
    shared: Arc<Shared>,
}

/// Begins to serve a connection; the client's streams come out of the receiver. Must be called inside the runtime.
pub fn start(transport: impl Transport) -> Result<(Connection, mpsc::Receiver<Stream>), SpdyError> {
    let transport: BoxTransport = Box::pin(transport);
    let (input, output) = tokio::io::split(transport);
    let shared = Arc::new(Shared {
        writer: Mutex::new(Writer { io: output, headers: HeaderWriter::new()? }),
        streams: StdMutex::default(),
        opened: AtomicU32::new(1),
        gone: CancellationToken::new(),
    });
    let (sender, streams) = mpsc::channel(1);
    let reader = Reader {
        input,
        headers: HeaderReader::new(),
        shared: Arc::clone(&shared),
        new: sender,
        last: 0,
        leaving: false,
    };
    let reader = tokio::spawn(reader.run()).abort_handle();
    Ok((Connection { shared, reader }, streams))
}

impl Connection {
    /// Opens a stream, as a client does. With `fin` nothing will be written to it.
    pub async fn open(&self, headers: &Headers, fin: bool) -> Result<Stream, SpdyError> {
        let (sender, incoming) = mpsc::channel(QUEUE);
        // The lock is held from the choice of the number on: numbers must arrive in order.
        let mut writer = self.shared.writer.lock().await;
        let id = self.shared.opened.fetch_add(2, Ordering::Relaxed);
        self.shared.streams().insert(id, Open { incoming: Some(sender), writable: !fin });
        let block = writer.headers.write(headers)?;
        writer.io.write_all(&frame::syn_stream(id, fin, &block)).await?;
        writer.io.flush().await?;
        drop(writer);
        let writer = StreamWriter { id, shared: Arc::clone(&self.shared) };
        Ok(Stream { headers: headers.clone(), incoming, writer })
    }

    /// Cancelled once the client has gone, or has said something that cannot be understood.
    pub fn gone(&self) -> CancellationToken {
        self.shared.gone.clone()
    }

    /// Says good-bye, and gives the client a moment to take what was sent: closing a socket with unread data would
    /// take back what is still on its way.
    pub async fn close(self) {
        let farewell = async {
            let mut writer = self.shared.writer.lock().await;
            // The client may have gone first.
            let _ = writer.io.write_all(&frame::go_away(0, 0)).await;
            let _ = writer.io.shutdown().await;
            drop(writer);
            self.shared.gone.cancelled().await;
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.shared.end();
    }
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every stream in both directions. Whoever learns of the end of one finds that the client has gone.
    fn end(&self) {
        self.gone.cancel();
        self.streams().clear();
    }

    async fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.io.write_all(frame).await?;
        writer.io.flush().await
    }

    async fn reset(&self, stream: u32, reason: Reset) -> io::Result<()> {
        self.streams().remove(&stream);
        self.send(&frame::reset(stream, reason)).await
    }

    /// The peer's direction has ended.
    fn peer_finished(&self, stream: u32) {
        let mut streams = self.streams();
        if let Some(open) = streams.get_mut(&stream) {
            open.incoming = None;
            if !open.writable {
                streams.remove(&stream);
            }
        }
    }
}

impl StreamWriter {
    /// Sends all of `bytes`; waits while the client does not take them.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.check_open()?;
            let head = frame::data_head(self.id, false, chunk.len() as u32);
            let mut writer = self.shared.writer.lock().await;
            writer.io.write_all(&head).await?;
            writer.io.write_all(chunk).await?;
            writer.io.flush().await?;
        }
        Ok(())
    }

    /// Nothing more will come in this direction.
    pub async fn finish(&self) -> io::Result<()> {
        self.check_open()?;
        {
            let mut streams = self.shared.streams();
            if let Some(open) = streams.get_mut(&self.id) {
                open.writable = false;
                if open.incoming.is_none() {
                    streams.remove(&self.id);
                }
            }
        }
        self.shared.send(&frame::data_head(self.id, true, 0)).await
    }

    /// Ends both directions at once.
    pub async fn reset(&self, reason: Reset) -> io::Result<()> {
        self.shared.reset(self.id, reason).await
    }

    fn check_open(&self) -> io::Result<()> {
        match self.shared.streams().get(&self.id) {
            Some(open) if open.writable => Ok(()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

struct Reader {
    input: ReadHalf<BoxTransport>,
    headers: HeaderReader,
    shared: Arc<Shared>,
    new: mpsc::Sender<Stream>,
    /// The greatest number of a stream that the client has used.
    last: u32,
    /// The client said that it opens no more streams.
    leaving: bool,
}

impl Reader {
    async fn run(mut self) {
        if let Err(error) = self.frames().await {
            tracing::debug!(%error, "a SPDY connection ends");
            if !matches!(error, SpdyError::Io(_)) {
                // The client learns that it was not understood, if it still listens.
                let farewell = frame::go_away(self.last, 1);
                let _ = tokio::time::timeout(FAREWELL, self.shared.send(&farewell)).await;
            }
        }
        self.shared.end();
    }

    async fn frames(&mut self) -> Result<(), SpdyError> {
        loop {
            let mut head = [0; HEAD];
            match self.input.read_exact(&mut head).await {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            match Head::read(head)? {
                Head::Data { stream, fin, length } => self.data(stream, fin, length).await?,
                Head::Control { kind, flags, length } => {
                    let mut payload = vec![0; length as usize];
                    self.input.read_exact(&mut payload).await?;
                    let control = Control::read(kind, flags, &payload, &mut self.headers)?;
                    self.control(control).await?;
                }
            }
        }
    }

    /// Hands data to its stream, piece by piece. What nobody reads any more is dropped.
    async fn data(&mut self, stream: u32, fin: bool, length: u32) -> Result<(), SpdyError> {
        let sender = self.shared.streams().get(&stream).and_then(|open| open.incoming.clone());
        let ours = stream < self.shared.opened.load(Ordering::Relaxed);
        if sender.is_none() && stream > self.last && !ours {
            self.shared.reset(stream, Reset::InvalidStream).await?;
        }
        let mut left = length as usize;
        while left > 0 {
            let mut chunk = BytesMut::with_capacity(left.min(CHUNK));
            let mut limited = (&mut self.input).take(left.min(CHUNK) as u64);
            if limited.read_buf(&mut chunk).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            left -= chunk.len();
            if let Some(sender) = &sender {
                // Nobody reads it any more: dropped.
                let _ = sender.send(chunk.freeze()).await;
            }
        }
        if fin {
            self.shared.peer_finished(stream);
        }
        Ok(())
    }

    async fn control(&mut self, control: Control) -> Result<(), SpdyError> {
        match control {
            Control::SynStream { stream, fin, unidirectional, headers } => {
                self.opened(stream, fin, unidirectional, headers).await?;
            }
            Control::Ping { id } => self.shared.send(&frame::ping(id)).await?,
            Control::Reset { stream } => {
                self.shared.streams().remove(&stream);
            }
            Control::SynReply { stream, fin } | Control::Headers { stream, fin } => {
                if fin {
                    self.shared.peer_finished(stream);
                }
            }
            Control::GoAway => self.leaving = true,
            Control::Other => {}
        }
        Ok(())
    }

    async fn opened(
        &mut self,
        stream: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    ) -> Result<(), SpdyError> {
        if stream.is_multiple_of(2) || stream <= self.last {
            return Err(SpdyError::StreamNumber(stream));
        }
        self.last = stream;
        let full = self.shared.streams().len() >= MAX_STREAMS;
        if full || self.leaving || self.new.is_closed() {
            return Ok(self.shared.reset(stream, Reset::Refused).await?);
        }
        let (sender, incoming) = mpsc::channel(QUEUE);
        let open = Open { incoming: (!fin).then_some(sender), writable: !unidirectional };
        self.shared.streams().insert(stream, open);
        {
            let mut writer = self.shared.writer.lock().await;
            let block = writer.headers.write(&Headers::default())?;
            writer.io.write_all(&frame::syn_reply(stream, &block)).await?;
            writer.io.flush().await?;
        }
        let writer = StreamWriter { id: stream, shared: Arc::clone(&self.shared) };
        if self.new.send(Stream { headers, incoming, writer }).await.is_err() {
            self.shared.reset(stream, Reset::Refused).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    struct Client {
        io: DuplexStream,
        headers: HeaderWriter,
        replies: HeaderReader,
    }

    /// What a client reads.
    #[derive(Debug, PartialEq)]
    enum Seen {
        Data(u32, bool, Vec<u8>),
        Control(Control),
    }

    impl Client {
        async fn open(&mut self, stream: u32, fin: bool) {
            let block = self.headers.write(&Headers::default().with("streamType", "data")).unwrap();
            self.io.write_all(&frame::syn_stream(stream, fin, &block)).await.unwrap();
        }

        async fn data(&mut self, stream: u32, fin: bool, bytes: &[u8]) {
            self.io.write_all(&frame::data_head(stream, fin, bytes.len() as u32)).await.unwrap();
            self.io.write_all(bytes).await.unwrap();
        }

        async fn see(&mut self) -> Seen {
            let mut head = [0; HEAD];
            self.io.read_exact(&mut head).await.unwrap();
            match Head::read(head).unwrap() {
                Head::Data { stream, fin, length } => {
                    let mut bytes = vec![0; length as usize];
                    self.io.read_exact(&mut bytes).await.unwrap();
                    Seen::Data(stream, fin, bytes)
                }
                Head::Control { kind, flags, length } => {
                    let mut bytes = vec![0; length as usize];
                    self.io.read_exact(&mut bytes).await.unwrap();
                    Seen::Control(Control::read(kind, flags, &bytes, &mut self.replies).unwrap())
                }
            }
        }
    }

    fn client() -> (Client, Connection, mpsc::Receiver<Stream>) {
        let (io, server) = tokio::io::duplex(1 << 20);
        let (connection, streams) = start(server).unwrap();
        (
            Client { io, headers: HeaderWriter::new().unwrap(), replies: HeaderReader::new() },
            connection,
            streams,
        )
    }

    #[tokio::test]
    async fn a_stream_of_our_own_carries_both_directions() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (server, mut streams) = start(ours).unwrap();
        let (client, _none) = start(theirs).unwrap();
        for number in 0..3 {
            let headers = Headers::default().with("port", &number.to_string());
            let mut stream = client.open(&headers, false).await.unwrap();
            let mut served = streams.recv().await.unwrap();
            assert_eq!(served.headers.get("port"), Some(number.to_string().as_str()));
            stream.writer.write(b"there").await.unwrap();
            stream.writer.finish().await.unwrap();
            assert_eq!(served.incoming.recv().await.unwrap(), "there");
            assert_eq!(served.incoming.recv().await, None);
            served.writer.write(b"back").await.unwrap();
            served.writer.finish().await.unwrap();
            assert_eq!(stream.incoming.recv().await.unwrap(), "back");
            assert_eq!(stream.incoming.recv().await, None);
        }
        drop(server);
    }

    #[tokio::test]
    async fn a_stream_carries_both_directions_and_each_ends_by_itself() {
        let (mut client, connection, mut streams) = client();
        client.open(1, false).await;
        assert_eq!(client.see().await, Seen::Control(Control::SynReply { stream: 1, fin: false }));
        let mut stream = streams.recv().await.unwrap();
        assert_eq!(stream.headers.get("streamtype"), Some("data"));
        client.data(1, false, b"there").await;
        client.data(1, true, b"").await;
        assert_eq!(stream.incoming.recv().await.unwrap(), "there");
        assert_eq!(stream.incoming.recv().await, None);
        stream.writer.write(b"back").await.unwrap();
        stream.writer.finish().await.unwrap();
        assert_eq!(client.see().await, Seen::Data(1, false, b"back".to_vec()));
        assert_eq!(client.see().await, Seen::Data(1, true, Vec::new()));
        assert!(stream.writer.write(b"late").await.is_err());
        assert!(connection.shared.streams().is_empty());
    }

    #[tokio::test]
    async fn pings_are_answered_and_unknown_frames_skipped() {
        let (mut client, _connection, _streams) = client();
        // SETTINGS with one entry, a frame of a type that does not exist, WINDOW_UPDATE
        client.io.write_all(b"\x80\x03\0\x04\0\0\0\x0c\0\0\0\x01\0\0\0\x07\0\0\xff\xff").await.unwrap();
        client.io.write_all(b"\x80\x03\0\x63\0\0\0\x02xy").await.unwrap();
        client.io.write_all(b"\x80\x03\0\x09\0\0\0\x08\0\0\0\x01\0\0\xff\xff").await.unwrap();
        client.io.write_all(&frame::ping(77)).await.unwrap();
        assert_eq!(client.see().await, Seen::Control(Control::Ping { id: 77 }));
    }

    #[tokio::test]
    async fn numbers_that_do_not_grow_end_the_connection() {
        for second in [2, 1, 3] {
            let (mut client, connection, mut streams) = client();
            client.open(3, false).await;
            let mut stream = streams.recv().await.unwrap();
            client.open(second, false).await;
            connection.gone().cancelled().await;
            assert_eq!(stream.incoming.recv().await, None);
            assert!(stream.writer.write(b"x").await.is_err());
            assert_eq!(client.see().await, Seen::Control(Control::SynReply { stream: 3, fin: false }));
            assert_eq!(client.see().await, Seen::Control(Control::GoAway));
        }
    }

    #[tokio::test]
    async fn more_streams_than_allowed_are_refused() {
        let (mut client, _connection, mut streams) = client();
        let mut kept = Vec::new();
        for number in 0..MAX_STREAMS as u32 {
            client.open(number * 2 + 1, false).await;
            kept.push(streams.recv().await.unwrap());
            client.see().await;
        }
        let next = MAX_STREAMS as u32 * 2 + 1;
        client.open(next, false).await;
        assert_eq!(client.see().await, Seen::Control(Control::Reset { stream: next }));
    }

    #[tokio::test]
    async fn a_slow_reader_holds_its_sender_back() {
        let (io, server) = tokio::io::duplex(CHUNK);
        let (_connection, mut streams) = start(server).unwrap();
        let mut client = Client { io, headers: HeaderWriter::new().unwrap(), replies: HeaderReader::new() };
        client.open(1, false).await;
        let mut stream = streams.recv().await.unwrap();
        let sender = tokio::spawn(async move {
            for _ in 0..100 {
                client.data(1, false, &[7; CHUNK]).await;
            }
            client.data(1, true, b"").await;
            client
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!sender.is_finished());
        assert!(stream.incoming.len() <= QUEUE);
        let mut total = 0;
        while let Some(bytes) = stream.incoming.recv().await {
            total += bytes.len();
        }
        assert_eq!(total, 100 * CHUNK);
        sender.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_every_stream() {
        let (mut client, connection, mut streams) = client();
        client.open(1, false).await;
        let mut stream = streams.recv().await.unwrap();
        drop(client);
        assert_eq!(stream.incoming.recv().await, None);
        connection.gone().cancelled().await;
        assert!(stream.writer.write(b"x").await.is_err());
    }
}
