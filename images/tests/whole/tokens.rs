use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hull_images::Credentials;
use hull_images::store::PullErrorKind;
use serde_json::json;

use crate::image::{Layer, TestImage, digest};
use crate::server::{Reply, Request, Server};
use crate::{TestStore, reference};

/// A challenge that leads to the server's own token service.
fn challenge(request: &Request, error: &str) -> Reply {
    let realm = format!("http://{}/token", request.header("host"));
    let challenge = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:app:pull\"{error}");
    Reply::new(401, "").header("WWW-Authenticate", &challenge)
}

fn login() -> Option<Credentials> {
    Some(Credentials { username: "me".into(), password: "secret".into(), ..Credentials::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_expires_during_a_long_pull_is_renewed() {
    let layers = (1..=6).map(|seed| Layer::noise("a", 200_000, seed)).collect();
    let image = TestImage::new(layers);
    let blobs: Vec<Vec<u8>> = image.layers.iter().map(|layer| layer.blob.clone()).collect();
    let (issued, used) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = issued.clone();
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.target.starts_with("/token") {
            used.store(0, Ordering::SeqCst);
            let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
            return Some(Reply::ok(json!({"token": format!("t{number}")}).to_string()));
        }
        // Each token is good for four requests.
        let current = format!("Bearer t{}", counted.load(Ordering::SeqCst));
        if request.header("authorization") != current || used.fetch_add(1, Ordering::SeqCst) >= 4 {
            return Some(challenge(request, ",error=\"invalid_token\""));
        }
        // Each layer breaks off once, so that what continues it meets an expired token too.
        let blob = blobs.iter().find(|blob| request.target.contains(&digest(blob)))?;
        let reply = Reply::range_of(blob, request);
        Some(if request.offset() == 0 { reply.cut_after(100_000) } else { reply })
    })
    .await;
    let test = TestStore::with(|config| config.max_parallel_layers = 1);
    let name = reference(&format!("{}/app:1", server.host()));
    assert_eq!(test.store.pull(&name, login(), None).await.unwrap().id, image.id());
    let tokens = issued.load(Ordering::SeqCst);
    assert!((3..=6).contains(&tokens), "{tokens} tokens for 14 requests");
}

/// containerd CVE-2020-15157: whoever stores blobs for a registry asks for the registry's secrets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_a_redirect_leads_to_says_nothing_of_where_secrets_go() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    for asks in ["Bearer realm=\"http://HOST/token\",service=\"x\"", "Basic realm=\"x\""] {
        let elsewhere = Server::start(&[], move |request| {
            let challenge = asks.replace("HOST", request.header("host"));
            Some(Reply::new(401, "").header("WWW-Authenticate", &challenge))
        })
        .await;
        let place = format!("http://{}/stored", elsewhere.host());
        let server = Server::start(&[("app:1", &image)], move |request| {
            request.target.contains("/blobs/").then(|| Reply::redirect(307, &place))
        })
        .await;
        let name = reference(&format!("{}/app:1", server.host()));
        let error = TestStore::new().store.pull(&name, login(), None).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::Unauthorized);
        let seen = elsewhere.requests();
        assert!(!seen.is_empty() && seen.iter().all(|request| request.target == "/stored"), "{seen:?}");
        assert!(seen.iter().all(|request| request.header("authorization").is_empty()), "{seen:?}");
        let told = server.requests();
        assert!(
            told.iter().all(|request| request.header("authorization").is_empty()),
            "nobody asked: {told:?}"
        );
    }
}

