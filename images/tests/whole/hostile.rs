use hull_images::store::PullErrorKind;
use hull_images::{Credentials, PullError};
use serde_json::json;

use crate::image::{Layer, OCI_INDEX, OCI_MANIFEST, Packing, TestImage, digest, index};
use crate::server::{Reply, Request, Server};
use crate::{TestStore, reference};

fn image() -> TestImage {
    TestImage::new(vec![Layer::noise("a", 200_000, 1), Layer::new(&[("b", b"b")], Packing::Gzip)])
}

/// Pulls `image` from a server with these special answers, and checks that it fails and leaves nothing.
async fn fails(
    image: impl std::borrow::Borrow<TestImage>,
    special: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
) -> PullError {
    let server = Server::start(&[("app:1", image.borrow())], special).await;
    let test = TestStore::new();
    let error = test.pull(&format!("{}/app:1", server.host())).await.unwrap_err();
    test.assert_nothing_left();
    assert!(error.to_string().contains(&format!("{}/app:1", server.host())), "{error}");
    error
}

/// Answers blob `blob` in a special way.
fn blob(blob: &[u8], reply: Reply) -> impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static {
    let part = digest(blob);
    move |request| request.target.contains(&part).then(|| reply.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_with_another_digest_is_refused() {
    let image = image();
    let layer = &image.layers[0].blob;
    let mut other = layer.clone();
    let last = other.len() - 100;
    other[last] ^= 1;
    let error = fails(&image, blob(layer, Reply::ok(other))).await;
    assert!(error.to_string().contains(&digest(layer)), "names the layer: {error}");
    assert_eq!(error.kind(), PullErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_too_short_is_refused() {
    let image = image();
    let layer = &image.layers[0].blob;
    let error = fails(&image, blob(layer, Reply::ok(&layer[..100_000]))).await;
    assert!(error.to_string().contains("layer sha256:"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_announced_longer_is_refused() {
    let image = image();
    let layer = &image.layers[0].blob;
    let error = fails(&image, blob(layer, Reply::ok([layer.as_slice(), b"more"].concat()))).await;
    assert!(error.to_string().contains("more than"), "{error}");
    assert_eq!(error.kind(), PullErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_layer_is_given_up_at_its_size() {
    let image = image();
    let layer = &image.layers[0].blob;
    let error = fails(&image, blob(layer, Reply::ok(layer.clone()).endless())).await;
    assert!(error.to_string().contains("more than") || error.to_string().contains("longer"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_manifests_and_configurations_are_given_up() {
    let image = image();
    let spaces = Reply::ok(vec![b' '; 65536]).endless();
    let error = fails(&image, {
        let spaces = spaces.clone();
        move |request| request.target.contains("/manifests/").then(|| spaces.clone())
    });
    assert!(error.await.to_string().contains("more than 4194304 bytes"));
    let error = fails(&image, blob(&image.config, spaces)).await;
    assert!(error.to_string().contains("more than"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diff_id_that_does_not_match_is_refused() {
    let mut layers = image().layers;
    layers[1].diff_id = digest(b"something else");
    let error = fails(TestImage::new(layers), |_| None).await;
    assert!(error.to_string().contains("uncompressed"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_with_another_digest_is_refused() {
    let image = image();
    let other = TestImage::new(vec![]);
    let named = digest(&image.manifest);
    let error = fails(&image, {
        let (named, manifest) = (named.clone(), other.manifest.clone());
        move |request| {
            let reply = Reply::ok(manifest.clone()).header("Docker-Content-Digest", &named);
            request.target.contains("/manifests/").then(|| reply.header("Content-Type", OCI_MANIFEST))
        }
    });
    assert!(error.await.to_string().contains(&format!("expected {named}")));
    // Also when the reference itself says what it must be.
    let manifest = other.manifest.clone();
    let server = Server::start(&[], move |_| Some(Reply::ok(manifest.clone()))).await;
    let test = TestStore::new();
    let error = test.pull(&format!("{}/app@{named}", server.host())).await.unwrap_err();
    assert!(error.to_string().contains(&format!("expected {named}")), "{error}");
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_climbs_out_fails_the_pull_and_names_the_layer() {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.as_mut_bytes()[..16].copy_from_slice(b"../../etc/evil\0\0");
    header.set_cksum();
    tar.append(&header, &b"x"[..]).unwrap();
    let layer = Layer::of_tar(&tar.into_inner().unwrap(), Packing::Gzip);
    let name = digest(&layer.blob);
    let error = fails(TestImage::new(vec![image().layers[0].clone(), layer]), |_| None).await;
    assert!(error.to_string().contains(&name) && error.to_string().contains(".."), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_compression_is_refused() {
    let mut layer = Layer::new(&[("a", b"a")], Packing::Gzip);
    layer.media_type = "application/vnd.oci.image.layer.v1.tar+lzma";
    let error = fails(TestImage::new(vec![layer]), |_| None).await;
    assert!(error.to_string().contains("lzma"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_that_cannot_run_here_are_refused() {
    let layers = vec![Layer::new(&[("a", b"a")], Packing::Gzip)];
    let config = |os: &str, architecture: &str, count: usize| {
        let diff_ids = vec![layers[0].diff_id.clone(); count];
        let config = json!({"os": os, "architecture": architecture,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        TestImage::assembled(layers.clone(), config.to_string().into_bytes())
    };
    assert!(fails(config("windows", "amd64", 1), |_| None).await.to_string().contains("windows"));
    assert!(fails(config("linux", "s390x", 1), |_| None).await.to_string().contains("s390x"));
    assert!(fails(config("linux", "amd64", 2), |_| None).await.to_string().contains("1 layers"));
    let schema1 = Reply::ok(r#"{"schemaVersion":1,"name":"app","fsLayers":[],"history":[]}"#);
    let error =
        fails(image(), move |request| request.target.contains("/manifests/").then(|| schema1.clone()));
    assert!(error.await.to_string().contains("schema 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_that_lead_nowhere_are_searched_with_a_bound() {
    // Every document is an index of a thousand others that name no platform.
    let leaves: Vec<Vec<u8>> = (0..1000).map(|number| format!("{{\"n\":{number}}}").into_bytes()).collect();
    let empty: Vec<Vec<u8>> = (0..1000)
        .map(|number| format!("{{\"schemaVersion\":2,\"manifests\":[],\"n\":{number}}}").into_bytes())
        .collect();
    for documents in [leaves, empty] {
        let entries: Vec<_> = documents.iter().map(|bytes| (bytes.as_slice(), OCI_INDEX, None)).collect();
        let top = index(&entries);
        let named: std::collections::HashMap<String, Vec<u8>> =
            documents.iter().map(|bytes| (digest(bytes), bytes.clone())).collect();
        let server = Server::start(&[], move |request| {
            let name = request.target.rsplit('/').next().unwrap();
            let body = if name == "1" { Some(&top) } else { named.get(name) };
            body.map(|body| Reply::ok(body.clone()).header("Content-Type", OCI_INDEX))
        })
        .await;
        let test = TestStore::new();
        let error = test.pull(&format!("{}/app:1", server.host())).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::Invalid, "{error}");
        assert!(server.requests().len() < 100);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_exist_is_not_found_in_the_registrys_words() {
    let error = fails(image(), |_| {
        Some(Reply::new(404, r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no\u0007pe"}]}"#))
    });
    let error = error.await;
    assert_eq!(error.kind(), PullErrorKind::NotFound);
    assert!(error.to_string().contains("NAME_UNKNOWN: no pe"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redirects_without_end_are_given_up() {
    let error = fails(image(), |request| Some(Reply::redirect(307, &request.target)));
    assert!(error.await.to_string().contains("redirects without end"));
    let error = fails(image(), |_| Some(Reply::redirect(302, "file:///etc/passwd")));
    assert!(error.await.to_string().contains("redirects"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_is_not_there_is_unavailable() {
    let test = TestStore::new();
    let error = test.pull("127.0.0.1:1/app").await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Unavailable);
    assert!(error.to_string().contains("refused"), "{error}");
}

/// A registry that wants a token for everything. Its own token service is at /token.
async fn token_registry(image: &TestImage, token: &'static str) -> Server {
    Server::start(&[("app:1", image)], move |request| {
        if request.target.starts_with("/token") {
            let by_password = request.header("authorization") == "Basic bWU6c2VjcmV0";
            let by_refresh = request.body.contains("refresh_token=r-e-f");
            return Some(match by_password || by_refresh {
                true => Reply::ok(json!({"access_token": token}).to_string()),
                false => Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}"#),
            });
        }
        if request.header("authorization") == format!("Bearer {token}") {
            return None;
        }
        let realm = format!("http://{}/token", request.header("host"));
        let challenge = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:app:pull\"");
        Some(Reply::new(401, "").header("WWW-Authenticate", &challenge))
    })
    .await
}

fn login(username: &str, password: &str) -> Option<Credentials> {
    Some(Credentials { username: username.into(), password: password.into(), ..Credentials::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_fetched_once_with_the_password_or_the_refresh_token() {
    let image = image();
    for credentials in [
        login("me", "secret"),
        Some(Credentials { identity_token: "r-e-f".into(), ..Credentials::default() }),
    ] {
        let server = token_registry(&image, "t-o-k").await;
        let test = TestStore::new();
        let name = reference(&format!("{}/app:1", server.host()));
        test.store.pull(&name, credentials, None).await.unwrap();
        let tokens: Vec<_> =
            server.requests().into_iter().filter(|seen| seen.target.starts_with("/token")).collect();
        assert_eq!(tokens.len(), 1, "one token serves all requests");
        let asked = format!("{}{}", tokens[0].target, tokens[0].body);
        assert!(asked.contains("service=test") && asked.contains("repository%3Aapp%3Apull"), "{asked}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_or_missing_credentials_are_unauthorized_and_never_shown() {
    let server = token_registry(&image(), "t-o-k").await;
    let test = TestStore::new();
    let name = reference(&format!("{}/app:1", server.host()));
    for credentials in [None, login("me", "wr0ng")] {
        let error = test.store.pull(&name, credentials, None).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::Unauthorized);
        assert!(error.to_string().contains("who are you") && !error.to_string().contains("wr0ng"), "{error}");
    }
    test.store.pull(&name, login("me", "secret"), None).await.unwrap();
    // What is on the node already is still only for those whom the registry lets have it.
    assert!(test.store.pull(&name, None, None).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn basic_authentication_and_registry_tokens_work() {
    let image = image();
    let server = Server::start(&[("app:1", &image)], |request| match request.header("authorization") {
        "Basic bWU6c2VjcmV0" | "Bearer given" => None,
        _ => Some(Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\"")),
    })
    .await;
    let name = reference(&format!("{}/app:1", server.host()));
    let token = Credentials { registry_token: "given".into(), ..Credentials::default() };
    for credentials in [login("me", "secret"), Some(token)] {
        TestStore::new().store.pull(&name, credentials, None).await.unwrap();
    }
    let elsewhere =
        Credentials { server_address: "https://quay.io".into(), ..login("me", "secret").unwrap() };
    let error = TestStore::new().store.pull(&name, Some(elsewhere), None).await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Unauthorized);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_to_another_host_does_not_carry_the_credentials() {
    let image = image();
    let storage = Server::start(&[("app:1", &image)], |_| None).await;
    let elsewhere = storage.host();
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.header("authorization") != "Basic bWU6c2VjcmV0" {
            return Some(Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        let moved =
            request.target.contains("/blobs/").then(|| format!("http://{elsewhere}{}", request.target));
        moved.map(|target| Reply::redirect(307, &target))
    })
    .await;
    let test = TestStore::new();
    let name = reference(&format!("{}/app:1", server.host()));
    test.store.pull(&name, login("me", "secret"), None).await.unwrap();
    let requests = storage.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|seen| seen.header("authorization").is_empty()), "{requests:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failed_layer_ends_the_others() {
    let image = image();
    let (bad, slow) = (digest(&image.layers[1].blob), digest(&image.layers[0].blob));
    let body = image.layers[0].blob.clone();
    let error = fails(&image, move |request| {
        if request.target.contains(&bad) {
            return Some(Reply::new(404, ""));
        }
        request.target.contains(&slow).then(|| Reply::ok(body.clone()).stall_after(1000))
    });
    let error = tokio::time::timeout(std::time::Duration::from_secs(3), error).await.unwrap();
    assert_eq!(error.kind(), PullErrorKind::NotFound);
}
