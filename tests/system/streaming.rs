//! Exec, Attach and PortForward over real sockets, with clients of our own: SPDY and WebSocket, written by hand.

use std::collections::HashMap;
use std::time::Duration;

use flate2::{Compress, Compression, FlushCompress};
use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

pub(crate) const V4: &str = "v4.channel.k8s.io";
pub(crate) const LARGE: usize = 100_000_000;

/// Sends an upgrade and reads the answer's head.
pub(crate) async fn upgrade(url: &str, headers: &str) -> (u16, String, TcpStream) {
    let rest = url.strip_prefix("http://").expect("a plain URL");
    let (address, path) = rest.split_once('/').expect("a path");
    let mut socket = TcpStream::connect(address).await.unwrap();
    let method = if headers.contains("websocket") { "GET" } else { "POST" };
    let request =
        format!("{method} /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = socket.read_u8().await.expect("an answer");
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, socket)
}

/// A SPDY client's connection.
pub(crate) struct Spdy {
    pub(crate) reader: SpdyReader,
    pub(crate) writer: SpdyWriter,
}

pub(crate) struct SpdyReader(OwnedReadHalf);

pub(crate) struct SpdyWriter {
    socket: OwnedWriteHalf,
    headers: Compress,
    next: u32,
}

/// What is read of a stream.
#[derive(Default)]
pub(crate) struct Read {
    pub(crate) bytes: Vec<u8>,
    pub(crate) ended: bool,
}

impl Spdy {
    pub(crate) async fn connect(url: &str, protocol: &str) -> Spdy {
        let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        let (status, head, socket) = upgrade(url, &headers).await;
        assert_eq!(status, 101, "{head}");
        assert!(head.to_lowercase().contains(&format!("x-stream-protocol-version: {protocol}")), "{head}");
        let (reader, socket) = socket.into_split();
        // Without the dictionary: a peer may leave it out, as the zlib header says.
        let headers = Compress::new(Compression::fast(), true);
        Spdy { reader: SpdyReader(reader), writer: SpdyWriter { socket, headers, next: 1 } }
    }

    /// Reads until the connection ends.
    pub(crate) async fn everything(mut self) -> HashMap<u32, Read> {
        self.reader.everything().await
    }
}

impl SpdyReader {
    /// The next frame that is data (stream, end, bytes); None at the end or at GOAWAY.
    pub(crate) async fn data(&mut self) -> Option<(u32, bool, Vec<u8>)> {
        loop {
            let mut head = [0; 8];
            self.0.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]);
            let mut bytes = vec![0; length as usize];
            self.0.read_exact(&mut bytes).await.ok()?;
            match (head[0] & 0x80 != 0, head[3]) {
                (false, _) => {
                    let stream = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
                    return Some((stream, head[4] & 1 != 0, bytes));
                }
                (true, 7) => return None,
                (true, 3) => {
                    let stream = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    return Some((stream, true, Vec::new()));
                }
                (true, _) => {}
            }
        }
    }

    pub(crate) async fn everything(&mut self) -> HashMap<u32, Read> {
        let mut streams: HashMap<u32, Read> = HashMap::new();
        while let Some((stream, ended, bytes)) = self.data().await {
            let read = streams.entry(stream).or_default();
            read.bytes.extend(bytes);
            read.ended |= ended;
        }
        streams
    }
}

impl SpdyWriter {
    pub(crate) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend((text.len() as u32).to_be_bytes());
            plain.extend(text.as_bytes());
        }
        let mut block = Vec::with_capacity(4096);
        self.headers.compress_vec(&plain, &mut block, FlushCompress::Sync).unwrap();
        let mut frame = vec![0x80, 3, 0, 1, 0];
        frame.extend(&((block.len() + 10) as u32).to_be_bytes()[1..]);
        frame.extend(stream.to_be_bytes());
        frame.extend([0; 6]);
        frame.extend(block);
        self.socket.write_all(&frame).await.unwrap();
        stream
    }

    pub(crate) async fn kind(&mut self, kind: &str) -> u32 {
        self.open(&[("streamtype", kind)]).await
    }

    pub(crate) async fn send(&mut self, stream: u32, end: bool, bytes: &[u8]) {
        let mut frame = stream.to_be_bytes().to_vec();
        frame.push(u8::from(end));
        frame.extend(&(bytes.len() as u32).to_be_bytes()[1..]);
        frame.extend(bytes);
        self.socket.write_all(&frame).await.unwrap();
    }
}

