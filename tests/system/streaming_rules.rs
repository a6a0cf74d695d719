//! What the streaming server holds its clients to: versions of the protocol, streams, frames, URLs, silence.

use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::streaming::{Case, Spdy, V4, WebSocket, text, upgrade};

/// Most URLs that may wait to be used.
const MOST_PENDING: usize = 1000;
/// Connections that say nothing: more than are kept.
const SILENT: usize = 1500;

#[tokio::test(flavor = "multi_thread")]
async fn every_version_of_the_remote_command_protocol_tells_how_a_command_ended() {
    let case = Case::new(|_| {}).await;
    for protocol in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io", V4] {
        for (script, code) in [("cat; echo err >&2", 0), ("cat; exit 7", 7)] {
            let url = case
                .exec(script, |request| {
                    request.stdin = true;
                    request.stderr = true;
                })
                .await;
            let mut spdy = Spdy::connect(&url, protocol).await;
            let error = spdy.writer.kind("error").await;
            let stdin = spdy.writer.kind("stdin").await;
            let stdout = spdy.writer.kind("stdout").await;
            let stderr = spdy.writer.kind("stderr").await;
            spdy.writer.send(stdin, false, b"typed").await;
            spdy.writer.send(stdin, true, b"").await;
            let streams = spdy.everything().await;
            assert_eq!(text(&streams[&stdout].bytes), "typed", "{protocol}");
            if code == 0 {
                assert_eq!(text(&streams[&stderr].bytes), "err\n", "{protocol}");
            }
            let told = text(&streams[&error].bytes);
            match (protocol, code) {
                // Text, and nothing if all went well
                (V4, 0) => assert!(told.contains(r#""status":"Success""#), "{told}"),
                (V4, _) => assert!(told.contains(r#""message":"7""#), "{told}"),
                (_, 0) => assert_eq!(told, "", "{protocol}"),
                (_, _) => assert!(told.contains("exit status 7"), "{protocol}: {told}"),
            }
        }
    }
    // Sizes of the terminal came with v3
    // (busybox's complains of a terminal that has none yet)
    let script = "until stty size 2>/dev/null | grep -q '17 91'; do sleep 0.1; done; echo sized";
    let url = case.exec(script, |request| request.tty = true).await;
    let mut spdy = Spdy::connect(&url, "v3.channel.k8s.io").await;
    spdy.writer.kind("error").await;
    let stdout = spdy.writer.kind("stdout").await;
    let resize = spdy.writer.kind("resize").await;
    spdy.writer.send(resize, false, br#"{"Width":91,"Height":17}"#).await;
    let shown = tokio::time::timeout(hull_tests::patience(20), spdy.everything()).await;
    assert_eq!(text(&shown.expect("the size arrives")[&stdout].bytes).trim(), "sized");
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_twice_an_unknown_one_and_a_frame_too_large_run_nothing() {
    let mut case = Case::new(|_| {}).await;
    let script = "touch /ran";
    for second in ["stdout", "elsewhere"] {
        let url = case.exec(script, |request| request.stderr = true).await;
        let mut spdy = Spdy::connect(&url, V4).await;
        spdy.writer.kind("stdout").await;
        spdy.writer.kind(second).await;
        // The connection ends, with a word for the stream that was too much
        let streams = spdy.everything().await;
        assert!(streams.values().any(|stream| stream.ended), "{second}");
        assert_eq!(upgrade(&url, "Upgrade: SPDY/3.1\r\n").await.0, 404, "its URL was used up");
    }
    // A control frame of 16 MiB, which nobody waits for
    let url = case.exec(script, |request| request.stderr = true).await;
    let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {V4}\r\n");
    let (status, head, mut socket) = upgrade(&url, &headers).await;
    assert_eq!(status, 101, "{head}");
    socket.write_all(b"\x80\x03\0\x01\0\xff\xff\xff").await.unwrap();
    ends(&mut socket).await;
    // A WebSocket message of an exabyte, one that is not masked, and a client that goes away in the middle of its input:
    // the command is killed before it can take what came for all of it
    let gone = &b""[..];
    for _ in 0..5 {
        for frame in
            [&b"\x82\xff\x0f\xff\xff\xff\xff\xff\xff\xff\x01\x02\x03\x04"[..], b"\x82\x05\0hello", gone]
        {
            let url = case.exec("read line; : >/ran", |request| request.stdin = true).await;
            let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await.into_inner();
            // By then it reads.
            tokio::time::sleep(Duration::from_millis(50)).await;
            if frame.is_empty() {
                drop(socket);
            } else {
                socket.write_all(frame).await.unwrap();
                ends(&mut socket).await;
            }
        }
    }
    let id = case.id.clone();
    hull_tests::eventually("no command is left", hull_tests::patience(15), async || {
        // In brackets are the dead ones, whom the container's first process does not wait for.
        let living = case.pod.shell(&id, "ps | grep -v '\\['").await;
        (!living.contains("read line")).then_some(())
    })
    .await;
    assert_ne!(case.pod.exec(&id, &["test", "-e", "/ran"]).await.exit_code, 0, "something ran");
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_urls_may_wait_and_one_that_is_used_makes_room() {
    let case = Case::new(|_| {}).await;
    let mut client = case.pod.client();
    let request = cri::ExecRequest {
        container_id: case.id.clone(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    let first = client.exec(request.clone()).await.unwrap().into_inner().url;
    let begun = Instant::now();
    for _ in 1..MOST_PENDING {
        client.exec(request.clone()).await.unwrap();
    }
    let refused = client.exec(request.clone()).await;
    // Where that took a minute, the first ones do not count any more
    if begun.elapsed() < Duration::from_secs(50) {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
        assert!(refused.message().contains("1000 streams"), "{refused}");
        let mut spdy = Spdy::connect(&first, V4).await;
        spdy.writer.kind("error").await;
        spdy.writer.kind("stdout").await;
        client.exec(request).await.unwrap();
    }
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_keep_nobody_out() {
    let case = Case::new(|_| {}).await;
    let url = case.exec("cat", |request| request.stdin = true).await;
    let address = url.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    // A session that has begun keeps its place, however many come after it
    let mut session = WebSocket::connect(&url, "v5.channel.k8s.io").await;
    let mut silent = Vec::with_capacity(SILENT);
    let begun = Instant::now();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let come = begun.elapsed();
    // The first of those made room for the last: it did not have the ten seconds that a request may take
    ends(&mut silent[0]).await;
    assert!(come > Duration::from_secs(3) || begun.elapsed() < Duration::from_secs(10), "it ended by itself");
    let url = case.exec("echo here", |_| {}).await;
    let channels = WebSocket::connect(&url, "v5.channel.k8s.io").await.everything().await;
    assert_eq!(text(&channels[&1]), "here\n");
    session.send(b"\0still").await;
    session.send(&[255, 0]).await;
    assert_eq!(text(&session.everything().await[&1]), "still");
    drop(silent);
    case.daemon.finish().await;
}

/// Waits until the server has ended the connection, whatever it says before that.
async fn ends(socket: &mut TcpStream) {
    let mut buffer = [0; 4096];
    let end = async { while socket.read(&mut buffer).await.is_ok_and(|length| length > 0) {} };
    tokio::time::timeout(hull_tests::patience(20), end).await.expect("the server ends the connection");
}
