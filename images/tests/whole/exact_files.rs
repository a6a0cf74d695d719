//! Files with images as they came, to the digest.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use hull_images::store::{ImageChange, NewImage, SaveError, SaveProgress, Saving};
use hull_images::{Credentials, Image};
use serde_json::{Value, json};

use crate::docker_registry::DockerRegistry;
use crate::image::{Layer, OCI_INDEX, OCI_MANIFEST, Packing, TestImage, digest, index};
use crate::server::{Reply, Server};
use crate::{TestStore, reference};

fn image() -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::noise("noise", 3 << 20, 11),
        Layer::new(&[("srv/a", b"a")], Packing::Plain),
        Layer::new(&[("srv/b", b"b")], Packing::Zstd),
    ])
}

async fn save(
    test: &TestStore,
    names: &[&str],
    login: Option<Credentials>,
    to: &Path,
) -> Result<(), SaveError> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let saving = test.store.save_exactly(&names, &vec![login; names.len()]).await?;
    write(saving, to).await.1
}

/// The layers that were told to be here, and how it ended.
async fn write(saving: Saving, to: &Path) -> (Vec<String>, Result<(), SaveError>) {
    let out = File::create(to).unwrap();
    let writing = move || {
        let mut here = Vec::new();
        let note = |step: SaveProgress| here.extend(step.is_last().then(|| step.layer.to_string()));
        let written = saving.write_and_tell(out, note);
        (here, written)
    };
    tokio::task::spawn_blocking(writing).await.unwrap()
}

fn load(test: &TestStore, path: &Path) -> Vec<Image> {
    let mut images = Vec::new();
    test.store.load(File::open(path).unwrap(), |image| images.push(image.clone())).unwrap();
    images
}

fn skopeo(arguments: &[&str]) -> String {
    let output = Command::new("skopeo").arg("--insecure-policy").args(arguments).output().unwrap();
    assert!(output.status.success(), "skopeo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// No blob was kept, and still the file has every one that the image came with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exact_file_has_every_blob_and_gives_every_digest_back() {
    let registry = DockerRegistry::start();
    let original = image();
    registry.push("team/app", "single", &original);
    let whole = index(&[(&original.manifest, OCI_MANIFEST, Some("linux/amd64"))]);
    registry.push_manifest("team/app", "v1", &whole, OCI_INDEX);
    let name = format!("{}/team/app:v1", registry.host());
    let here = TestStore::new();
    let pulled = here.pull(&name).await.unwrap();
    // By its manifest's own digest, too.
    here.pull(&format!("{}/team/app@{}", registry.host(), digest(&original.manifest))).await.unwrap();
    let file = here.directory.path().join("exact.tar");
    let saving = here.store.save_exactly(std::slice::from_ref(&name), &[None]).await.unwrap();
    let (out, mut told) = (File::create(&file).unwrap(), Vec::new());
    let writing = move || saving.write_and_tell(out, |step| told.push(step)).map(|()| told);
    let told = tokio::task::spawn_blocking(writing).await.unwrap().unwrap();
    // Each that is fetched is told of until it is here; the one that was not compressed is here.
    let whole_ones: Vec<_> = told.iter().filter(|step| step.bytes == step.of).cloned().collect();
    let compressed = original.layers.iter().filter(|layer| !layer.media_type.ends_with(".tar"));
    let expected: Vec<_> = compressed.map(|layer| (digest(&layer.blob), layer.blob.len() as u64)).collect();
    let seen: Vec<_> = whole_ones.iter().map(|step| (step.layer.to_string(), step.bytes)).collect();
    assert_eq!(seen, expected);
    assert!(told.iter().all(|step| step.bytes <= step.of), "{told:?}");

    let there = TestStore::new();
    let loaded = load(&there, &file);
    assert_eq!(loaded.len(), 1);
    let known = here.store.find(&name).unwrap().unwrap();
    assert_eq!((&loaded[0].id, &loaded[0].repo_tags), (&pulled.id, &known.repo_tags));
    assert_eq!(loaded[0].repo_digests, known.repo_digests);
    assert_eq!(known.repo_digests.len(), 2);
    for document in [&whole, &original.manifest] {
        assert_eq!(there.store.document(&digest(document)).unwrap().as_deref(), Some(document.as_slice()));
    }
    assert_eq!(there.store.check(false, |_| true).unwrap().problems, []);

    // Others see the same, by either face.
    let source = format!("oci-archive:{}", file.display());
    let seen: Value = serde_json::from_str(&skopeo(&["inspect", &source])).unwrap();
    assert_eq!(seen["Digest"], digest(&original.manifest));
    let copy = here.directory.path().join("copy");
    skopeo(&["copy", "-q", "--preserve-digests", &source, &format!("dir:{}", copy.display())]);
    for layer in &original.layers {
        let blob = fs::read(copy.join(&digest(&layer.blob)[7..])).unwrap();
        assert!(blob == layer.blob, "{}", layer.media_type);
    }
    let source = format!("docker-archive:{}", file.display());
    let seen: Value = serde_json::from_str(&skopeo(&["inspect", "--config", &source])).unwrap();
    assert_eq!(seen["rootfs"]["diff_ids"].as_array().unwrap().len(), 4);

    // What was loaded can be saved and pushed so again, as long as the registry is there.
    let again = there.directory.path().join("again.tar");
    save(&there, &[&name], None, &again).await.unwrap();
    assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap(), "two exact saves differ");
    drop(registry);
    let error = save(&there, &[&name], None, &again).await.unwrap_err();
    assert!(matches!(error, SaveError::NotExact { .. }), "{error}");
    assert!(error.to_string().contains("cannot be had again"), "{error}");
}

