//! `hull port-forward`

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::PortForwardRequest;
use crate::streaming::dial;
use crate::streaming::spdy::{self, Headers, Reset, Stream};
use crate::streaming::websocket::{Role, tunnel};

const PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";
const CHUNK: usize = 32 << 10;
/// Longest sentence about a connection that failed.
const MAX_REASON: usize = 4 << 10;

/// Reach ports of a pod from here
///
/// Each connection to a port here becomes one to a port on the pod's loopback, wherever the pod runs: it need not be
/// published, and may be in a virtual machine. hull goes on until it is interrupted.
#[derive(Debug, Args)]
#[command(
    name = "port-forward",
    after_help = "\
Examples:
  hull port-forward web 8080:80
  hull port-forward web 5432 9090:9090     several at a time
  hull port-forward --address 0.0.0.0 web 8080:80
  hull port-forward web :80                any free port; it is printed"
)]
pub(super) struct PortForward {
    /// Address here to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,

    /// Id, beginning of an id, or name
    pod: String,

    /// Port here and port in the pod, or one for both
    #[arg(required = true, value_name = "[PORT]:POD-PORT", value_parser = pair)]
    ports: Vec<(u16, u16)>,
}

fn pair(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{text:?} is not a port; write 8080:80, 80 or :80")),
    };
    match text.split_once(':') {
        None => Ok((port(text)?, port(text)?)),
        Some(("", there)) => Ok((0, port(there)?)),
        Some((here, there)) => Ok((port(here)?, port(there)?)),
    }
}

impl PortForward {
    pub(super) async fn run(self, client: &mut Client) -> Result<u8, CliError> {
        let pod = find::pod(client, &self.pod).await?;
        let connection = Arc::new(connect(client, &self.pod, pod.id, &self.ports).await?);
        let mut listening = tokio::task::JoinSet::new();
        for (here, there) in self.ports {
            let address = SocketAddr::new(self.address, here);
            let failed = |error| CliError::local(format!("listen on {address}"), error);
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            print(&format!("{bound} -> {} port {there}\n", self.pod))?;
            listening.spawn(accept(listener, there, Arc::clone(&connection)));
        }
        connection.gone().cancelled().await;
        Err(CliError::Refused(format!(
            "the connection to {} has ended\nThe pod may have ended (`hull pods`), or hulld was started anew.",
            self.pod
        )))
    }
}

async fn connect(
    client: &mut Client,
    name: &str,
    pod_sandbox_id: String,
    ports: &[(u16, u16)],
) -> Result<spdy::Connection, CliError> {
    let port = ports.iter().map(|(_, there)| i32::from(*there)).collect();
    let patience = client.patience();
    let call = client.runtime.port_forward(PortForwardRequest { pod_sandbox_id, port });
    let doing = format!("forward ports of {name}");
    let url = answer(doing.clone(), patience, call).await?.url;
    let failed = |error| CliError::local(doing.clone(), error);
    let place = client.place(url).await?;
    let stream = dial::websocket(&place, PROTOCOL).await.map_err(failed)?;
    let (connection, _none) = spdy::start(tunnel(stream, Role::Client))
        .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
    Ok(connection)
}

/// Takes connections; one that fails is told of and the next one is taken.
async fn accept(listener: TcpListener, port: u16, connection: Arc<spdy::Connection>) {
    let mut number = 0_u64;
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                eprintln!("hull: cannot take a connection: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        number += 1;
        let connection = Arc::clone(&connection);
        tokio::spawn(async move {
            if let Err(reason) = forward(&connection, socket, port, number).await {
                eprintln!("hull: {reason}");
            }
        });
    }
}

/// One connection, to the end of both directions.
async fn forward(
    connection: &spdy::Connection,
    socket: TcpStream,
    port: u16,
    number: u64,
) -> Result<(), String> {
    // The number is unique for each port of this connection to the pod.
    let headers = |kind: &str| {
        Headers::default()
            .with("streamtype", kind)
            .with("port", &port.to_string())
            .with("requestid", &format!("{port}-{number}"))
    };
    let lost = |error: spdy::SpdyError| format!("the connection to the pod broke: {error}");
    let mut error = connection.open(&headers("error"), true).await.map_err(lost)?;
    let data = connection.open(&headers("data"), false).await.map_err(lost)?;
    let Stream { mut incoming, writer, .. } = data;
    let (from_here, mut to_here) = socket.into_split();
    let there = async {
        // The other side may have ended first.
        let _ = send(from_here, &writer).await;
        std::future::pending::<()>().await;
    };
    let back = async {
        while let Some(bytes) = incoming.recv().await {
            if to_here.write_all(&bytes).await.is_err() {
                let _ = writer.reset(Reset::Cancel).await;
                return;
            }
        }
        let _ = to_here.shutdown().await;
    };
    tokio::select! {
        () = there => {}
        () = back => {}
    }
    match reason(&mut error.incoming).await {
        text if text.is_empty() => Ok(()),
        text => Err(text),
    }
}

async fn send(mut from: OwnedReadHalf, to: &spdy::StreamWriter) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.finish().await,
            length => to.write(&buffer[..length]).await?,
        }
    }
}

async fn reason(error: &mut tokio::sync::mpsc::Receiver<Bytes>) -> String {
    let mut text = Vec::new();
    while let Some(bytes) = error.recv().await {
        text.extend_from_slice(&bytes);
        text.truncate(MAX_REASON);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::pair;

    #[test]
    fn ports_are_one_or_two_and_the_first_may_be_any() {
        assert_eq!(pair("80"), Ok((80, 80)));
        assert_eq!(pair("8080:80"), Ok((8080, 80)));
        assert_eq!(pair(":80"), Ok((0, 80)));
        for bad in ["", "0", "80:", "a:80", "80:70000", "1:2:3"] {
            assert!(pair(bad).is_err(), "{bad}");
        }
    }
}
