use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::TestStore;
use crate::docker_registry::DockerRegistry;
use crate::hosts::{certificates, write_hosts};
use crate::image::{Layer, Packing, TestImage};
use crate::server::Server;

fn image() -> TestImage {
    let noise = (1..=4).map(|seed| Layer::noise("a", 300_000, seed));
    TestImage::new(noise.chain([Layer::new(&[("b", b"b")], Packing::Zstd)]).collect())
}

/// docker-registry behind TLS with this image as app:1, for 127.0.0.1 and registry.test.
fn tls_registry(certificates_in: &Path, image: &TestImage) -> DockerRegistry {
    certificates(certificates_in);
    let path = certificates_in.display();
    let registry = DockerRegistry::start();
    registry.push("app", "1", image);
    registry
        .restart_with(&format!("  tls:\n    certificate: {path}/server.pem\n    key: {path}/server.key\n"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_can_is_spoken_to_by_http_2() {
    let directory = tempfile::tempdir().unwrap();
    let image = image();
    let registry = tls_registry(directory.path(), &image);
    let test = TestStore::new();
    let ca = directory.path().join("ca.pem");
    let text = format!("server = \"https://{}\"\nca = \"{}\"\n", registry.host(), ca.display());
    write_hosts(&test, &registry.host(), &text);
    assert_eq!(test.pull(&format!("{}/app:1", registry.host())).await.unwrap().id, image.id());
    let log = registry.access_log();
    assert!(log.contains("/blobs/"), "{log}");
    assert!(log.lines().all(|line| !line.contains("HTTP/1.1")) && log.contains("HTTP/2.0"), "{log}");
}

/// A proxy that knows one way only: every CONNECT leads to `upstream`.
async fn connect_proxy(upstream: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (upstream, counted) = (upstream.clone(), counted.clone());
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.ok()?;
                let is_wanted = line.starts_with("CONNECT registry.test:443 ");
                while line.trim() != "" {
                    line.clear();
                    stream.read_line(&mut line).await.ok()?;
                }
                if !is_wanted {
                    return stream.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await.ok();
                }
                counted.fetch_add(1, Ordering::SeqCst);
                let mut upstream = TcpStream::connect(upstream).await.ok()?;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
                tokio::io::copy_bidirectional(&mut stream, &mut upstream).await.ok()?;
                Some(())
            });
        }
    });
    (address, asked)
}

/// Pulls registry.test/app:1 in a process with these variables; what it printed, and whether it succeeded.
async fn pull_with(variables: &[(&str, &str)], hosts: &str) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--ignored", "--nocapture", "connections::pull_in_this_environment"]);
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.envs(variables.iter().copied()).env("HULL_TEST_HOSTS", hosts);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by others in an environment of their own"]
async fn pull_in_this_environment() {
    let test = TestStore::new();
    write_hosts(&test, "registry.test", &std::env::var("HULL_TEST_HOSTS").unwrap());
    test.pull("registry.test/app:1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encrypted_registry_is_reached_through_the_environments_proxy() {
    let directory = tempfile::tempdir().unwrap();
    let registry = tls_registry(directory.path(), &image());
    let (proxy, asked) = connect_proxy(registry.host()).await;
    let ca = directory.path().join("ca.pem");
    let hosts = format!("server = \"https://registry.test\"\nca = \"{}\"\n", ca.display());
    let proxy = format!("http://{proxy}");
    let (ok, text) = pull_with(&[("HTTPS_PROXY", &proxy)], &hosts).await;
    assert!(ok, "{text}");
    let connections = asked.load(Ordering::SeqCst);
    assert!(connections >= 1);
    // Whom NO_PROXY names is asked directly; there is nobody of that name.
    let (ok, text) = pull_with(&[("HTTPS_PROXY", &proxy), ("NO_PROXY", "registry.test")], &hosts).await;
    assert!(!ok && text.contains("registry.test"), "{text}");
    assert_eq!(asked.load(Ordering::SeqCst), connections);
    // A proxy that refuses is named as the reason.
    let (ok, text) = pull_with(&[("HTTPS_PROXY", "http://127.0.0.1:1")], &hosts).await;
    assert!(!ok && text.contains("registry.test"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_registry_is_reached_through_the_environments_proxy() {
    // The proxy is the registry: it gets the whole address.
    let server = Server::start(&[("app:1", &image())], |_| None).await;
    let proxy = format!("http://{}", server.host());
    let hosts = "server = \"http://registry.test\"\n";
    let (ok, text) = pull_with(&[("HTTP_PROXY", &proxy)], hosts).await;
    assert!(ok, "{text}");
    assert!(server.count("GET", "/blobs/") >= 5);
    assert!(server.requests().iter().all(|seen| seen.header("host") == "registry.test"));
    let before = server.requests().len();
    let (ok, _) = pull_with(&[("HTTP_PROXY", &proxy), ("NO_PROXY", ".test,other")], hosts).await;
    assert!(!ok);
    assert_eq!(server.requests().len(), before);
}
