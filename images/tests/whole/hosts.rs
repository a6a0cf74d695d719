use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::TestStore;
use crate::docker_registry::DockerRegistry;
use crate::image::{Layer, OCI_MANIFEST, Packing, TestImage, digest};
use crate::server::{Reply, Server};

fn image() -> TestImage {
    TestImage::new(vec![Layer::new(&[("a", b"a")], Packing::Gzip)])
}

pub(crate) fn write_hosts(test: &TestStore, registry: &str, text: &str) {
    let directory = test.directory.path().join("certs.d").join(registry);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("hosts.toml"), text).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_serves_a_registry_that_is_not_there() {
    let image = image();
    let broken = Server::start(&[], |_| Some(Reply::new(404, ""))).await;
    let mirror = Server::start(&[("library/app:1", &image)], |_| None).await;
    let test = TestStore::new();
    let text = format!(
        "server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n  capabilities = [\"pull\", \
         \"resolve\"]\n  [host.\"http://{}\".header]\n    x-team = \"blue\"\n",
        broken.host(),
        mirror.host(),
        mirror.host()
    );
    write_hosts(&test, "docker.io", &text);
    let pulled = test.pull("app:1").await.unwrap();
    assert_eq!(pulled.repo_tags, ["docker.io/library/app:1"], "the name is the registry's, not the mirror's");
    let requests = mirror.requests();
    assert!(
        requests.iter().all(|seen| seen.header("x-team") == "blue" && seen.target.ends_with("?ns=docker.io"))
    );
    assert!(broken.count("GET", "/v2/library/app/manifests/1") == 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_is_away_is_passed_over() {
    let image = image();
    let server = Server::start(&[("app:1", &image)], |_| None).await;
    let test = TestStore::new();
    let text = format!("server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n", server.host());
    write_hosts(&test, "registry.test", &text);
    test.pull("registry.test/app:1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_may_not_resolve_serves_content_only() {
    let image = image();
    let mirror = Server::start(&[("app:1", &image)], |_| None).await;
    let server = Server::start(&[("app:1", &image)], |_| None).await;
    let test = TestStore::new();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n  capabilities = [\"pull\"]\n",
        server.host(),
        mirror.host()
    );
    write_hosts(&test, "registry.test:5000", &text);
    test.pull("registry.test:5000/app:1").await.unwrap();
    assert_eq!((server.count("GET", "/manifests/"), server.count("GET", "/blobs/")), (1, 0));
    assert_eq!((mirror.count("GET", "/manifests/"), mirror.count("GET", "/blobs/")), (0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_for_the_registry_do_not_go_to_a_mirror() {
    let image = image();
    let wants_login = |request: &crate::server::Request| {
        let challenge = Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\"");
        (request.header("authorization") != "Basic bWU6c2VjcmV0").then_some(challenge)
    };
    let mirror = Server::start(&[("app:1", &image)], wants_login).await;
    let server = Server::start(&[("app:1", &image)], wants_login).await;
    let test = TestStore::new();
    write_hosts(
        &test,
        "_default",
        &format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", server.host(), mirror.host()),
    );
    let login =
        hull_images::Credentials { username: "me".into(), password: "secret".into(), ..Default::default() };
    test.store.pull(&"registry.test/app:1".parse().unwrap(), Some(login), None).await.unwrap();
    assert!(mirror.requests().iter().all(|seen| seen.header("authorization").is_empty()));
    assert!(server.requests().iter().any(|seen| !seen.header("authorization").is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_configuration_names_file_and_line() {
    let test = TestStore::new();
    write_hosts(&test, "registry.test", "server = \"https://a\"\nskip_verfy = true\n");
    let error = test.pull("registry.test/app").await.unwrap_err().to_string();
    assert!(
        error.contains("hosts.toml") && error.contains("line 2") && error.contains("skip_verfy"),
        "{error}"
    );
}

/// A listener that has as many connections as it takes: no other one comes about.
fn deaf() -> (SocketAddr, Vec<std::net::TcpStream>, tokio::net::TcpListener) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok();
    let connections = std::iter::from_fn(connect).take(100).collect();
    (address, connections, listener)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_with_a_path_of_its_own_is_asked_there_and_one_that_is_deaf_for_as_long_as_configured() {
    let image = image();
    let (manifest, blobs) = (image.manifest.clone(), image.blobs().into_iter().map(<[u8]>::to_vec));
    let blobs: Vec<_> =
        blobs.map(|blob| (format!("/some/place/app/blobs/{}", digest(&blob)), blob)).collect();
    let mirror = Server::start(&[], move |request| {
        let path = request.target.split('?').next().unwrap();
        if path == "/some/place/app/manifests/1" {
            return Some(Reply::ok(manifest.clone()).header("Content-Type", OCI_MANIFEST));
        }
        blobs.iter().find(|(known, _)| known == path).map(|(_, blob)| Reply::ok(blob.as_slice()))
    })
    .await;
    let (deaf, _connections, _listener) = deaf();
    let test = TestStore::new();
    let text = format!(
        "server = \"http://127.0.0.1:1\"\n[host.\"http://{deaf}\"]\n  dial_timeout = \"200ms\"\n\
         [host.\"http://{}/some/place\"]\n  override_path = true\n",
        mirror.host(),
    );
    write_hosts(&test, "registry.test", &text);
    // Without the configuration it takes three times half a minute.
    let pull = tokio::time::timeout(Duration::from_secs(60), test.pull("registry.test/app:1"));
    assert_eq!(pull.await.expect("the time to connect is as configured").unwrap().id, image.id());
    let requests = mirror.requests();
    assert!(requests.iter().all(|seen| seen.target.starts_with("/some/place/app/")), "{requests:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_wants_a_client_certificate_gets_the_configured_one() {
    let (known, unknown) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates(known.path());
    certificates(unknown.path());
    let path = known.path().display();
    let image = image();
    let registry = DockerRegistry::start();
    registry.push("app", "1", &image);
    let registry = registry.restart_with(&format!(
        "  tls:\n    certificate: {path}/server.pem\n    key: {path}/server.key\n    clientcas:\n      - {path}/ca.pem\n"
    ));
    let name = format!("{}/app:1", registry.host());
    let test = TestStore::new();
    let server = format!("server = \"https://{}\"\nca = \"{path}/ca.pem\"\n", registry.host());
    let with = |client: &Path| {
        let client = client.display();
        format!("{server}client = [[\"{client}/client.pem\", \"{client}/client.key\"]]\n")
    };
    for refused in [server.clone(), with(unknown.path())] {
        write_hosts(&test, &registry.host(), &refused);
        test.pull(&name).await.unwrap_err();
    }
    write_hosts(&test, &registry.host(), &with(known.path()));
    assert_eq!(test.pull(&name).await.unwrap().id, image.id());
}

/// An authority, a server certificate for 127.0.0.1 and registry.test, and a client's, written to `directory` as ca.pem,
/// server.pem, server.key, client.pem and client.key.
pub(crate) fn certificates(directory: &Path) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned(), "registry.test".to_owned()]).unwrap();
    let server = server.signed_by(&key, &authority).unwrap();
    let client_key = KeyPair::generate().unwrap();
    let client = CertificateParams::new(vec!["client".to_owned()]).unwrap();
    let client = client.signed_by(&client_key, &authority).unwrap();
    fs::write(directory.join("client.pem"), client.pem()).unwrap();
    fs::write(directory.join("client.key"), client_key.serialize_pem()).unwrap();
    fs::write(directory.join("ca.pem"), authority.pem()).unwrap();
    fs::write(directory.join("server.pem"), server.pem()).unwrap();
    fs::write(directory.join("server.key"), key.serialize_pem()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_a_private_authority_needs_its_certificate_configured() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path());
    let path = directory.path().display();
    let image = image();
    let registry = DockerRegistry::start();
    registry.push("app", "1", &image);
    let registry = registry
        .restart_with(&format!("  tls:\n    certificate: {path}/server.pem\n    key: {path}/server.key\n"));
    let name = format!("{}/app:1", registry.host());
    // The configuration is read again at each pull.
    let test = TestStore::new();
    let server = format!("server = \"https://{}\"\n", registry.host());
    write_hosts(&test, &registry.host(), &server);
    let error = test.pull(&name).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    for trust in [format!("ca = \"{path}/ca.pem\"\n"), "skip_verify = true\n".to_owned()] {
        write_hosts(&test, &registry.host(), &format!("{server}{trust}"));
        assert_eq!(test.pull(&name).await.unwrap().id, image.id());
        test.store.remove(&name).unwrap();
    }
}