/// A registry that stands for another one names its own scopes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_that_is_called_push_is_pulled_with_the_scope_that_its_registry_names() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    let scope = "repository:proxy/prom/pushgateway:pull";
    let server = Server::start(&[("prom/pushgateway:1", &image)], move |request| {
        if request.target.starts_with("/token") {
            let wanted = scope.replace(':', "%3A").replace('/', "%2F");
            let is_it = request.target.contains(&wanted);
            return Some(Reply::ok(json!({"token": if is_it { "right" } else { "wrong" }}).to_string()));
        }
        let realm = format!("http://{}/token", request.header("host"));
        let challenge = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"{scope}\"");
        let is_known = request.header("authorization") == "Bearer right";
        (!is_known).then(|| Reply::new(401, "").header("WWW-Authenticate", &challenge))
    })
    .await;
    let pulled = TestStore::new().pull(&format!("{}/prom/pushgateway:1", server.host())).await.unwrap();
    assert_eq!(pulled.id, image.id());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_is_never_content_with_its_own_tokens_is_given_up() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    let server = Server::start(&[("app:1", &image)], |request| {
        Some(match request.target.starts_with("/token") {
            true => Reply::ok(json!({"token": "good"}).to_string()),
            false => challenge(request, ",error=\"insufficient_scope\""),
        })
    })
    .await;
    let name = reference(&format!("{}/app:1", server.host()));
    let test = TestStore::new();
    let error = test.store.pull(&name, login(), None).await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Unauthorized);
    assert_eq!(server.requests().len(), 3, "the request, the token, the request");
    // Also when it changes its mind in the middle.
    let asked = AtomicUsize::new(0);
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.target.starts_with("/token") {
            return Some(Reply::ok(json!({"token": "good"}).to_string()));
        }
        let is_first = asked.fetch_add(1, Ordering::SeqCst) == 0;
        (is_first || request.target.contains("/blobs/")).then(|| challenge(request, ""))
    })
    .await;
    let name = reference(&format!("{}/app:1", server.host()));
    let error = test.store.pull(&name, login(), None).await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Unauthorized);
    assert!(server.requests().len() < 10);
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn challenges_that_lead_nowhere_end() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    let challenges = [
        "",
        "Negotiate",
        "Bearer",
        "Bearer realm=\"\"",
        "Bearer realm=\"ftp://x/\"",
        "Bearer realm=\"file:///etc/passwd\"",
        "Bearer realm=\"http://127.0.0.1:1/token\"",
        "Basic realm=\"x\", Bearer realm=\"\\",
    ];
    for text in challenges {
        let server = Server::start(&[("app:1", &image)], move |_| {
            Some(Reply::new(401, "").header("WWW-Authenticate", text))
        })
        .await;
        let error = TestStore::new().pull(&format!("{}/app:1", server.host())).await.unwrap_err();
        let kind = error.kind();
        assert!(
            matches!(kind, PullErrorKind::Unauthorized | PullErrorKind::Unavailable),
            "{text}: {kind:?} {error}"
        );
        assert!(server.requests().len() <= 5, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_a_token_service_are_bounded() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    let answers = [
        Reply::ok(vec![b' '; 65536]).endless(),
        Reply::ok("{}"),
        Reply::ok("no json"),
        Reply::ok(json!({"token": ""}).to_string()),
        Reply::ok(json!({"token": "a\r\nX-Other: b"}).to_string()),
        Reply::ok(json!({"token": "x".repeat(100_000)}).to_string()),
        Reply::redirect(302, "http://127.0.0.1:1/token"),
    ];
    for (number, answer) in answers.into_iter().enumerate() {
        let server = Server::start(&[("app:1", &image)], move |request| {
            Some(match request.target.starts_with("/token") {
                true => answer.clone(),
                false => challenge(request, ""),
            })
        })
        .await;
        let name = reference(&format!("{}/app:1", server.host()));
        let error = TestStore::new().store.pull(&name, login(), None).await.unwrap_err();
        assert!(!error.to_string().contains("secret"), "{number}: {error}");
        assert!(server.count("GET", "/token") <= 5, "{number}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_is_always_overloaded_is_given_up_after_as_long_as_it_asks_for() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    for (wait, least) in [("0", 0), ("1", 4)] {
        let server = Server::start(&[("app:1", &image)], move |_| {
            Some(Reply::new(429, r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#).header("Retry-After", wait))
        })
        .await;
        let started = std::time::Instant::now();
        let error = TestStore::new().pull(&format!("{}/app:1", server.host())).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::Unavailable);
        assert!(
            error.to_string().contains("429") && error.to_string().contains("TOOMANYREQUESTS"),
            "{error}"
        );
        assert_eq!(server.requests().len(), 5);
        assert!(started.elapsed().as_secs() >= least, "it waits as it is told to");
    }
}

/// The two tokens of CRI's AuthConfig: one is shown to the registry as it is, the other buys tokens where the registry
/// says (RFC 6749, "Refreshing an Access Token").
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_token_is_shown_and_an_identity_token_is_exchanged() {
    let image = TestImage::new(vec![Layer::noise("a", 1000, 1)]);
    let exchanged = Arc::new(AtomicUsize::new(0));
    let counted = exchanged.clone();
    let server = Server::start(&[("app:1", &image)], move |request| {
        if request.target.starts_with("/token") {
            counted.fetch_add(1, Ordering::SeqCst);
            let form = |pair: &str| request.body.split('&').any(|given| given == pair);
            let right = request.method == "POST"
                && form("grant_type=refresh_token")
                && form("refresh_token=identity")
                && form("service=test");
            let granted = json!({"access_token": "granted"}).to_string();
            return Some(if right { Reply::ok(granted) } else { Reply::new(401, "") });
        }
        match request.header("authorization") {
            "Bearer granted" | "Bearer ready" => None,
            _ => Some(challenge(request, "")),
        }
    })
    .await;
    let name = reference(&format!("{}/app:1", server.host()));
    let pull =
        async |credentials: Credentials| TestStore::new().store.pull(&name, Some(credentials), None).await;
    let shown = Credentials { registry_token: "ready".into(), ..Credentials::default() };
    assert_eq!(pull(shown).await.unwrap().id, image.id());
    assert_eq!(exchanged.load(Ordering::SeqCst), 0, "there is nothing to be exchanged");
    let identity = Credentials { identity_token: "identity".into(), ..Credentials::default() };
    assert_eq!(pull(identity.clone()).await.unwrap().id, image.id());
    assert_eq!(exchanged.load(Ordering::SeqCst), 1);
    // Neither is good for what the other is
    for wrong in [
        Credentials { identity_token: "ready".into(), ..Credentials::default() },
        Credentials { registry_token: "identity".into(), ..Credentials::default() },
    ] {
        let refused = pull(wrong).await.unwrap_err();
        assert_eq!(refused.kind(), PullErrorKind::Unauthorized, "{refused}");
    }
}