/// One image by two manifests: a digest means its own, a tag the one that came last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manifest_in_an_exact_file_is_the_one_asked_for() {
    let registry = DockerRegistry::start();
    let original = image();
    let tag = registry.push("app", "1", &original);
    let mut other: Value = serde_json::from_slice(&original.manifest).unwrap();
    other["annotations"] = json!({"of": "another build"});
    let other = other.to_string().into_bytes();
    registry.push_manifest("app", "other", &other, OCI_MANIFEST);
    let by_digest = |manifest: &[u8]| format!("{}/app@{}", registry.host(), digest(manifest));
    let here = TestStore::new();
    let file = here.directory.path().join("exact.tar");
    let manifest_of = || {
        let source = format!("oci-archive:{}", file.display());
        let seen: Value = serde_json::from_str(&skopeo(&["inspect", &source])).unwrap();
        seen["Digest"].as_str().unwrap().to_owned()
    };
    for (pulled, meant) in
        [(&tag, &original.manifest), (&by_digest(&other), &other), (&tag, &original.manifest)]
    {
        here.pull(pulled).await.unwrap();
        save(&here, &[&tag], None, &file).await.unwrap();
        assert_eq!(manifest_of(), digest(meant), "the tag, after {pulled}");
    }
    save(&here, &[&by_digest(&other)], None, &file).await.unwrap();
    assert_eq!(manifest_of(), digest(&other));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_came_without_a_manifest_has_none_to_keep() {
    let registry = DockerRegistry::start();
    let name = registry.push("app", "1", &image());
    let test = TestStore::new();
    let pulled = test.pull(&name).await.unwrap();
    let layer = Layer::new(&[("new", b"new")], Packing::Plain);
    let new = NewImage {
        created: "2026-11-21T00:00:00Z".into(),
        changes: vec![ImageChange::User("7".into())],
        ..NewImage::default()
    };
    let tag = reference("example.com/new:1");
    test.store.make_image(&pulled.id, layer.blob.as_slice(), &new, Some(&tag)).unwrap();
    let file = test.directory.path().join("exact.tar");
    let error = save(&test, &[&name, "example.com/new:1"], None, &file).await.unwrap_err();
    assert!(
        error.to_string().contains("example.com/new:1 as it came: it came without a manifest"),
        "{error}"
    );
}

