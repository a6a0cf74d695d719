use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::image::{OCI_MANIFEST, TestImage, digest, sha512};

/// One request as the server saw it. Header names are in lower case.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    /// First byte of a Range header.
    pub(crate) fn offset(&self) -> usize {
        self.range().map_or(0, |(first, _)| first)
    }

    /// First byte of a Range header, and the last if it names one.
    pub(crate) fn range(&self) -> Option<(usize, Option<usize>)> {
        let (first, last) = self.header("range").strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().ok()))
    }
}

/// How a request is answered.
#[derive(Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    ending: Ending,
}

#[derive(Clone, PartialEq)]
enum Ending {
    /// The whole body, with its length.
    Whole,
    /// So many bytes of the body, then the connection is cut.
    CutAfter(usize),
    /// So many bytes of the body, then silence.
    StallAfter(usize),
    /// The body again and again, without a length.
    Endless,
    /// So many bytes at a time, with a pause after each.
    Paced(usize, Duration),
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), ending: Ending::Whole }
    }

    pub(crate) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::new(200, body)
    }

    pub(crate) fn redirect(status: u16, location: &str) -> Self {
        Self::new(status, "").header("Location", location)
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn cut_after(mut self, bytes: usize) -> Self {
        self.ending = Ending::CutAfter(bytes);
        self
    }

    pub(crate) fn stall_after(mut self, bytes: usize) -> Self {
        self.ending = Ending::StallAfter(bytes);
        self
    }

    pub(crate) fn paced(mut self, bytes: usize, pause: Duration) -> Self {
        self.ending = Ending::Paced(bytes, pause);
        self
    }

    /// What `request` wants of a body, by its Range header.
    pub(crate) fn range_of(body: &[u8], request: &Request) -> Self {
        match request.range() {
            None => Self::ok(body),
            Some((first, last)) => {
                let last = last.unwrap_or(body.len() - 1);
                let range = format!("bytes {first}-{last}/{}", body.len());
                Self::new(206, &body[first..=last]).header("Content-Range", &range)
            }
        }
    }

    pub(crate) fn endless(mut self) -> Self {
        self.ending = Ending::Endless;
        self
    }
}

type Answer = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

/// How many large blobs are being sent, and the most there were.
#[derive(Default)]
struct Sending {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// A registry with real content whose answers a test can replace. Speaks plain HTTP on loopback.
pub(crate) struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
    sending: Arc<Sending>,
    task: JoinHandle<()>,
}

impl Server {
    /// Serves the images under their names (`name:tag`). `special` is asked first for every request.
    pub(crate) async fn start(
        images: &[(&str, &TestImage)],
        special: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let mut content: HashMap<String, Reply> = HashMap::new();
        for (reference, image) in images {
            let (name, tag) = reference.split_once(':').unwrap();
            let manifest = Reply::ok(image.manifest.clone())
                .header("Content-Type", OCI_MANIFEST)
                .header("Docker-Content-Digest", &digest(&image.manifest));
            content.insert(format!("/v2/{name}/manifests/{tag}"), manifest.clone());
            content.insert(format!("/v2/{name}/manifests/{}", digest(&image.manifest)), manifest);
            for blob in image.blobs() {
                for digest in [digest(blob), sha512(blob)] {
                    content.insert(format!("/v2/{name}/blobs/{digest}"), Reply::ok(blob));
                }
            }
        }
        let answer = move |request: &Request| {
            special(request).or_else(|| content.get(request.target.split('?').next().unwrap()).cloned())
        };
        Self::serve(Arc::new(answer)).await
    }

    async fn serve(answer: Arc<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let seen = requests.clone();
        let sending: Arc<Sending> = Arc::default();
        let counted = sending.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (answer, seen, sending) = (answer.clone(), seen.clone(), counted.clone());
                tokio::spawn(async move { converse(stream, &*answer, &seen, &sending).await });
            }
        });
        Self { port, requests, sending, task }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The most large blobs that were under way at the same time.
    pub(crate) fn most_at_once(&self) -> usize {
        self.sending.most.load(Ordering::SeqCst)
    }

    /// How many requests had a target with this part.
    pub(crate) fn count(&self, method: &str, part: &str) -> usize {
        self.requests().iter().filter(|seen| seen.method == method && seen.target.contains(part)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One request per connection.
async fn converse(
    stream: TcpStream,
    answer: &Answer,
    seen: &Mutex<Vec<Request>>,
    sending: &Sending,
) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let mut parts = line.split_whitespace();
    let (method, target) = (parts.next()?.to_owned(), parts.next()?);
    // As to a proxy: with the host.
    let target = target
        .strip_prefix("http://")
        .and_then(|rest| rest.find('/').map(|at| &rest[at..]))
        .unwrap_or(target);
    let target = target.to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length: &String| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let request = Request { method, target, headers, body: String::from_utf8(body).unwrap() };
    seen.lock().unwrap().push(request.clone());
    let not_found =
        || Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#);
    let reply = answer(&request).unwrap_or_else(not_found);
    if reply.body.len() < 1 << 20 {
        return send(stream.into_inner(), &request, reply).await;
    }
    let now = sending.now.fetch_add(1, Ordering::SeqCst) + 1;
    sending.most.fetch_max(now, Ordering::SeqCst);
    let sent = send(stream.into_inner(), &request, reply).await;
    sending.now.fetch_sub(1, Ordering::SeqCst);
    sent
}

async fn send(mut stream: TcpStream, request: &Request, reply: Reply) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if reply.ending != Ending::Endless {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    if request.method == "HEAD" {
        return Some(());
    }
    match reply.ending {
        Ending::Whole => stream.write_all(&reply.body).await.ok(),
        Ending::CutAfter(bytes) => stream.write_all(&reply.body[..bytes]).await.ok(),
        Ending::StallAfter(bytes) => {
            stream.write_all(&reply.body[..bytes]).await.ok()?;
            tokio::time::sleep(Duration::from_secs(60)).await;
            Some(())
        }
        Ending::Paced(bytes, pause) => {
            for piece in reply.body.chunks(bytes) {
                stream.write_all(piece).await.ok()?;
                tokio::time::sleep(pause).await;
            }
            Some(())
        }
        Ending::Endless => loop {
            stream.write_all(&reply.body).await.ok()?;
        },
    }
}
