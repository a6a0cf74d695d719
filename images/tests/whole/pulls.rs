use std::sync::Arc;
use std::time::Duration;

use hull_images::{Credentials, ImageStore, PullErrorKind, PullProgress, StoreError};

use crate::docker_registry::DockerRegistry;
use crate::image::{Layer, OCI_INDEX, OCI_MANIFEST, Packing, TestImage, digest, index};
use crate::server::{Reply, Server};
use crate::{TestStore, config, reference};

fn three_layers() -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::new(&[("bin/true", b"#!/bin/sh\n")], Packing::Zstd),
        Layer::new(&[("srv/a", b"a")], Packing::Plain),
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_gzip_zstd_and_plain_layers_is_pulled_from_a_real_registry() {
    let registry = DockerRegistry::start();
    let image = three_layers();
    let name = registry.push("team/app", "v1", &image);
    let test = TestStore::new();
    let pulled = test.pull(&name).await.unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.repo_tags, [name.as_str()]);
    let by_digest = format!("{}/team/app@{}", registry.host(), digest(&image.manifest));
    assert_eq!(pulled.repo_digests, [by_digest.as_str()]);
    assert_eq!(pulled.config.user, "1000:1000");
    assert_eq!(pulled.config.raw, image.config);
    assert_eq!(pulled.layers.len(), 3);
    assert_eq!(test.layer_files().len(), 3);
    assert!(pulled.size > 3 * 4096 && pulled.pulled_at > 1_600_000_000_000_000_000);
    assert_eq!(test.store.document(&digest(&image.manifest)).unwrap().unwrap(), image.manifest);
    for known in [&image.id(), &image.id()[7..], &image.id()[7..19], &name, &by_digest] {
        assert_eq!(test.store.find(known).unwrap().as_ref(), Some(&pulled), "{known}");
    }
    assert_eq!(test.store.find("sha256:ffff").unwrap(), None);
    assert_eq!(test.store.find("not/here").unwrap(), None);
    assert_eq!(test.store.find("No Name!").unwrap(), None);
    let test = test.reopen();
    assert_eq!(test.store.list().unwrap(), [pulled]);
    let usage = test.store.usage().unwrap();
    assert!(usage.bytes > 3 * 4096 && usage.inodes >= 7 && usage.mountpoint.is_dir());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_gives_the_image_for_this_machine_even_when_nested() {
    let registry = DockerRegistry::start();
    let right = three_layers();
    let wrong = TestImage::new(vec![Layer::new(&[("arm", b"")], Packing::Gzip)]);
    registry.push("multi", "amd64", &right);
    registry.push("multi", "arm64", &wrong);
    let inner = index(&[
        (&wrong.manifest, OCI_MANIFEST, Some("linux/arm64")),
        (&right.manifest, OCI_MANIFEST, Some("linux/amd64")),
    ]);
    registry.push_manifest("multi", "inner", &inner, OCI_INDEX);
    let outer = index(&[(&inner, OCI_INDEX, None)]);
    registry.push_manifest("multi", "latest", &outer, OCI_INDEX);
    let test = TestStore::new();
    let pulled = test.pull(&format!("{}/multi", registry.host())).await.unwrap();
    assert_eq!(pulled.id, right.id());
    assert!(pulled.repo_digests[0].ends_with(&digest(&outer)), "the digest is that of the reference");
    let only_arm = index(&[(&wrong.manifest, OCI_MANIFEST, Some("linux/arm64"))]);
    registry.push_manifest("multi", "arm", &only_arm, OCI_INDEX);
    let error = test.pull(&format!("{}/multi:arm", registry.host())).await.unwrap_err().to_string();
    assert!(error.contains("linux/amd64") && error.contains("linux/arm64"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reference_by_digest_gets_no_tag() {
    let registry = DockerRegistry::start();
    let image = three_layers();
    let tagged = registry.push("app", "v1", &image);
    let by_digest = format!("{}/app@{}", registry.host(), digest(&image.manifest));
    let test = TestStore::new();
    let pulled = test.pull(&by_digest).await.unwrap();
    assert_eq!((pulled.repo_tags.len(), &pulled.repo_digests[..]), (0, &[by_digest.clone()][..]));
    let both = format!("{tagged}@{}", digest(&image.manifest));
    assert_eq!(test.pull(&both).await.unwrap(), pulled);
    assert_eq!(test.store.find(&both).unwrap(), Some(pulled));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_that_moved_leaves_the_old_image_without_it() {
    let old = three_layers();
    let new = TestImage::new(vec![Layer::new(&[("new", b"1")], Packing::Gzip)]);
    let registry = DockerRegistry::start();
    let name = registry.push("app", "v1", &old);
    let test = TestStore::new();
    test.pull(&name).await.unwrap();
    registry.push("app", "v1", &new);
    let pulled = test.pull(&name).await.unwrap();
    assert_eq!(pulled.id, new.id());
    assert_eq!(test.store.find(&name).unwrap().unwrap().id, new.id());
    let before = test.store.find(&old.id()).unwrap().unwrap();
    assert!(before.repo_tags.is_empty() && before.repo_digests.len() == 1);
    registry.push("app", "v1", &old);
    assert_eq!(test.pull(&name).await.unwrap().repo_tags, [name]);
    assert!(test.store.find(&new.id()).unwrap().unwrap().repo_tags.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_here_is_not_downloaded_again() {
    let image = three_layers();
    let mut more = image.layers.clone();
    more.push(Layer::new(&[("more", b"")], Packing::Gzip));
    let bigger = TestImage::new(more);
    let server = Server::start(&[("app:1", &image), ("app:2", &bigger)], |_| None).await;
    let test = TestStore::new();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert_eq!(server.count("GET", "/blobs/"), 4);
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert_eq!((server.count("GET", "/blobs/"), server.count("GET", "/manifests/")), (4, 1));
    let (sender, mut progress) = tokio::sync::mpsc::unbounded_channel();
    let name = reference(&format!("{}/app:2", server.host()));
    test.store.pull(&name, None, Some(sender)).await.unwrap();
    assert_eq!(server.count("GET", "/blobs/"), 6, "the new configuration and the new layer");
    let mut events = Vec::new();
    while let Some(event) = progress.recv().await {
        events.push(event);
    }
    assert!(matches!(&events[0], PullProgress::Resolved { layers, .. } if layers.len() == 4));
    let count = |wanted: fn(&PullProgress) -> bool| events.iter().filter(|event| wanted(event)).count();
    assert_eq!(count(|event| matches!(event, PullProgress::LayerExists { .. })), 3);
    assert_eq!(count(|event| matches!(event, PullProgress::LayerDone { .. })), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_pulls_and_identical_layers_are_downloaded_once() {
    let shared = Layer::noise("shared", 300_000, 1);
    let one = TestImage::new(vec![shared.clone(), Layer::noise("one", 10_000, 2)]);
    let two = TestImage::new(vec![shared.clone(), Layer::noise("two", 10_000, 3)]);
    let part = digest(&shared.blob);
    let slow = part.clone();
    let body = shared.blob.clone();
    let server = Server::start(&[("app:1", &one), ("app:2", &two)], move |request| {
        // Slow enough that all pulls meet: the first attempt is cut, and goes on after the backoff.
        let first = request.target.contains(&slow) && request.offset() == 0;
        first.then(|| Reply::ok(body.clone()).cut_after(1000))
    })
    .await;
    let test = TestStore::new();
    let names = [1, 1, 1, 2, 2].map(|tag| reference(&format!("{}/app:{tag}", server.host())));
    let pulls = names.iter().map(|name| test.store.pull(name, None, None));
    for pulled in futures::future::join_all(pulls).await {
        pulled.unwrap();
    }
    assert_eq!(server.count("GET", "/manifests/"), 2);
    // The server ignores ranges, so each continuation starts over; it can still only be the same one download.
    let downloads =
        server.requests().iter().filter(|seen| seen.target.contains(&part) && seen.offset() == 0).count();
    assert_eq!(downloads, 1);
    assert_eq!(test.layer_files().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_with_other_credentials_is_not_joined() {
    let image = TestImage::new(vec![Layer::noise("a", 200_000, 1)]);
    let (layer, body) = (digest(&image.layers[0].blob), image.layers[0].blob.clone());
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.header("authorization") != "Basic bWU6c2VjcmV0" {
            return Some(Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        request.target.contains(&layer).then(|| Reply::ok(body.clone()).stall_after(100_000))
    })
    .await;
    let test = TestStore::with(|config| config.progress_timeout = Duration::from_secs(60));
    let name = reference(&format!("{}/app:1", server.host()));
    let login = |password: &str| {
        let (username, password) = ("me".to_owned(), password.to_owned());
        Some(Credentials { username, password, ..Credentials::default() })
    };
    let others = async {
        while server.count("GET", &digest(&image.layers[0].blob)) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The image is on its way, for one who may have it.
        for credentials in [None, login("wrong")] {
            let error = test.store.pull(&name, credentials, None).await.unwrap_err();
            assert_eq!(error.kind(), PullErrorKind::Unauthorized, "{error}");
        }
    };
    tokio::select! {
        pulled = test.store.pull(&name, login("secret"), None) => panic!("{pulled:?}"),
        () = others => {}
    }
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_nobody_waits_for_leaves_nothing() {
    let image = TestImage::new(vec![Layer::noise("a", 200_000, 1), Layer::noise("b", 200_000, 2)]);
    let stalled = digest(&image.layers[1].blob);
    let body = image.layers[1].blob.clone();
    let server = Server::start(&[("app:1", &image)], move |request| {
        request.target.contains(&stalled).then(|| Reply::ok(body.clone()).stall_after(100_000))
    })
    .await;
    let test = TestStore::new();
    let name = reference(&format!("{}/app:1", server.host()));
    let first = tokio::spawn({
        let (store, name) = (test.store.clone(), name.clone());
        async move { store.pull(&name, None, None).await }
    });
    let is_stalled = async {
        while test.layer_files().is_empty() || server.count("GET", "/blobs/") < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        pulled = test.store.pull(&name, None, None) => panic!("{pulled:?}"),
        () = is_stalled => {}
    }
    assert!(!test.layer_files().is_empty(), "the other one still pulls");
    first.abort();
    test.assert_nothing_left();
    assert_eq!(server.count("GET", "/manifests/"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_download_goes_on_where_it_was() {
    let image = TestImage::new(vec![Layer::noise("a", 400_000, 9)]);
    let blob = image.layers[0].blob.clone();
    let part = digest(&blob);
    let server = Server::start(&[("app:1", &image)], move |request| {
        if !request.target.contains(&part) {
            return None;
        }
        let offset = request.offset();
        let range = format!("bytes {offset}-{}/{}", blob.len() - 1, blob.len());
        let rest =
            Reply::new(if offset > 0 { 206 } else { 200 }, &blob[offset..]).header("Content-Range", &range);
        Some(if offset < 300_000 { rest.cut_after(150_000) } else { rest })
    })
    .await;
    let test = TestStore::new();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let offsets: Vec<usize> = server
        .requests()
        .iter()
        .filter(|seen| seen.target.contains("/blobs/"))
        .map(|seen| seen.offset())
        .collect();
    assert!(offsets.iter().any(|offset| *offset >= 300_000), "{offsets:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_download_is_given_up_by_progress_and_continued() {
    let image = TestImage::new(vec![Layer::noise("a", 400_000, 9)]);
    let blob = image.layers[0].blob.clone();
    let part = digest(&blob);
    let server = Server::start(&[("app:1", &image)], move |request| {
        let first = request.target.contains(&part) && request.offset() == 0;
        first.then(|| Reply::ok(blob.clone()).stall_after(200_000))
    })
    .await;
    let test = TestStore::new();
    // The server does not serve ranges: what is known already is skipped.
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert_eq!(server.count("GET", "/blobs/"), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overloaded_registry_is_asked_again() {
    let image = three_layers();
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let server = Server::start(&[("app:1", &image)], move |request| {
        if !request.target.contains("/manifests/") {
            return None;
        }
        match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Some(Reply::new(429, "").header("Retry-After", "0")),
            1 => Some(Reply::new(503, "")),
            _ => None,
        }
    })
    .await;
    let test = TestStore::new();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
}

#[test]
fn a_second_daemon_on_the_same_root_is_refused() {
    let test = TestStore::new();
    let second = ImageStore::open(config(test.directory.path()));
    assert!(matches!(second.err(), Some(StoreError::InUse(_))));
}

/// A measurement: `cargo test --release -p hull-images --test whole -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a promise"]
async fn measure_a_pull_of_500_mib() {
    // Half noise, half text: compresses about as binaries do.
    let layer = |seed: u64| {
        let files: Vec<(String, Vec<u8>)> = (0..400)
            .map(|number| {
                let mut bytes = Layer::noise("x", 128 << 10, seed * 1000 + number).blob;
                bytes.resize(128 << 10, 0);
                bytes.extend(format!("line {number}\n").into_bytes().into_iter().cycle().take(128 << 10));
                (format!("usr/lib/{seed}/{number}"), bytes)
            })
            .collect();
        let files: Vec<(&str, &[u8])> =
            files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        Layer::new(&files, Packing::Gzip)
    };
    let image = TestImage::new((1..=5).map(layer).collect());
    let compressed: usize = image.layers.iter().map(|layer| layer.blob.len()).sum();
    let registry = DockerRegistry::start();
    let name = registry.push("big", "1", &image);
    drop(image);
    for _ in 0..3 {
        let test = TestStore::new();
        let started = std::time::Instant::now();
        let image = test.pull(&name).await.unwrap();
        println!(
            "{} MiB compressed, {} MiB on disk: {:?}",
            compressed >> 20,
            image.size >> 20,
            started.elapsed()
        );
    }
}
