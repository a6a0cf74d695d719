use std::fs;
use std::time::Duration;

use hull_images::store::PullErrorKind;

use crate::TestStore;
use crate::image::{Layer, OCI_MANIFEST, Packing, TestImage, digest};
use crate::server::{Reply, Request, Server};

fn image() -> TestImage {
    TestImage::new(vec![Layer::noise("a", 200_000, 1), Layer::new(&[("b", b"b")], Packing::Gzip)])
}

/// A store whose registry.test is `server`, with these mirrors before it.
fn store_with(mirrors: &[&Server], server: &Server) -> TestStore {
    let test = TestStore::new();
    let directory = test.directory.path().join("certs.d/registry.test");
    fs::create_dir_all(&directory).unwrap();
    let mut text = format!("server = \"http://{}\"\n", server.host());
    for mirror in mirrors {
        text.push_str(&format!("[host.\"http://{}\"]\n", mirror.host()));
    }
    fs::write(directory.join("hosts.toml"), text).unwrap();
    test
}

/// A mirror that answers some requests in its own way.
async fn mirror(
    image: &TestImage,
    special: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    Server::start(&[("app:1", image)], special).await
}

/// Another blob of the same length.
fn damaged(blob: &[u8]) -> Vec<u8> {
    let mut damaged = blob.to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    damaged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_wrong_at_a_mirror_comes_from_the_next() {
    let image = image();
    let layer = image.layers[0].blob.clone();
    let part = digest(&layer);
    let longer = [layer.as_slice(), b"more"].concat();
    let replies = [
        Reply::ok(damaged(&layer)),
        Reply::ok(&layer[..1000]),
        Reply::ok(longer),
        Reply::ok("<html>please log in</html>"),
        Reply::ok(damaged(&layer)).endless(),
        Reply::new(404, ""),
        Reply::new(403, ""),
    ];
    for (number, reply) in replies.into_iter().enumerate() {
        let part = part.clone();
        let first =
            mirror(&image, move |request| request.target.contains(&part).then(|| reply.clone())).await;
        let server = mirror(&image, |_| None).await;
        let test = store_with(&[&first], &server);
        let pulled =
            test.pull("registry.test/app:1").await.unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_eq!(pulled.id, image.id());
        // A second time when the first one went on from what the mirror had sent.
        assert!(
            (1..=2).contains(&server.count("GET", "/blobs/")),
            "{number}: only what the mirror had wrong"
        );
        assert!(test.store.check(false, |_| true).unwrap().problems.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_wrong_everywhere_fails_with_the_last_reason() {
    let image = image();
    let layer = image.layers[0].blob.clone();
    let part = digest(&layer);
    let wrong = move |request: &Request| request.target.contains(&part).then(|| Reply::ok(damaged(&layer)));
    let (first, server) = (mirror(&image, wrong.clone()).await, mirror(&image, wrong).await);
    let test = store_with(&[&first], &server);
    let error = test.pull("registry.test/app:1").await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Invalid);
    assert!(error.to_string().contains("digest"), "{error}");
    test.assert_nothing_left();
    let part = digest(&image.layers[0].blob);
    assert_eq!((first.count("GET", &part), server.count("GET", &part)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_that_are_wrong_at_a_mirror_come_from_the_next() {
    let image = image();
    let other = TestImage::new(vec![]);
    for part in ["/manifests/".to_owned(), digest(&image.config)] {
        let (named, wrong) = (digest(&image.manifest), other.manifest.clone());
        let first = mirror(&image, move |request| {
            let reply = Reply::ok(wrong.clone()).header("Docker-Content-Digest", &named);
            request.target.contains(&part).then(|| reply.header("Content-Type", OCI_MANIFEST))
        })
        .await;
        let server = mirror(&image, |_| None).await;
        let test = store_with(&[&first], &server);
        assert_eq!(test.pull("registry.test/app:1").await.unwrap().id, image.id());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_copy_that_came_at_the_same_time_does_not_spoil_the_right_one() {
    let image = image();
    let layer = image.layers[0].blob.clone();
    let part = digest(&layer);
    let wrong = Server::start(&[("app:1", &image)], move |request| {
        request
            .target
            .contains(&part)
            .then(|| Reply::ok(damaged(&layer)).paced(20_000, Duration::from_millis(20)))
    })
    .await;
    let right = mirror(&image, |_| None).await;
    let test = TestStore::new();
    let names = [format!("{}/app:1", wrong.host()), format!("{}/app:1", right.host())];
    let (first, second) = tokio::join!(test.pull(&names[0]), async {
        // When the other one is under way, so that this one joins it.
        tokio::time::sleep(Duration::from_millis(60)).await;
        test.pull(&names[1]).await
    });
    first.unwrap_err();
    assert_eq!(second.unwrap().id, image.id());
    assert!(test.store.check(false, |_| true).unwrap().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_drips_is_left_for_the_next() {
    let image = image();
    let part = digest(&image.layers[0].blob);
    let blob = image.layers[0].blob.clone();
    let drip = move |request: &Request| {
        let reply = Reply::range_of(&blob, request).paced(1, Duration::from_millis(20));
        request.target.contains(&part).then_some(reply)
    };
    let first = mirror(&image, drip.clone()).await;
    let server = mirror(&image, |_| None).await;
    let test = store_with(&[&first], &server);
    assert_eq!(test.pull("registry.test/app:1").await.unwrap().id, image.id());
    // Where there is no other, it ends all the same.
    let alone = mirror(&image, drip).await;
    let error = TestStore::new().pull(&format!("{}/app:1", alone.host())).await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Unavailable);
    assert!(error.to_string().contains("it sent only"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_drips_is_given_up() {
    let image = image();
    let manifest = image.manifest.clone();
    let server = Server::start(&[("app:1", &image)], move |request| {
        let reply = Reply::ok(manifest.clone()).paced(1, Duration::from_millis(20));
        request.target.contains("/manifests/").then_some(reply)
    })
    .await;
    let error = TestStore::new().pull(&format!("{}/app:1", server.host())).await.unwrap_err();
    assert!(error.to_string().contains("it sent only"), "{error}");
}
