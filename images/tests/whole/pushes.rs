use std::process::Command;

use hull_images::Image;
use hull_images::store::{PushError, PushProgress};

use crate::docker_registry::DockerRegistry;
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
    let digest = test.store.push(name, &target, None, |progress| match progress {
        PushProgress::Exists(_) => existing += 1,
        PushProgress::Done(_) => sent += 1,
        PushProgress::Sent(..) => {}
    });
    (digest.await.unwrap().to_string(), existing, sent)
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
    let error = test.store.push(&name, &target, None, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("403") && error.to_string().contains("read only"), "{error}");
    let error = test.store.push("no/such", &target, None, |_| {}).await.unwrap_err();
    assert!(matches!(error, PushError::NoImage(_)));
}