/// A WebSocket client's connection.
pub(crate) struct WebSocket(TcpStream);

impl WebSocket {
    pub(crate) async fn connect(url: &str, protocol: &str) -> WebSocket {
        let headers = format!(
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: {protocol}\r\n"
        );
        let (status, head, socket) = upgrade(url, &headers).await;
        assert_eq!(status, 101, "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        WebSocket(socket)
    }

    /// For what no well-behaved client sends.
    pub(crate) fn into_inner(self) -> TcpStream {
        self.0
    }

    pub(crate) async fn send(&mut self, message: &[u8]) {
        let mut frame = vec![0x82];
        match message.len() {
            short @ 0..126 => frame.push(0x80 | short as u8),
            long => {
                frame.push(0x80 | 126);
                frame.extend(u16::try_from(long).unwrap().to_be_bytes());
            }
        }
        frame.extend([9, 8, 7, 6]);
        frame.extend(message.iter().zip([9, 8, 7, 6].iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.0.write_all(&frame).await.unwrap();
    }

    /// Reads to the server's close; what came on each channel.
    pub(crate) async fn everything(mut self) -> HashMap<u8, Vec<u8>> {
        let mut channels: HashMap<u8, Vec<u8>> = HashMap::new();
        loop {
            let mut head = [0; 2];
            self.0.read_exact(&mut head).await.expect("a close before the end");
            let length = match head[1] {
                126 => usize::from(self.0.read_u16().await.unwrap()),
                127 => self.0.read_u64().await.unwrap() as usize,
                short => short.into(),
            };
            let mut bytes = vec![0; length];
            self.0.read_exact(&mut bytes).await.unwrap();
            match head[0] & 0xf {
                8 => return channels,
                2 => channels.entry(bytes[0]).or_default().extend(&bytes[1..]),
                _ => {}
            }
        }
    }
}

pub(crate) struct Case {
    pub(crate) daemon: Daemon,
    pub(crate) pod: Pod,
    pub(crate) id: String,
}

impl Case {
    /// A pod with one container that does this.
    pub(crate) async fn new(change: impl FnOnce(&mut cri::ContainerConfig)) -> Case {
        let registry = Registry::start();
        let name = registry.push("busybox", "v1", &image::busybox());
        let daemon = Daemon::start().await;
        daemon.pull(&name).await;
        let mut pod = Pod::run(&daemon, pod_config(&daemon, "streams")).await;
        let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
        change(&mut config);
        let id = pod.start(config).await;
        Case { daemon, pod, id }
    }

    pub(crate) async fn exec(&self, script: &str, change: impl FnOnce(&mut cri::ExecRequest)) -> String {
        let mut request = cri::ExecRequest {
            container_id: self.id.clone(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            stdout: true,
            ..Default::default()
        };
        change(&mut request);
        self.pod
            .client()
            .exec(request)
            .await
            .unwrap_or_else(|status| panic!("Exec: {status}"))
            .into_inner()
            .url
    }

    pub(crate) async fn attach(&self, stdin: bool, tty: bool) -> String {
        let request =
            cri::AttachRequest { container_id: self.id.clone(), stdin, tty, stdout: true, stderr: !tty };
        self.pod
            .client()
            .attach(request)
            .await
            .unwrap_or_else(|status| panic!("Attach: {status}"))
            .into_inner()
            .url
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_spdy_has_both_outputs_and_the_exit_code() {
    let case = Case::new(|_| {}).await;
    let url = case.exec("echo out; echo err >&2; exit 7", |request| request.stderr = true).await;
    let mut spdy = Spdy::connect(&url, V4).await;
    let error = spdy.writer.kind("error").await;
    let stdout = spdy.writer.kind("stdout").await;
    let stderr = spdy.writer.kind("stderr").await;
    let streams = spdy.everything().await;
    assert_eq!(
        (text(&streams[&stdout].bytes), text(&streams[&stderr].bytes)),
        ("out\n".into(), "err\n".into())
    );
    let status: serde_json::Value = serde_json::from_slice(&streams[&error].bytes).unwrap();
    assert_eq!(
        (&status["reason"], &status["details"]["causes"][0]["message"]),
        (&"NonZeroExitCode".into(), &"7".into())
    );
    assert!(streams.values().all(|stream| stream.ended));

    // The URL worked once, and only for what it was made for
    assert_eq!(upgrade(&url, "Upgrade: SPDY/3.1\r\n").await.0, 404);
    let url = case.exec("true", |_| {}).await;
    assert_eq!(upgrade(&url.replace("/exec/", "/attach/"), "Upgrade: SPDY/3.1\r\n").await.0, 404);
    let unknown = "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9.channel.k8s.io\r\n";
    assert_eq!(upgrade(&url, unknown).await.0, 403);
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_pass_an_exec_in_each_direction_intact() {
    let case = Case::new(|_| {}).await;
    let piece: Vec<u8> = (0..100_000_u32).map(|number| (number * 7 % 251) as u8).collect();
    let mut sum = Sha256::new();
    for _ in 0..LARGE / piece.len() {
        sum.update(&piece);
    }
    let wanted: String = hex::encode(sum.finalize());

    // When the container gets them, keeps their sum, and says them again
    let script = "tee /tmp/sum >/dev/null && sha256sum /tmp/sum >&2 && cat /tmp/sum";
    let url = case
        .exec(script, |request| {
            request.stdin = true;
            request.stderr = true;
        })
        .await;
    let mut spdy = Spdy::connect(&url, V4).await;
    spdy.writer.kind("error").await;
    let stdin = spdy.writer.kind("stdin").await;
    let stdout = spdy.writer.kind("stdout").await;
    let stderr = spdy.writer.kind("stderr").await;
    let Spdy { mut reader, mut writer } = spdy;
    let sender = tokio::spawn(async move {
        for _ in 0..LARGE / piece.len() {
            writer.send(stdin, false, &piece).await;
        }
        writer.send(stdin, true, &[]).await;
        writer
    });
    let streams = reader.everything().await;
    drop(sender.await.unwrap());

    // Then both sums are the right one
    assert_eq!(text(&streams[&stderr].bytes).split(' ').next().unwrap(), wanted);
    assert_eq!(hex::encode(Sha256::digest(&streams[&stdout].bytes)), wanted);
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_over_spdy_is_resized_and_its_command_ends_with_its_client() {
    let mut case = Case::new(|_| {}).await;
    let script = "read line; stty size; echo got $line; sleep 1234";
    let url = case
        .exec(script, |request| {
            request.stdin = true;
            request.tty = true;
        })
        .await;
    let mut spdy = Spdy::connect(&url, V4).await;
    spdy.writer.kind("error").await;
    let stdin = spdy.writer.kind("stdin").await;
    let stdout = spdy.writer.kind("stdout").await;
    let resize = spdy.writer.kind("resize").await;
    spdy.writer.send(resize, false, br#"{"Width":132,"Height":50}"#).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    spdy.writer.send(stdin, false, b"hello\n").await;
    let mut shown = String::new();
    while !shown.contains("got hello") {
        let (stream, _, bytes) = spdy.reader.data().await.expect("more");
        assert_eq!(stream, stdout);
        shown += &text(&bytes);
    }
    assert!(shown.contains("50 132"), "{shown:?}");
    assert!(case.pod.shell(&case.id, "ps").await.contains("sleep 1234"));
    // When the client goes away
    drop(spdy);
    let id = case.id.clone();
    let pod = &mut case.pod;
    let mut left = String::from("sleep 1234");
    let deadline = std::time::Instant::now() + hull_tests::patience(15);
    while left.contains("sleep 1234") {
        assert!(std::time::Instant::now() < deadline, "{left}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        left = pod.shell(&id, "ps").await;
    }
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_websocket_ends_its_input_with_v5() {
    let case = Case::new(|_| {}).await;
    let url = case
        .exec("cat; echo done >&2; exit 3", |request| {
            request.stdin = true;
            request.stderr = true;
        })
        .await;
    let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await;
    socket.send(b"\0typed").await;
    socket.send(&[255, 0]).await;
    let channels = socket.everything().await;
    assert_eq!((text(&channels[&1]), text(&channels[&2])), ("typed".into(), "done\n".into()));
    let status: serde_json::Value = serde_json::from_slice(&channels[&3]).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_attach_to_one_container_and_its_log_misses_nothing() {
    let mut case = Case::new(|config| {
        config.command = ["/bin/sh", "-c", "while read line; do echo got $line; done; echo over"]
            .map(str::to_owned)
            .to_vec();
        config.args = Vec::new();
        config.stdin = true;
        config.stdin_once = true;
    })
    .await;
    let watcher = WebSocket::connect(&case.attach(false, false).await, "v5.channel.k8s.io").await;
    let mut typist = WebSocket::connect(&case.attach(true, false).await, "v5.channel.k8s.io").await;
    // Both are attached once the agent says so; what is written before that is not theirs.
    tokio::time::sleep(Duration::from_millis(500)).await;
    typist.send(b"\0one\ntwo\n").await;
    typist.send(&[255, 0]).await;
    // Stdin is closed with the first attached client's, so the container ends, and so does every attach.
    for socket in [typist, watcher] {
        let channels = socket.everything().await;
        assert_eq!(text(&channels[&1]), "got one\ngot two\nover\n");
        assert!(text(&channels[&3]).contains("Success"), "{channels:?}");
    }
    assert_eq!(case.pod.ended(&case.id).await.exit_code, 0);
    assert_eq!(case.pod.log("main"), "got one\ngot two\nover\n");
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_inside_a_pod_are_forwarded_and_a_closed_one_says_so() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "ports")).await;
    let command = ["/bin/nc", "-l", "-p", "8080", "-e", "/bin/cat"];
    pod.start(container_config("main", &name, &command)).await;
    let request = cri::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    let url = pod.client().port_forward(request).await.unwrap().into_inner().url;
    let mut spdy = Spdy::connect(&url, "portforward.k8s.io").await;
    let mut pair = async |port: &str, number: &str| {
        let stream = |kind| [("port", port), ("requestid", number), ("streamtype", kind)];
        let error = spdy.writer.open(&stream("error")).await;
        (error, spdy.writer.open(&stream("data")).await)
    };
    let (refused, _) = pair("81", "0").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (error, data) = pair("8080", "1").await;
    spdy.writer.send(data, true, b"hello").await;
    let mut streams: HashMap<u32, Read> = HashMap::new();
    while !(streams.get(&error).is_some_and(|error| error.ended) && streams.contains_key(&refused)) {
        let (stream, ended, bytes) = spdy.reader.data().await.expect("more");
        let read = streams.entry(stream).or_default();
        read.bytes.extend(bytes);
        read.ended |= ended;
    }
    assert_eq!(text(&streams[&data].bytes), "hello");
    assert!(streams[&error].bytes.is_empty(), "{}", text(&streams[&error].bytes));
    assert!(text(&streams[&refused].bytes).contains("refused"), "{}", text(&streams[&refused].bytes));
    drop(spdy);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_streams_that_cannot_be_are_refused() {
    let mut case = Case::new(|_| {}).await;
    let mut client = case.pod.client();
    let exec = |tty, stdout, stderr| cri::ExecRequest {
        container_id: case.id.clone(),
        cmd: vec!["true".into()],
        tty,
        stdout,
        stderr,
        ..Default::default()
    };
    for request in [exec(true, true, true), exec(false, false, false)] {
        assert_eq!(client.exec(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
    let request = cri::PortForwardRequest { pod_sandbox_id: case.pod.id.clone(), port: vec![70_000] };
    assert_eq!(client.port_forward(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let late = exec(false, true, false);
    case.pod.stop_container(&case.id, 0).await;
    assert_eq!(client.exec(late).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    case.daemon.finish().await;
}
