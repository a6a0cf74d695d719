//! Connections to ports inside a pod.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::spdy::{self, Reset, Stream, StreamWriter};
use crate::runtime::objects::Pod;
use crate::sandbox::Connection;

/// Connections of one client at a time.
const MAX_CONNECTIONS: usize = 256;
const CHUNK: usize = 32 << 10;

/// A port-forward that was asked for.
#[derive(Debug)]
pub struct PortForwardSession {
    /// Into which pod.
    pub pod: Arc<Pod>,
}

/// One connection that a client makes: data and, apart from them, why it failed.
#[derive(Default)]
struct Request {
    data: Option<Stream>,
    error: Option<Stream>,
}

impl PortForwardSession {
    /// Forwards connections until the client goes away.
    pub(super) async fn serve(self, transport: impl spdy::Transport) {
        let Ok((connection, mut streams)) = spdy::start(transport) else { return };
        let gone = connection.gone();
        let mut waiting: HashMap<String, Request> = HashMap::new();
        // Dropped with all its tasks when the client has gone.
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                () = gone.cancelled() => return,
                Some(_) = connections.join_next() => continue,
                stream = streams.recv() => match stream {
                    Some(stream) => stream,
                    None => return,
                },
            };
            let full = connections.len() + waiting.len() >= MAX_CONNECTIONS;
            if let Some((port, data, error)) = paired(stream, &mut waiting, full).await {
                let pod = Arc::clone(&self.pod);
                connections.spawn(async move { forward(&pod, port, data, error).await });
            }
        }
    }
}

/// Puts a stream to its request; gives out the request once it is complete. Streams that fit nowhere are reset.
async fn paired(
    stream: Stream,
    waiting: &mut HashMap<String, Request>,
    full: bool,
) -> Option<(u16, Stream, Stream)> {
    let port = stream.headers.get("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0);
    // Clients of Kubernetes 1.3 and before send no number, and one connection at a time for each port.
    let number =
        stream.headers.get("requestid").or(stream.headers.get("port")).unwrap_or_default().to_owned();
    let kind = stream.headers.get("streamtype").unwrap_or_default();
    let refused = match (port, kind) {
        (Some(_), "data" | "error") => full && !waiting.contains_key(&number),
        _ => true,
    };
    if refused {
        tracing::debug!(kind, ?port, "a client opens a stream that fits no forwarded port");
        let _ = stream.writer.reset(Reset::Refused).await;
        return None;
    }
    let request = waiting.entry(number.clone()).or_default();
    let place = if kind == "data" { &mut request.data } else { &mut request.error };
    if place.is_some() {
        let _ = stream.writer.reset(Reset::Protocol).await;
        return None;
    }
    *place = Some(stream);
    if request.data.is_none() || request.error.is_none() {
        return None;
    }
    let Request { data, error } = waiting.remove(&number)?;
    Some((port?, data?, error?))
}

/// One connection, from its beginning to the end of both directions.
async fn forward(pod: &Arc<Pod>, port: u16, data: Stream, error: Stream) {
    let result = match connect(pod, port).await {
        Ok(socket) => pass(socket, data.incoming, &data.writer).await,
        Err(reason) => Err(reason),
    };
    if let Err(reason) = result {
        let message = format!("cannot forward to port {port} in the pod sandbox {}: {reason}", pod.id());
        // A client that has gone does not need it.
        let _ = error.writer.write(message.as_bytes()).await;
        let _ = data.writer.reset(Reset::Cancel).await;
    }
    let _ = error.writer.finish().await;
}

/// To the pod's loopback, as kubectl promises.
async fn connect(pod: &Arc<Pod>, port: u16) -> io::Result<Connection> {
    let namespace = pod.with_record(|record| record.network_namespace.clone());
    let namespace = Some(namespace).filter(|path| !path.is_empty()).map(PathBuf::from);
    pod.launcher.dial(&pod.place(), namespace, port).await
}

/// Passes bytes both ways; each direction ends by itself.
async fn pass(
    socket: Connection,
    mut incoming: mpsc::Receiver<Bytes>,
    outgoing: &StreamWriter,
) -> io::Result<()> {
    let Connection { mut reader, mut writer } = socket;
    let there = async {
        while let Some(bytes) = incoming.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                // The program in the pod reads no more, and may still write.
                return;
            }
        }
        let _ = writer.shutdown().await;
    };
    let back = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            match reader.read(&mut buffer).await? {
                0 => return outgoing.finish().await,
                length => outgoing.write(&buffer[..length]).await?,
            }
        }
    };
    // As others do: once the pod has said all, a client that still only listens needs no connection any more.
    let (there, back) = (std::pin::pin!(there), std::pin::pin!(back));
    match futures::future::select(there, back).await {
        futures::future::Either::Left(((), back)) => back.await,
        futures::future::Either::Right((result, there)) => {
            result?;
            there.await;
            Ok(())
        }
    }
}
