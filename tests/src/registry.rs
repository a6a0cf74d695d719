use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::image::Image;

/// Debian's docker-registry with its own directory, ended with the value.
pub struct Registry {
    process: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Registry {
    pub fn start() -> Registry {
        Registry::start_with(tempfile::tempdir().unwrap(), "")
    }

    /// Ends this one and starts another over the same content, which wants the user `me` with the password `secret`.
    pub fn with_login(mut self) -> Registry {
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        drop(self);
        let path = directory.path().join("htpasswd");
        std::fs::write(&path, "me:$2b$04$j4vNfLg8/hSd4.WfKsHHxeiVi7bR4kWo7XoiwL.IyaJR344gVPWTm\n").unwrap();
        let more = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display());
        Registry::start_with(directory, &more)
    }

    /// `more` goes to the end of the configuration.
    fn start_with(directory: tempfile::TempDir, more: &str) -> Registry {
        let port = free_port();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{more}",
            directory.path().display()
        );
        let path = directory.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts (Debian package docker-registry)");
        let registry = Registry { process, port, directory };
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(started.elapsed() < crate::patience(20), "docker-registry does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// `127.0.0.1:port`, as it stands in an image's name.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Uploads the image and returns its full name, `host/name:tag`.
    pub fn push(&self, name: &str, tag: &str, image: &Image) -> String {
        for blob in image.blobs() {
            self.upload(name, blob);
        }
        self.put_manifest(name, tag, image.manifest(), image.manifest_type());
        format!("{}/{name}:{tag}", self.host())
    }

    fn upload(&self, name: &str, blob: &[u8]) {
        let (status, head) =
            self.request("POST", &format!("/v2/{name}/blobs/uploads/"), "application/octet-stream", b"");
        assert_eq!(status, 202, "{head}");
        let location = head
            .lines()
            .find_map(|line| line.strip_prefix("Location: ").or_else(|| line.strip_prefix("location: ")))
            .expect("an upload has a location")
            .trim();
        let path = location.find("/v2/").map(|at| &location[at..]).expect("a path below /v2/");
        let separator = if path.contains('?') { '&' } else { '?' };
        let digest = crate::image::digest(blob);
        let (status, head) = self.request(
            "PUT",
            &format!("{path}{separator}digest={digest}"),
            "application/octet-stream",
            blob,
        );
        assert_eq!(status, 201, "{head}");
    }

    /// Uploads a manifest as it is, under a tag or a digest.
    pub fn put_manifest(&self, name: &str, reference: &str, manifest: &[u8], media_type: &str) {
        let (status, head) =
            self.request("PUT", &format!("/v2/{name}/manifests/{reference}"), media_type, manifest);
        assert_eq!(status, 201, "{head}");
    }

    fn request(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.host(),
            body.len()
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer).into_owned();
        let status = text.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status line");
        (status, text)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A TCP port on loopback that nobody uses right now.
pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
