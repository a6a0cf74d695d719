use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Numbers of the streams in `v4.channel.k8s.io`.
pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;

const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const LARGEST: u64 = 1 << 20;

/// The client's end of a streaming exec, as kubectl has it. Blocking: it is measured from a thread of its own.
pub struct WebSocket {
    socket: TcpStream,
}

impl WebSocket {
    /// Connects to a URL that Exec returned.
    pub fn connect(url: &str) -> io::Result<WebSocket> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{url}: {what}"));
        let rest = url.strip_prefix("http://").ok_or_else(|| bad("not http"))?;
        let (host, path) = rest.split_at(rest.find('/').ok_or_else(|| bad("no path"))?);
        let mut socket = TcpStream::connect(host)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            socket,
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: http://{host}\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        if !head.starts_with(b"HTTP/1.1 101 ") {
            return Err(bad(&String::from_utf8_lossy(&head)));
        }
        Ok(WebSocket { socket })
    }

    /// Sends bytes, at most 100, to a stream.
    pub fn send(&mut self, stream: u8, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len() <= 100, "longer frames have another header");
        // A mask of zeros is a mask.
        let mut frame = vec![0x80 | BINARY, 0x80 | (bytes.len() as u8 + 1), 0, 0, 0, 0, stream];
        frame.extend_from_slice(bytes);
        self.socket.write_all(&frame)
    }

    /// The next frame with a stream's bytes; `None` at the end. Without [`STDIN`]'s and control frames.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            match self.socket.read_exact(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                result => result?,
            }
            let length = match head[1] & 0x7f {
                126 => u64::from(u16::from_be_bytes(self.bytes()?)),
                127 => u64::from_be_bytes(self.bytes()?),
                short => u64::from(short),
            };
            if length > LARGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of more than 1 MiB"));
            }
            let mut body = vec![0; length as usize];
            self.socket.read_exact(&mut body)?;
            match (head[0] & 0x0f, body.split_first()) {
                (CLOSE, _) => return Ok(None),
                (BINARY, Some((stream, bytes))) => return Ok(Some((*stream, bytes.to_vec()))),
                _ => {}
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
