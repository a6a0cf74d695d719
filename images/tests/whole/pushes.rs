use std::process::Command;
use std::time::Duration;

use hull_images::Image;
use hull_images::store::{PushError, PushOptions, PushProgress};

use crate::docker_registry::DockerRegistry;
use crate::hosts::write_hosts;
use crate::image::{Layer, Packing, TestImage, digest};
use crate::server::{Reply, Server};
use crate::{TestStore, reference};

fn image() -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::noise("noise", 20 << 20, 7),
        Layer::new(&[("srv/a", b"a")], Packing::Zstd),
    ])
}

async fn push(test: &TestStore, name: &str, target: &str) -> (String, usize, usize) {
    let (mut existing, mut sent) = (0, 0);
    let target = reference(target);
    let pushed = test.store.push(name, &target, PushOptions::default(), |progress| match progress {
        PushProgress::Exists(_) => existing += 1,
        PushProgress::Done(_) => sent += 1,
        PushProgress::Sent(..) => {}
    });
    (pushed.await.unwrap().digest.to_string(), existing, sent)
}

fn same(one: &Image, other: &Image) {
    assert_eq!((&one.id, &one.config.raw), (&other.id, &other.config.raw));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_registry_has_is_not_sent_again_and_the_digest_stays() {
    let registry = DockerRegistry::start();
    let original = image();
    let name = registry.push("team/app", "v1", &original);
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    let whole = digest(&original.manifest);
    let here = format!("{}/team/app:v2", registry.host());
    assert_eq!(push(&test, &name, &here).await, (whole.clone(), 3, 0));
    // Another repository takes the layers over.
    let there = format!("{}/other/copy:1", registry.host());
    assert_eq!(push(&test, &name, &there).await, (whole, 3, 0));
    for target in [&here, &there] {
        let fresh = TestStore::new();
        same(&fresh.pull(target).await.unwrap(), &test.store.find(&name).unwrap().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_registry_gets_the_same_image_with_layers_compressed_anew() {
    let (from, to) = (DockerRegistry::start(), DockerRegistry::start());
    let name = from.push("team/app", "v1", &image());
    let test = TestStore::new();
    let pulled = test.pull(&name).await.unwrap();
    let target = format!("{}/elsewhere:1", to.host());
    let (digest, existing, sent) = push(&test, &name, &target).await;
    assert_eq!((existing, sent), (0, 3));
    let fresh = TestStore::new();
    let again = fresh.pull(&target).await.unwrap();
    same(&again, &pulled);
    assert!(again.repo_digests[0].ends_with(&digest), "{:?} {digest}", again.repo_digests);
    assert_eq!(fresh.store.check(false, |_| true).unwrap().problems, []);
    let skopeo = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", &format!("docker://{target}")])
        .output()
        .unwrap();
    assert!(skopeo.status.success(), "{skopeo:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_refuses_says_why() {
    let original = image();
    let from = Server::start(&[("team/app:v1", &original)], |_| None).await;
    let name = format!("{}/team/app:v1", from.host());
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    let refusing = Server::start(&[], |request| {
        (request.method == "POST")
            .then(|| Reply::new(403, r#"{"errors":[{"code":"DENIED","message":"read only"}]}"#))
    })
    .await;
    let target = reference(&format!("{}/team/app:v1", refusing.host()));
    let error = test.store.push(&name, &target, PushOptions::default(), |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("403") && error.to_string().contains("read only"), "{error}");
    let error = test.store.push("no/such", &target, PushOptions::default(), |_| {}).await.unwrap_err();
    assert!(matches!(error, PushError::NoImage(_)));
}

/// Signatures and pins name a digest: it stays where that is asked for, although no blob was kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exact_push_passes_on_the_blobs_that_the_image_came_with() {
    let (from, to) = (DockerRegistry::start(), DockerRegistry::start());
    let original = TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::noise("noise", 20 << 20, 8),
        Layer::new(&[("srv/a", b"a")], Packing::Plain),
        Layer::new(&[("srv/b", b"b")], Packing::Zstd),
    ]);
    let name = from.push("team/app", "v1", &original);
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    let target = reference(&format!("{}/elsewhere:1", to.host()));
    let exact = || PushOptions { exact: true, ..PushOptions::default() };
    let pushed = test.store.push(&name, &target, exact(), |_| {}).await.unwrap();
    assert_eq!((pushed.digest.to_string(), pushed.came_with), (digest(&original.manifest), None));
    let fresh = TestStore::new();
    let again = fresh.pull(&target.to_string()).await.unwrap();
    same(&again, &test.store.find(&name).unwrap().unwrap());
    assert!(again.repo_digests[0].ends_with(&digest(&original.manifest)), "{:?}", again.repo_digests);

    // Otherwise it is said what becomes of the digest
    let other_registry = DockerRegistry::start();
    let other = reference(&format!("{}/again:1", other_registry.host()));
    let pushed = test.store.push(&name, &other, PushOptions::default(), |_| {}).await.unwrap();
    assert_eq!(pushed.came_with.unwrap().to_string(), digest(&original.manifest));

    // Where it came from is gone: an error and no other image
    drop(from);
    let third = DockerRegistry::start();
    let target = reference(&format!("{}/third:1", third.host()));
    let error = test.store.push(&name, &target, exact(), |_| {}).await.unwrap_err();
    assert!(
        matches!(error, PushError::NotExact { .. }) && error.to_string().contains("as it came"),
        "{error}"
    );
    assert!(TestStore::new().pull(&target.to_string()).await.is_err());
}

/// The digest of a configuration is the image's id, by whichever algorithm its manifest names it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_digests_are_sha512_keeps_its_id_and_digest_everywhere() {
    let original = image().with_sha512_digests();
    let server = Server::start(&[("team/app:v1", &original)], |_| None).await;
    let name = format!("{}/team/app:v1", server.host());
    let test = TestStore::with(|config| config.keep_blobs = true);
    let pulled = test.pull(&name).await.unwrap();
    assert!(pulled.id == original.id() && pulled.id.starts_with("sha512:"), "{}", pulled.id);
    let registry = DockerRegistry::start();
    for (tag, exact) in [("exact", true), ("as-it-comes", false)] {
        let target = reference(&format!("{}/{tag}:1", registry.host()));
        let options = PushOptions { exact, ..PushOptions::default() };
        let pushed = test.store.push(&name, &target, options, |_| {}).await.unwrap();
        assert_eq!(pushed.digest.to_string(), digest(&original.manifest), "{tag}");
        same(&TestStore::new().pull(&target.to_string()).await.unwrap(), &pulled);
    }
    // A file keeps it likewise, whether its layers are as they were compressed or not.
    for exact in [true, false] {
        let saving = match exact {
            true => test.store.save_exactly(std::slice::from_ref(&name), &[None]).await.unwrap(),
            false => test.store.save(std::slice::from_ref(&name)).unwrap(),
        };
        let path = test.directory.path().join("saved.tar");
        let out = std::fs::File::create(&path).unwrap();
        tokio::task::spawn_blocking(move || saving.write(out)).await.unwrap().unwrap();
        let elsewhere = TestStore::new();
        let mut loaded = Vec::new();
        let file = std::fs::File::open(&path).unwrap();
        elsewhere.store.load(file, |image| loaded.push(image.clone())).unwrap();
        same(&loaded[0], &pulled);
    }
}

/// An origin that sends something else is found out before the registry is told that it is the layer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exact_push_trusts_no_origin() {
    let original = image();
    let lying = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let lies = lying.clone();
    let blob = digest(&original.layers[0].blob);
    let length = original.layers[0].blob.len();
    let from = Server::start(&[("team/app:v1", &original)], move |request| {
        let lie = lies.load(std::sync::atomic::Ordering::SeqCst) && request.target.contains(&blob);
        lie.then(|| Reply::new(200, "x".repeat(length)))
    })
    .await;
    let name = format!("{}/team/app:v1", from.host());
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    lying.store(true, std::sync::atomic::Ordering::SeqCst);
    let to = DockerRegistry::start();
    let target = reference(&format!("{}/elsewhere:1", to.host()));
    let exact = PushOptions { exact: true, ..PushOptions::default() };
    let error = test.store.push(&name, &target, exact, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("something else"), "{error}");
    assert!(TestStore::new().pull(&target.to_string()).await.is_err());

    // A mirror of the origin that has it right, asked after the one that lies
    let right = Server::start(&[("team/app:v1", &original)], |_| None).await;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{0}\"]\n[host.\"http://{}\"]\n",
        from.host(),
        right.host()
    );
    write_hosts(&test, &from.host(), &text);
    let exact = PushOptions { exact: true, ..PushOptions::default() };
    let pushed = test.store.push(&name, &target, exact, |_| {}).await.unwrap();
    assert_eq!(pushed.digest.to_string(), digest(&original.manifest));
    assert_eq!(right.count("GET", "/blobs/"), 1, "only what the other had wrong");
}

/// Registries do not agree on how to go on in the middle of a chunk, so the layer is sent anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_cut_off_is_made_again() {
    let original = image();
    let from = Server::start(&[("team/app:v1", &original)], |_| None).await;
    let name = format!("{}/team/app:v1", from.host());
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    let to = DockerRegistry::start();
    let proxy = CuttingProxy::start(&to.host(), 9 << 20, Duration::ZERO);
    let target = format!("{}/elsewhere:1", proxy.host());
    let (_, _, sent) = push(&test, &name, &target).await;
    assert_eq!((sent, proxy.cuts()), (3, 1));
    let fresh = TestStore::new();
    same(&fresh.pull(&target).await.unwrap(), &test.store.find(&name).unwrap().unwrap());
}

