use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a path is answered with.
#[derive(Clone)]
pub enum Answer {
    /// 200 with this body and type, whatever its digest.
    Body(Vec<u8>, String),
    /// Announces `announced` bytes and closes after the body.
    Truncated(Vec<u8>, u64),
    /// The body again and again, never an end.
    Endless(Vec<u8>),
}

/// An HTTP server on loopback that checks nothing: a hostile registry.
pub struct Liar {
    address: String,
    answers: Arc<Mutex<BTreeMap<String, Answer>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Liar {
    pub async fn start() -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answers = Arc::new(Mutex::new(BTreeMap::new()));
        let shared = answers.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Liar { address, answers, task }
    }

    pub fn host(&self) -> &str {
        &self.address
    }

    /// `path` is whole: `/v2/<name>/blobs/<digest>`.
    pub fn answer(&self, path: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(path.to_owned(), answer);
    }

    /// Serves an image truthfully as `host/name:tag`; single answers may be replaced afterwards.
    pub fn offer(&self, name: &str, tag: &str, image: &crate::image::Image) -> String {
        for blob in image.blobs() {
            let path = format!("/v2/{name}/blobs/{}", crate::image::digest(blob));
            self.answer(&path, Answer::Body(blob.to_vec(), "application/octet-stream".into()));
        }
        self.offer_manifest(name, tag, image.manifest(), image.manifest_type());
        format!("{}/{name}:{tag}", self.address)
    }

    /// Serves any bytes as the manifest of `name:tag`.
    pub fn offer_manifest(&self, name: &str, tag: &str, manifest: &[u8], media_type: &str) {
        for reference in [tag.to_owned(), crate::image::digest(manifest)] {
            let path = format!("/v2/{name}/manifests/{reference}");
            self.answer(&path, Answer::Body(manifest.to_vec(), media_type.to_owned()));
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, answers: Arc<Mutex<BTreeMap<String, Answer>>>) {
    let mut head = Vec::new();
    loop {
        head.clear();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) if head.len() < 65_536 => head.push(byte),
                _ => return,
            }
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut words = text.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let path = path.split('?').next().unwrap_or("");
        let answer = answers.lock().unwrap().get(path).cloned();
        if !respond(&mut stream, method, path, answer).await {
            return;
        }
    }
}

async fn respond(stream: &mut TcpStream, method: &str, path: &str, answer: Option<Answer>) -> bool {
    let head = |length: u64, kind: &str| {
        format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n")
    };
    let body_wanted = method != "HEAD";
    match answer {
        None if path == "/v2/" => stream.write_all(head(0, "text/plain").as_bytes()).await.is_ok(),
        None => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.is_ok(),
        Some(Answer::Body(body, kind)) => {
            stream.write_all(head(body.len() as u64, &kind).as_bytes()).await.is_ok()
                && (!body_wanted || stream.write_all(&body).await.is_ok())
        }
        Some(Answer::Truncated(body, announced)) => {
            let _ = stream.write_all(head(announced, "application/octet-stream").as_bytes()).await;
            let _ = stream.write_all(&body).await;
            false
        }
        Some(Answer::Endless(body)) => {
            let _ = stream
                .write_all(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n",
                )
                .await;
            while stream.write_all(&body).await.is_ok() {}
            false
        }
    }
}
