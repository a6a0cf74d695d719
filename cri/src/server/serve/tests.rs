use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Request, Response, Status};

use super::*;
use crate::api::runtime::runtime_service_client::RuntimeServiceClient;
use crate::api::runtime::{
    ExecSyncRequest, ExecSyncResponse, ListContainersRequest, VersionRequest, VersionResponse,
};

#[derive(Clone)]
struct Answers;

#[tonic::async_trait]
impl RuntimeService for Answers {
    async fn version(&self, request: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let version = peer.and_then(|peer| peer.pid()).unwrap_or_default().to_string();
        Ok(Response::new(VersionResponse {
            runtime_name: "hull".into(),
            runtime_version: version,
            ..Default::default()
        }))
    }

    async fn exec_sync(&self, _: Request<ExecSyncRequest>) -> Result<Response<ExecSyncResponse>, Status> {
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(Response::new(ExecSyncResponse { exit_code: 7, ..Default::default() }))
    }
}
#[tonic::async_trait]
impl ImageService for Answers {}
#[tonic::async_trait]
impl Hull for Answers {}

/// A server on a socket in a directory of its own, until it is told to stop.
struct Running {
    directory: tempfile::TempDir,
    stop: tokio::sync::oneshot::Sender<()>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("hull.sock")).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(serve(Answers, listener, async { drop(stopped.await) }));
        Running { directory, stop, server }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("hull.sock")
    }

    async fn client(&self) -> RuntimeServiceClient<tonic::transport::Channel> {
        RuntimeServiceClient::connect(format!("unix://{}", self.socket().display())).await.unwrap()
    }
}

#[tokio::test]
async fn calls_that_hull_has_answer_and_the_others_say_unimplemented() {
    let running = Running::start();
    let mut client = running.client().await;
    let version = client.version(VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!(version.runtime_name, "hull");
    assert_eq!(version.runtime_version, std::process::id().to_string(), "it is known who asks");
    let error = client.list_containers(ListContainersRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_stop_waits_for_the_request_under_way() {
    let running = Running::start();
    let mut client = running.client().await;
    let request = tokio::spawn(async move { client.exec_sync(ExecSyncRequest::default()).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    running.stop.send(()).unwrap();
    assert_eq!(request.await.unwrap().unwrap().into_inner().exit_code, 7);
    running.server.await.unwrap().unwrap();
}

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[1..], &[kind, flags], &stream.to_be_bytes()[..], payload].concat()
}

/// A header block as grpc-go writes it: what repeats goes into the dynamic table, and later requests name the entries.
fn version_request(authority: &str, first: bool) -> Vec<u8> {
    if !first {
        // :method POST, :scheme http, then content-type, te, :authority and :path from the table, newest first.
        return vec![0x83, 0x86, 0xc1, 0xc0, 0xbf, 0xbe];
    }
    let mut block = vec![0x83, 0x86];
    for (name, value) in [
        (&[0x44][..], "/runtime.v1.RuntimeService/Version"),
        (&[0x41][..], authority),
        (&[0x5f][..], "application/grpc"),
        (&[0x40, 2, b't', b'e'][..], "trailers"),
    ] {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    block
}

/// Sends three calls of Version on one connection and returns what comes back until the third has ended.
async fn call_version(socket: &Path, authority: &str) -> (Vec<Vec<u8>>, usize) {
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    for (stream_id, first) in [(1, true), (3, false), (5, false)] {
        stream.write_all(&frame(1, 4, stream_id, &version_request(authority, first))).await.unwrap();
        stream.write_all(&frame(0, 1, stream_id, &[0; 5])).await.unwrap();
    }
    let (mut messages, mut resets) = (Vec::new(), 0);
    let mut ended = 0;
    while ended < 3 {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        match header[3] {
            0 => messages.push(payload),
            3 => resets += 1,
            _ => {}
        }
        ended += usize::from(header[3] == 3 || (header[3] == 1 && header[4] & 1 != 0));
    }
    (messages, resets)
}

#[tokio::test]
async fn clients_that_name_the_socket_as_authority_are_answered() {
    let running = Running::start();
    for authority in ["localhost", "/run/hull/hull.sock", "run%2Fhull.sock", "%2Frun%2Fhull%2Fhull.sock"] {
        let socket = running.socket();
        let (messages, resets) =
            tokio::time::timeout(Duration::from_secs(10), call_version(&socket, authority)).await.unwrap();
        assert_eq!(resets, 0, "{authority}");
        assert_eq!(messages.len(), 3, "{authority}");
        for message in messages {
            let version: VersionResponse = prost::Message::decode(&message[5..]).unwrap();
            assert_eq!(version.runtime_name, "hull", "{authority}");
        }
    }
}