/// A slow line is not a registry that says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_may_take_longer_than_a_registry_may_be_silent() {
    let original = TestImage::new(vec![Layer::noise("noise", 9 << 20, 9)]);
    let from = Server::start(&[("team/app:v1", &original)], |_| None).await;
    let name = format!("{}/team/app:v1", from.host());
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    let to = DockerRegistry::start();
    // A chunk of 8 MiB takes twice the progress timeout.
    let proxy = CuttingProxy::start(&to.host(), usize::MAX, Duration::from_millis(11));
    let target = format!("{}/elsewhere:1", proxy.host());
    let (_, _, sent) = push(&test, &name, &target).await;
    assert_eq!(sent, 1);
    let fresh = TestStore::new();
    let again = fresh.pull(&format!("{}/elsewhere:1", to.host())).await.unwrap();
    same(&again, &test.store.find(&name).unwrap().unwrap());
}

/// Passes connections on to a registry, with a pause after every 64 KiB, and cuts the first that has sent so many bytes.
struct CuttingProxy {
    address: std::net::SocketAddr,
    cuts: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl CuttingProxy {
    fn start(to: &str, after: usize, pause: Duration) -> Self {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let cuts = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (to, counter) = (to.to_owned(), cuts.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, std::net::TcpStream::connect(&to)) else { continue };
                let (mut back, mut answers) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut back);
                    let _ = back.shutdown(std::net::Shutdown::Both);
                });
                let counter = counter.clone();
                std::thread::spawn(move || pass_on(client, server, after, pause, &counter));
            }
        });
        Self { address, cuts }
    }

    fn host(&self) -> String {
        self.address.to_string()
    }

    fn cuts(&self) -> usize {
        self.cuts.load(std::sync::atomic::Ordering::SeqCst)
    }
}

fn pass_on(
    mut client: std::net::TcpStream,
    mut server: std::net::TcpStream,
    after: usize,
    pause: Duration,
    cuts: &std::sync::atomic::AtomicUsize,
) {
    use std::io::{Read, Write};
    let (mut sent, mut buffer) = (0, vec![0; 64 << 10]);
    while let Ok(length @ 1..) = client.read(&mut buffer) {
        sent += length;
        if sent > after && cuts.fetch_max(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            let _ = client.shutdown(std::net::Shutdown::Both);
            let _ = server.shutdown(std::net::Shutdown::Both);
            return;
        }
        if server.write_all(&buffer[..length]).is_err() {
            return;
        }
        // Pieces may be small; the pause is for 64 KiB.
        std::thread::sleep(pause.mul_f64(length as f64 / buffer.len() as f64));
    }
}
