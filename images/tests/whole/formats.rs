use serde_json::{Value, json};

use crate::TestStore;
use crate::docker_registry::DockerRegistry;
use crate::image::{Layer, OCI_INDEX, OCI_MANIFEST, Packing, TestImage, descriptor, digest};
use crate::server::{Reply, Server};

fn image() -> TestImage {
    TestImage::new(vec![Layer::new(&[("a", b"a")], Packing::Gzip)])
}

/// The attestation that buildkit puts beside an image: a manifest whose layer is a statement.
fn attestation(of: &TestImage) -> TestImage {
    let mut statement = Layer::new(&[], Packing::Plain);
    statement.blob = br#"{"predicateType":"https://slsa.dev/provenance/v0.2"}"#.to_vec();
    statement.media_type = "application/vnd.in-toto+json";
    statement.diff_id = digest(&statement.blob);
    let config = json!({"architecture": "unknown", "os": "unknown", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [statement.diff_id]}, "subject": digest(&of.manifest)});
    TestImage::assembled(vec![statement], config.to_string().into_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attestations_signatures_and_other_artifacts_in_an_index_are_passed_over() {
    let registry = DockerRegistry::start();
    let image = image();
    let attestation = attestation(&image);
    registry.push("app", "image", &image);
    registry.push("app", "attestation", &attestation);
    let mut beside = descriptor(OCI_MANIFEST, &attestation.manifest);
    beside["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    beside["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": digest(&image.manifest)});
    let mut right = descriptor(OCI_MANIFEST, &image.manifest);
    right["platform"] = json!({"os": "linux", "architecture": "amd64"});
    for entries in [vec![beside.clone(), right.clone()], vec![right, beside.clone()]] {
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        registry.push_manifest("app", "latest", index.to_string().as_bytes(), OCI_INDEX);
        let test = TestStore::new();
        assert_eq!(test.pull(&format!("{}/app", registry.host())).await.unwrap().id, image.id());
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [beside]});
    registry.push_manifest("app", "alone", index.to_string().as_bytes(), OCI_INDEX);
    let error = TestStore::new().pull(&format!("{}/app:alone", registry.host())).await.unwrap_err();
    assert!(error.to_string().contains("unknown/unknown"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_refers_to_an_image_is_never_asked_for() {
    let image = image();
    // As image-spec 1.1 has it: an artifact type, a subject, annotations, and entries of unknown kinds.
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["subject"] = descriptor(OCI_MANIFEST, b"another");
    manifest["artifactType"] = json!("application/vnd.example+type");
    manifest["annotations"] = json!({"org.opencontainers.image.title": "t"});
    let manifest = manifest.to_string().into_bytes();
    let mut right = descriptor(OCI_MANIFEST, &manifest);
    right["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "artifactType": "application/x",
        "subject": descriptor(OCI_MANIFEST, b"yet another"),
        "manifests": [descriptor("application/vnd.dev.cosign.simplesigning.v1+json", b"s"),
            descriptor("application/vnd.oci.artifact.manifest.v1+json", b"x"), right]});
    let (index, by_digest) = (index.to_string(), digest(&manifest));
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.target.ends_with("/manifests/1") {
            return Some(Reply::ok(index.clone()).header("Content-Type", OCI_INDEX));
        }
        let is_manifest = request.target.contains(&by_digest);
        is_manifest.then(|| Reply::ok(manifest.clone()).header("Content-Type", OCI_MANIFEST))
    })
    .await;
    let test = TestStore::new();
    assert_eq!(test.pull(&format!("{}/app:1", server.host())).await.unwrap().id, image.id());
    assert_eq!(server.requests().len(), 4, "{:?}", server.requests());
    assert_eq!(server.count("GET", "referrers"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_layers_come_from_the_registry_and_from_nowhere_else() {
    let elsewhere = Server::start(&[], |_| Some(Reply::ok("x"))).await;
    for media_type in [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ] {
        let mut image = image();
        image.layers[0].media_type = media_type;
        let mut image = TestImage::assembled(image.layers, image.config);
        let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        manifest["layers"][0]["urls"] = json!([format!("http://{}/layer", elsewhere.host())]);
        image.manifest = manifest.to_string().into_bytes();
        let server = Server::start(&[("app:1", &image)], |_| None).await;
        let test = TestStore::new();
        assert_eq!(test.pull(&format!("{}/app:1", server.host())).await.unwrap().id, image.id());
        let part = digest(&image.layers[0].blob);
        let server = Server::start(&[("app:1", &image)], move |request| {
            request.target.contains(&part).then(|| Reply::new(404, ""))
        })
        .await;
        let test = TestStore::new();
        let error = test.pull(&format!("{}/app:1", server.host())).await.unwrap_err().to_string();
        assert!(error.contains("404") && error.contains(&digest(&image.layers[0].blob)), "{error}");
        test.assert_nothing_left();
    }
    // An address in a manifest is anybody's: nothing is sent there (containerd CVE-2020-15157).
    assert_eq!(elsewhere.requests().len(), 0);
}
