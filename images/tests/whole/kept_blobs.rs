use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use hull_images::store::{PushError, PushOptions, SaveError};

use crate::docker_registry::DockerRegistry;
use crate::image::{Layer, Packing, TestImage, digest};
use crate::server::{Reply, Server};
use crate::{TestStore, files, reference};

fn keeping() -> TestStore {
    TestStore::with(|config| config.keep_blobs = true)
}

fn image() -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::noise("noise", 3 << 20, 21),
        Layer::new(&[("srv/a", b"a")], Packing::Plain),
        Layer::new(&[("srv/b", b"b")], Packing::Zstd),
    ])
}

fn blob_path(test: &TestStore, layer: &Layer) -> PathBuf {
    test.root().join("blobs/sha256").join(&digest(&layer.blob)[7..])
}

/// The names of all kept blobs; nothing else is beside them.
fn kept(test: &TestStore) -> Vec<String> {
    assert_eq!(files(&test.root().join("blobs")), ["sha256", "sha512"]);
    assert_eq!(files(&test.root().join("blobs/sha512")), Vec::<String>::new());
    files(&test.root().join("blobs/sha256"))
}

/// The same for these layers, as it should be.
fn names(layers: &[&Layer]) -> Vec<String> {
    let mut names: Vec<String> = layers.iter().map(|layer| digest(&layer.blob)[7..].to_owned()).collect();
    names.sort();
    names
}

/// One bit.
fn damage(path: &PathBuf) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 20).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 20).unwrap();
}

async fn push_exactly(test: &TestStore, name: &str, target: &str) -> Result<String, PushError> {
    let exact = PushOptions { exact: true, ..PushOptions::default() };
    let pushed = test.store.push(name, &reference(target), exact, |_| {}).await?;
    Ok(pushed.digest.to_string())
}

