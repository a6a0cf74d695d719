use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::image::{OCI_MANIFEST, TestImage, digest};

/// Debian's docker-registry on a random loopback port with a directory of its own. Ends with the value.
pub(crate) struct DockerRegistry {
    process: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl DockerRegistry {
    pub(crate) fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), "")
    }

    /// Ends this one and starts another over the same content, with further lines in the `http` section of its
    /// configuration.
    pub(crate) fn restart_with(mut self, http: &str) -> Self {
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        drop(self);
        Self::start_with(directory, http)
    }

    fn start_with(directory: tempfile::TempDir, http: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: \
             127.0.0.1:{port}\n{http}",
            directory.path().display()
        );
        let path = directory.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(directory.path().join("access.log")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts (Debian package docker-registry)");
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(started.elapsed() < Duration::from_secs(30), "docker-registry does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { process, port, directory }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A line for each request since it was started.
    pub(crate) fn access_log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("access.log")).unwrap()
    }

    /// Uploads an image; returns its reference.
    pub(crate) fn push(&self, name: &str, tag: &str, image: &TestImage) -> String {
        for blob in image.blobs() {
            self.push_blob(name, blob);
        }
        self.push_manifest(name, tag, &image.manifest, OCI_MANIFEST);
        format!("{}/{name}:{tag}", self.host())
    }

    pub(crate) fn push_blob(&self, name: &str, blob: &[u8]) {
        let (status, head) = self.request("POST", &format!("/v2/{name}/blobs/uploads/"), "text/plain", b"");
        assert_eq!(status, 202, "{head}");
        let location =
            head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap().trim().to_owned();
        let path = &location[location.find("/v2/").unwrap()..];
        let path = format!("{path}{}digest={}", if path.contains('?') { '&' } else { '?' }, digest(blob));
        let (status, head) = self.request("PUT", &path, "application/octet-stream", blob);
        assert_eq!(status, 201, "{head}");
    }

    pub(crate) fn push_manifest(&self, name: &str, reference: &str, manifest: &[u8], media_type: &str) {
        let path = format!("/v2/{name}/manifests/{reference}");
        let (status, head) = self.request("PUT", &path, media_type, manifest);
        assert_eq!(status, 201, "{head}");
    }

    fn request(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\nConnection: \
             close\r\n\r\n",
            self.host(),
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer).into_owned();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        (status, text)
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
