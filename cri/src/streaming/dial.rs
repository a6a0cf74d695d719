//! The client's side: from the place of a stream to a WebSocket.

use std::io;
use std::pin::Pin;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::pinned;
use super::spdy::Transport;
use super::websocket::{accept_key, base64};

/// Longest answer to the handshake, and longest explanation of a refusal.
const MAX_HEAD: usize = 16 << 10;
const MAX_REASON: u64 = 4 << 10;

/// Where a stream is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// As hulld gives it out: `http://ADDRESS:PORT/PATH`, or `https://` with TLS.
    pub url: String,
    /// With TLS: the certificate (DER) that the server must show.
    pub certificate: Vec<u8>,
}

/// Bytes both ways, secured or not.
pub type Connection = Pin<Box<dyn Transport>>;

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// Connects to `place` and agrees on `protocol`. What follows on the stream are the server's frames.
pub async fn websocket(place: &Place, protocol: &str) -> io::Result<Connection> {
    let url = &place.url;
    let (rest, secured) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
        (Some(rest), _) => (rest, false),
        (None, Some(rest)) => (rest, true),
        (None, None) => return Err(invalid(format!("{url:?} is not an http:// or https:// URL"))),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let harmless = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    if !harmless(authority) || !harmless(path) {
        return Err(invalid(format!("{url:?} is not a URL")));
    }
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    let mut stream: Connection = match secured {
        true => Box::pin(secure(stream, place.certificate.clone()).await?),
        false => Box::pin(stream),
    };
    let key = base64(&rand::random::<[u8; 16]>());
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {protocol}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let head = head(&mut stream).await?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    if status != "101" {
        let mut reason = String::new();
        // Best effort: the status alone would do.
        let _ = stream.take(MAX_REASON).read_to_string(&mut reason).await;
        return Err(invalid(format!("the server answered {status}: {}", reason.trim())));
    }
    let mut fields = lines.filter_map(|line| line.split_once(':'));
    let proof = fields.find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-accept"));
    if proof.is_none_or(|(_, value)| value.trim() != accept_key(&key)) {
        return Err(invalid("the server does not speak WebSocket"));
    }
    Ok(stream)
}

/// TLS with the one server that has this certificate.
async fn secure(stream: TcpStream, certificate: Vec<u8>) -> io::Result<impl Transport> {
    let name = ServerName::from(stream.peer_addr()?.ip());
    let connector = pinned::connector(certificate).map_err(io::Error::other)?;
    connector.connect(name, stream).await
}

/// Byte by byte: what follows it are frames.
async fn head(stream: &mut Connection) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_HEAD {
            return Err(invalid("the server's answer is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    String::from_utf8(head).map_err(|_| invalid("the server's answer is not text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn dial(url: &str) -> io::Result<Connection> {
        let place = Place { url: url.to_owned(), certificate: Vec::new() };
        websocket(&place, "v5.channel.k8s.io").await
    }

    #[tokio::test]
    async fn a_url_that_is_none_is_refused_before_anything_is_sent() {
        for url in ["ftp://x/", "ws://x", "http://a b/", "https://a b/", "http://x/\r\nHost: y"] {
            let error = dial(url).await.err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{url}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_told_with_its_reason() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/exec/x", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut stream: Connection = Box::pin(listener.accept().await.unwrap().0);
            // A connection that is closed with something unread is reset, and the answer with it.
            head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\nno such stream").await.unwrap();
        });
        let error = dial(&url).await.err().unwrap();
        assert!(error.to_string().contains("404: no such stream"), "{error}");
    }
}