async fn save_exactly(test: &TestStore, name: &str) -> Result<PathBuf, SaveError> {
    let saving = test.store.save_exactly(&[name.to_owned()], &[None]).await?;
    let path = test.directory.path().join("exact.tar");
    let out = File::create(&path).unwrap();
    tokio::task::spawn_blocking(move || saving.write(out)).await.unwrap()?;
    Ok(path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_with_kept_blobs_keeps_its_digest_when_its_registry_is_gone() {
    let registry = DockerRegistry::start();
    let original = image();
    let name = registry.push("team/app", "v1", &original);
    let test = keeping();
    test.pull(&name).await.unwrap();
    drop(registry);
    // What was not compressed can be made again.
    let [gzip, noise, _, zstd] = &original.layers[..] else { panic!("four layers") };
    assert_eq!(kept(&test), names(&[gzip, noise, zstd]));
    for layer in [gzip, noise, zstd] {
        assert!(fs::read(blob_path(&test, layer)).unwrap() == layer.blob, "{}", layer.media_type);
    }

    let to = DockerRegistry::start();
    let target = format!("{}/elsewhere:1", to.host());
    assert_eq!(push_exactly(&test, &name, &target).await.unwrap(), digest(&original.manifest));
    let pulled = TestStore::new().pull(&target).await.unwrap();
    assert!(pulled.repo_digests[0].ends_with(&digest(&original.manifest)), "{:?}", pulled.repo_digests);

    let path = save_exactly(&test, &name).await.unwrap();
    let there = keeping();
    let mut loaded = Vec::new();
    there.store.load(File::open(&path).unwrap(), |image| loaded.push(image.clone())).unwrap();
    assert_eq!(loaded[0].repo_digests, test.store.find(&name).unwrap().unwrap().repo_digests);
    // A file's blobs are kept likewise.
    assert_eq!(kept(&there), names(&[gzip, noise, zstd]));
    let again = save_exactly(&there, &name).await.unwrap();
    assert!(fs::read(path).unwrap() == fs::read(again).unwrap(), "two exact saves differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_may_change_the_digest_does_not_with_kept_blobs() {
    let registry = DockerRegistry::start();
    let original = TestImage::new(vec![
        Layer::new(&[("a", b"a")], Packing::Gzip),
        Layer::new(&[("b", b"b")], Packing::Zstd),
    ]);
    let name = registry.push("app", "1", &original);
    let test = keeping();
    test.pull(&name).await.unwrap();
    drop(registry);
    let to = DockerRegistry::start();
    let target = reference(&format!("{}/elsewhere:1", to.host()));
    let pushed = test.store.push(&name, &target, PushOptions::default(), |_| {}).await.unwrap();
    assert_eq!((pushed.digest.to_string(), pushed.came_with), (digest(&original.manifest), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_kept_blob_is_dropped_and_fetched_again() {
    let original = image();
    let (gzip, noise) = (&original.layers[0], &original.layers[1]);
    let server = Server::start(&[("app:1", &original)], |_| None).await;
    let name = format!("{}/app:1", server.host());
    let test = keeping();
    test.pull(&name).await.unwrap();
    let fetched = |layer: &Layer| server.count("GET", &digest(&layer.blob));
    assert_eq!((fetched(gzip), fetched(noise)), (1, 1));

    damage(&blob_path(&test, gzip));
    let to = DockerRegistry::start();
    let target = format!("{}/elsewhere:1", to.host());
    assert_eq!(push_exactly(&test, &name, &target).await.unwrap(), digest(&original.manifest));
    assert_eq!((fetched(gzip), fetched(noise)), (2, 1));
    assert!(!blob_path(&test, gzip).exists() && blob_path(&test, noise).exists());
    TestStore::new().pull(&target).await.unwrap();

    let noise_file = File::options().write(true).open(blob_path(&test, noise)).unwrap();
    noise_file.set_len(1 << 20).unwrap();
    let path = save_exactly(&test, &name).await.unwrap();
    assert_eq!((fetched(gzip), fetched(noise)), (3, 2));
    assert!(!blob_path(&test, noise).exists());
    let there = TestStore::new();
    there.store.load(File::open(path).unwrap(), |_| {}).unwrap();
    assert_eq!(there.store.check(false, |_| true).unwrap().problems, []);

    // Nothing is left to be had: an error and no other image.
    damage(&blob_path(&test, &original.layers[3]));
    drop(server);
    let error = save_exactly(&test, &name).await.unwrap_err();
    assert!(error.to_string().contains("cannot be had again"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_blob_goes_with_the_last_image_that_refers_to_it() {
    let layer = |name: &str| Layer::new(&[(name, &[7; 20_000])], Packing::Gzip);
    let one = TestImage::new(vec![layer("base"), layer("one")]);
    let two = TestImage::new(vec![layer("base"), layer("two")]);
    let server = Server::start(&[("app:1", &one), ("app:2", &two)], |_| None).await;
    let test = keeping();
    let empty = test.store.usage().unwrap();
    let first = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let second = test.pull(&format!("{}/app:2", server.host())).await.unwrap();
    let (base, own, other) = (&one.layers[0], &one.layers[1], &two.layers[1]);
    assert_eq!(kept(&test), names(&[base, own, other]));
    let usage = test.store.blob_usage().unwrap();
    let of_base = usage.iter().find(|blob| blob.digest.to_string() == digest(&base.blob)).unwrap();
    let mut both = vec![first.id.clone(), second.id.clone()];
    both.sort();
    assert_eq!(of_base.images, both);
    assert_eq!(of_base.bytes, fs::metadata(blob_path(&test, base)).unwrap().blocks() * 512);
    assert!(test.store.usage().unwrap().inodes >= empty.inodes + 6, "three layers, three blobs");

    // Not even a container that runs needs the blob.
    let hold = test.store.hold(&first.layers);
    test.store.remove(&first.id).unwrap();
    assert_eq!(kept(&test), names(&[base, other]));
    drop(hold);
    test.store.prune(true, |_| false).unwrap();
    assert_eq!(kept(&test), Vec::<String>::new());
    assert_eq!(test.store.blob_usage().unwrap(), []);
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kept_blobs_go_when_none_is_to_be_kept_any_more() {
    let original = image();
    let server = Server::start(&[("app:1", &original)], |_| None).await;
    let name = format!("{}/app:1", server.host());
    let test = keeping();
    test.pull(&name).await.unwrap();
    assert_eq!(kept(&test).len(), 3);
    let test = test.reopen_with(|config| config.keep_blobs = true);
    assert_eq!(kept(&test).len(), 3);
    let test = test.reopen();
    assert_eq!(kept(&test), Vec::<String>::new());
    assert_eq!(test.store.check(false, |_| true).unwrap().problems, []);
    // Turned on again, what is here is not fetched for the sake of its blob.
    let test = test.reopen_with(|config| config.keep_blobs = true);
    test.pull(&name).await.unwrap();
    assert_eq!(kept(&test), Vec::<String>::new());
    drop(server);
    assert!(matches!(save_exactly(&test, &name).await, Err(SaveError::NotExact { .. })));
    // A store that never kept any has no directory for them.
    let other = TestStore::new();
    assert!(!other.root().join("blobs").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_that_a_crash_left_are_swept_at_open() {
    let original = image();
    let server = Server::start(&[("app:1", &original)], |_| None).await;
    let test = keeping();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let whole = kept(&test);
    let blobs = test.root().join("blobs");
    fs::write(blobs.join(format!("{}.7.tmp", "a".repeat(64))), "half").unwrap();
    fs::write(blobs.join("sha256").join("b".repeat(64)), "renamed, and its image never committed").unwrap();
    fs::write(blobs.join("sha256/stray"), "x").unwrap();
    let problems = test.store.check(false, |_| true).unwrap().problems;
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems.iter().all(|problem| problem.reason.contains("no image needs")), "{problems:?}");
    let test = test.reopen_with(|config| config.keep_blobs = true);
    assert_eq!(kept(&test), whole);
    assert_eq!(test.store.check(false, |_| true).unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_finds_a_damaged_blob_and_takes_it_out_alone() {
    let original = image();
    let server = Server::start(&[("app:1", &original)], |_| None).await;
    let test = keeping();
    let pulled = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let report = test.store.check(false, |_| true).unwrap();
    assert_eq!((report.layers, report.blobs, report.problems), (4, 3, vec![]));
    damage(&blob_path(&test, &original.layers[1]));
    let report = test.store.check(false, |_| true).unwrap();
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    assert_eq!(report.problems[0].subject, digest(&original.layers[1].blob));
    assert!(report.problems[0].images.is_empty(), "its image lacks nothing");
    assert_eq!(kept(&test).len(), 3, "without repair nothing changes");
    test.store.check(true, |_| true).unwrap();
    assert_eq!(kept(&test), names(&[&original.layers[0], &original.layers[3]]));
    assert!(test.store.find(&pulled.id).unwrap().is_some());
    assert_eq!(test.store.check(false, |_| true).unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_blob_stays_that_is_not_what_its_digest_says() {
    let original = image();
    let wrong = digest(&original.layers[1].blob);
    let mut blob = original.layers[1].blob.clone();
    let end = blob.len() - 1000;
    blob[end] ^= 1;
    let server = Server::start(&[("app:1", &original)], move |request| {
        request.target.contains(&wrong).then(|| Reply::ok(blob.clone()))
    })
    .await;
    let test = keeping();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap_err();
    test.assert_nothing_left();
    let blobs = test.root().join("blobs");
    for _ in 0..1500 {
        if files(&blobs).len() == 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(kept(&test), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_comes_in_parts_over_several_connections_is_kept_in_order() {
    let original = TestImage::new(vec![Layer::noise("large", 24 << 20, 31)]);
    let blob = original.layers[0].blob.clone();
    let wanted = digest(&blob);
    let server = Server::start(&[("app:1", &original)], move |request| {
        let slow = || Reply::range_of(&blob, request).paced(64 << 10, Duration::from_millis(8));
        request.target.contains(&wanted).then(slow)
    })
    .await;
    let test = TestStore::with(|config| {
        config.keep_blobs = true;
        config.progress_timeout = Duration::from_secs(60);
    });
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert!(server.most_at_once() > 1);
    let layer = &original.layers[0];
    assert!(fs::read(blob_path(&test, layer)).unwrap() == layer.blob);
}

/// The same layer by two manifests: the second image has the layer, and no blob of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_here_already_gets_no_further_blob() {
    let layer = |packing| Layer::new(&[("same", &[7; 20_000])], packing);
    let (one, two) = (TestImage::new(vec![layer(Packing::Gzip)]), TestImage::new(vec![layer(Packing::Zstd)]));
    let server = Server::start(&[("app:1", &one), ("app:2", &two)], |_| None).await;
    let test = keeping();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    test.pull(&format!("{}/app:2", server.host())).await.unwrap();
    assert_eq!(kept(&test), names(&[&one.layers[0]]));
}