/// A registry that now sends something else is not believed, and one that wants a login gets that of the image.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_again_is_verified_and_logged_in_for() {
    let original = image();
    let gzip = digest(&original.layers[0].blob);
    let lies = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let lying = lies.clone();
    let length = original.layers[0].blob.len();
    let server = Server::start(&[("app:1", &original)], move |request| {
        if request.header("authorization") != "Basic bWU6c2VjcmV0" {
            return Some(Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        let is_lie = lying.load(std::sync::atomic::Ordering::SeqCst) && request.target.contains(&gzip);
        is_lie.then(|| Reply::ok(vec![7; length]))
    })
    .await;
    let name = format!("{}/app:1", server.host());
    let login = || {
        let (username, password) = ("me".to_owned(), "secret".to_owned());
        Some(Credentials { username, password, ..Credentials::default() })
    };
    let test = TestStore::new();
    test.store.pull(&reference(&name), login(), None).await.unwrap();
    let file = test.directory.path().join("exact.tar");
    let error = save(&test, &[&name], None, &file).await.unwrap_err();
    assert!(error.to_string().contains("cannot be had again"), "{error}");
    save(&test, &[&name], login(), &file).await.unwrap();
    let there = TestStore::new();
    assert_eq!(load(&there, &file)[0].id, original.id());
    lies.store(true, std::sync::atomic::Ordering::SeqCst);
    let saving = test.store.save_exactly(std::slice::from_ref(&name), &[login()]).await.unwrap();
    let (here, written) = write(saving, &file).await;
    let error = written.unwrap_err();
    assert!(here.is_empty(), "{here:?} was told to be here");
    assert!(error.to_string().contains("something else") && !error.to_string().contains("secret"), "{error}");
}

/// A digest is believed where the archive holds what it names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn digests_that_a_file_lies_about_are_left_out() {
    let test = TestStore::new();
    let (good, other) = (image(), TestImage::new(vec![Layer::new(&[("f", b"x")], Packing::Gzip)]));
    let other_index = index(&[(&other.manifest, OCI_MANIFEST, Some("linux/amd64"))]);
    let work = test.directory.path().join("layout");
    fs::create_dir_all(work.join("blobs/sha256")).unwrap();
    let mut blobs: Vec<&[u8]> = vec![&good.manifest, &other.manifest, &other_index];
    blobs.extend(good.blobs().into_iter().chain(other.blobs()));
    for blob in blobs {
        fs::write(work.join("blobs/sha256").join(&digest(blob)[7..]), blob).unwrap();
    }
    let told = [
        format!("example.com/true@{}", digest(&good.manifest)),
        format!("example.com/missing@sha256:{}", "0".repeat(64)),
        format!("example.com/another@{}", digest(&other.manifest)),
        format!("example.com/index-of-another@{}", digest(&other_index)),
        "example.com/no-digest:1".to_owned(),
        "?".to_owned(),
    ];
    let entry = json!({"mediaType": OCI_MANIFEST, "digest": digest(&good.manifest), "size": good.manifest.len(),
        "annotations": {"io.hull.image.digests": told.join(","), "io.containerd.image.name": "example.com/app:1"}});
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    fs::write(work.join("index.json"), index.to_string()).unwrap();
    let file = test.directory.path().join("layout.tar");
    let packed = Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&work).arg(".").status().unwrap();
    assert!(packed.success());
    let loaded = load(&test, &file);
    assert_eq!(loaded[0].repo_digests, [format!("example.com/true@{}", digest(&good.manifest))]);
    assert_eq!(loaded[0].repo_tags, ["example.com/app:1"]);
}
