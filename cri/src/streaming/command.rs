//! The client's end of a remote command, whichever transport it came over.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::protocol::Version;
use super::spdy::{self, Reset, Stream, StreamWriter};
use super::status::Outcome;
use super::websocket::{ChannelWriter, Channels, Coding, Role};

/// How long a client may take to open its streams.
const STREAMS_TIME: Duration = Duration::from_secs(30);
/// Longest message on the error stream in bytes.
const MAX_MESSAGE: usize = 16 << 10;

/// What a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// It will write.
    pub stdin: bool,
    /// It will read.
    pub stdout: bool,
    /// It will read this too; never with a terminal.
    pub stderr: bool,
    /// There is a terminal.
    pub tty: bool,
}

/// One output of the command towards the client.
#[derive(Debug)]
pub enum Output {
    /// A stream of its own.
    Spdy(StreamWriter),
    /// A channel among others.
    WebSocket(ChannelWriter),
}

impl Output {
    /// Sends all of `bytes`; waits while the client does not take them.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Spdy(stream) => stream.write(bytes).await,
            Self::WebSocket(channel) => channel.write(bytes).await,
        }
    }

    /// Nothing more will come.
    pub async fn finish(&self) -> io::Result<()> {
        match self {
            Self::Spdy(stream) => stream.finish().await,
            Self::WebSocket(channel) => channel.finish().await,
        }
    }
}

/// A client that waits for its command.
#[derive(Debug)]
pub struct Client {
    /// What it types.
    pub stdin: Option<mpsc::Receiver<Bytes>>,
    /// Where it reads.
    pub stdout: Option<Output>,
    /// Where it reads errors.
    pub stderr: Option<Output>,
    /// Sizes of its terminal, in JSON.
    pub resizes: Option<mpsc::Receiver<Bytes>>,
    /// Cancelled once it has gone.
    pub gone: CancellationToken,
    report: Output,
    version: Version,
    link: Link,
}

#[derive(Debug)]
enum Link {
    Spdy(spdy::Connection),
    WebSocket(Channels),
}

/// Streams by their kind.
#[derive(Default)]
struct Gathered {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
    error: Option<Stream>,
}

impl Gathered {
    fn place(&mut self, kind: &str) -> Option<&mut Option<Stream>> {
        Some(match kind {
            "stdin" => &mut self.stdin,
            "stdout" => &mut self.stdout,
            "stderr" => &mut self.stderr,
            "resize" => &mut self.resize,
            "error" => &mut self.error,
            _ => return None,
        })
    }

    fn is_complete(&self, wanted: Wanted, version: Version) -> bool {
        self.error.is_some()
            && (!wanted.stdin || self.stdin.is_some())
            && (!wanted.stdout || self.stdout.is_some())
            && (!wanted.stderr || self.stderr.is_some())
            && (!(wanted.tty && version.resizes()) || self.resize.is_some())
    }
}

impl Client {
    /// Waits until the client has opened the streams of what was wanted. None if it does not, or opens others.
    pub async fn over_spdy(
        transport: impl spdy::Transport,
        wanted: Wanted,
        version: Version,
    ) -> Option<Self> {
        let (connection, mut streams) = spdy::start(transport).ok()?;
        let mut gathered = Gathered::default();
        let gather = async {
            while !gathered.is_complete(wanted, version) {
                let stream = streams.recv().await?;
                let kind = stream.headers.get("streamtype").unwrap_or_default();
                match gathered.place(kind) {
                    Some(place @ None) => *place = Some(stream),
                    _ => {
                        tracing::debug!(kind, "a client opens a stream twice, or one that does not exist");
                        let _ = stream.writer.reset(Reset::Protocol).await;
                        return None;
                    }
                }
            }
            Some(())
        };
        let complete = tokio::time::timeout(STREAMS_TIME, gather).await.ok().flatten();
        if complete.is_none() {
            tracing::debug!("a client has not opened the streams of what it asked for");
            connection.close().await;
            return None;
        }
        let report = Output::Spdy(gathered.error?.writer);
        let output = |stream: Option<Stream>, wanted: bool| {
            stream.filter(|_| wanted).map(|stream| Output::Spdy(stream.writer))
        };
        Some(Self {
            stdin: gathered.stdin.filter(|_| wanted.stdin).map(|stream| stream.incoming),
            stdout: output(gathered.stdout, wanted.stdout),
            stderr: output(gathered.stderr, wanted.stderr),
            resizes: gathered.resize.map(|stream| stream.incoming),
            gone: connection.gone(),
            report,
            version,
            link: Link::Spdy(connection),
        })
    }

    /// Takes the channels of a WebSocket as the client's streams (k8s.io/kubelet, remotecommand: 0 stdin, 1 stdout,
    /// 2 stderr, 3 error, 4 resize).
    pub async fn over_websocket(transport: impl spdy::Transport, wanted: Wanted, version: Version) -> Self {
        let coding = Coding { ends: version >= Version::V5, numbered: true };
        let (channels, [stdin, resizes]) = Channels::start(transport, Role::Server, coding, [0, 4]);
        let output = |number, wanted: bool| wanted.then(|| Output::WebSocket(channels.writer(number)));
        let (stdout, stderr) = (output(1, wanted.stdout), output(2, wanted.stderr));
        let report = Output::WebSocket(channels.writer(3));
        // An empty message tells the client that it is connected; whether it still is, it will be seen soon.
        let first = stdout.as_ref().or(stderr.as_ref()).unwrap_or(&report);
        let _ = first.write(&[]).await;
        Self {
            stdin: Some(stdin).filter(|_| wanted.stdin),
            stdout,
            stderr,
            resizes: Some(resizes).filter(|_| wanted.tty),
            gone: channels.gone(),
            report,
            version,
            link: Link::WebSocket(channels),
        }
    }

    /// Tells the client how its command ended, and ends the connection.
    pub async fn end(self, outcome: &Outcome) {
        let message = match self.version.has_status() {
            true => outcome.to_json(),
            false => outcome.to_text().into_bytes(),
        };
        let Self { report, link, stdin, resizes, stdout, stderr, .. } = self;
        // What the client still sends is read and dropped from here on.
        drop((stdin, resizes));
        if !message.is_empty() {
            // A client that has gone does not need it.
            let _ = report.write(&message[..message.len().min(MAX_MESSAGE)]).await;
        }
        for output in [stdout, stderr, Some(report)].iter().flatten() {
            let _ = output.finish().await;
        }
        match link {
            Link::Spdy(connection) => connection.close().await,
            Link::WebSocket(channels) => channels.close().await,
        }
    }
}
