//! A registry with a certificate authority of its own, and a token service of its own that has the same: Debian's
//! docker-registry, which verifies the tokens, and a token service in Python, which signs them with openssl.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use hull_images::Credentials;
use hull_images::store::{PullErrorKind, PushOptions};

use crate::docker_registry::DockerRegistry;
use crate::hosts::{certificates, write_hosts};
use crate::image::{Layer, Packing, TestImage};
use crate::{TestStore, reference};

/// Says which scopes were asked for, by whom, in a file. Everybody may pull from public/, `me` may do everything.
const SERVICE: &str = r#"
import base64, http.server, json, ssl, subprocess, sys, time, urllib.parse

certificates, keys = sys.argv[1:3]

def coded(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

certificate = ssl.PEM_cert_to_DER_cert(open(keys + "/token.pem").read())
header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(certificate).decode()]}

def token(claims):
    text = coded(json.dumps(header).encode()) + "." + coded(json.dumps(claims).encode())
    sign = ["openssl", "dgst", "-sha256", "-sign", keys + "/token.key"]
    return text + "." + coded(subprocess.run(sign, input=text.encode(), stdout=subprocess.PIPE, check=True).stdout)

class Tokens(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        login = self.headers.get("Authorization")
        with open(keys + "/asked", "a") as asked:
            print(login, *query.get("scope", []), file=asked)
        if login not in (None, "Basic " + base64.b64encode(b"me:secret").decode()):
            return self.answer(401, {"details": "incorrect username or password"})
        access = []
        for scope in query.get("scope", []):
            kind, name = scope.split(":", 1)
            name, actions = name.rsplit(":", 1)
            allowed = ["pull", "push"] if login else ["pull"] if name.startswith("public/") else []
            actions = [action for action in actions.split(",") if action in allowed]
            access.append({"type": kind, "name": name, "actions": actions})
        now = int(time.time())
        claims = {"iss": "hull-test", "sub": "me", "aud": query["service"][0], "iat": now, "nbf": now - 60,
                  "exp": now + 300, "jti": str(now), "access": access}
        self.answer(200, {"token": token(claims), "expires_in": 300})

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Tokens)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificates + "/server.pem", certificates + "/server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
"#;

/// The token service. Ends with the value.
struct TokenService {
    process: Child,
    port: u16,
}

impl TokenService {
    /// With the TLS certificate in one directory and the key that signs tokens in another.
    fn start(certificates: &Path, keys: &Path) -> Self {
        let mut process = Command::new("python3")
            .args(["-c", SERVICE])
            .args([certificates, keys])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { process, port: line.trim().parse().unwrap() }
    }
}

impl Drop for TokenService {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A key that signs tokens, with its certificate, as `token.key` and `token.pem`.
fn signing_key(directory: &Path) {
    let output = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hull-test"])
        .arg("-keyout")
        .arg(directory.join("token.key"))
        .arg("-out")
        .arg(directory.join("token.pem"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn login(password: &str) -> Option<Credentials> {
    Some(Credentials { username: "me".into(), password: password.into(), ..Credentials::default() })
}

/// The registry section of its configuration that TLS and tokens need.
fn secured(certificates: &Path, keys: &Path, service: &TokenService) -> String {
    let (certificates, keys) = (certificates.display(), keys.display());
    format!(
        "  tls:\n    certificate: {certificates}/server.pem\n    key: {certificates}/server.key\n\
         auth:\n  token:\n    realm: https://127.0.0.1:{}/token\n    service: registry.test\n    issuer: hull-test\n    \
         rootcertbundle: {keys}/token.pem\n",
        service.port
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_tokens_and_its_own_authority_needs_only_the_authority_configured() {
    let (trusted, foreign, keys) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates(trusted.path());
    certificates(foreign.path());
    signing_key(keys.path());
    let image = TestImage::new(vec![
        Layer::new(&[("a", b"a")], Packing::Gzip),
        Layer::noise("noise", 6 << 20, 3),
        Layer::noise("more", 100_000, 4),
    ]);
    let registry = DockerRegistry::start();
    registry.push("team/app", "1", &image);
    registry.push("public/app", "1", &image);
    let service = TokenService::start(trusted.path(), keys.path());
    let registry = registry.restart_with(&secured(trusted.path(), keys.path(), &service));
    let name = |path: &str| reference(&format!("{}/{path}", registry.host()));
    let hosts =
        format!("server = \"https://{}\"\nca = \"{}/ca.pem\"\n", registry.host(), trusted.path().display());
    let test = TestStore::new();
    write_hosts(&test, &registry.host(), &hosts);

    // Who has not logged in gets what is public, and is told so of the rest.
    test.store.pull(&name("public/app:1"), None, None).await.unwrap();
    for login in [None, login("wrong")] {
        let error = test.store.pull(&name("team/app:1"), login, None).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::Unauthorized, "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    test.store.remove(&image.id()).unwrap();
    let pulled = test.store.pull(&name("team/app:1"), login("secret"), None).await.unwrap();
    assert_eq!(pulled.id, image.id());
    // A push asks for more rights, and for those to take layers from the other repository.
    let target = name("team/copy:2");
    let options = PushOptions { credentials: login("secret"), ..PushOptions::default() };
    test.store.push(&name("team/app:1").to_string(), &target, options, |_| {}).await.unwrap();
    let denied = PushOptions::default();
    let error = test.store.push(&pulled.id, &name("public/app:2"), denied, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("push"), "{error}");
    let asked = fs::read_to_string(keys.path().join("asked")).unwrap();
    assert!(asked.contains("repository:team/copy:pull,push"), "{asked}");
    let fresh = TestStore::new();
    write_hosts(&fresh, &registry.host(), &hosts);
    assert_eq!(fresh.store.pull(&target, login("secret"), None).await.unwrap().id, image.id());
    assert_eq!(fresh.store.check(false, |_| true).unwrap().problems, []);

    // A token service that another authority vouches for gets no password.
    fs::remove_file(keys.path().join("asked")).unwrap();
    let other = TokenService::start(foreign.path(), keys.path());
    let registry = registry.restart_with(&secured(trusted.path(), keys.path(), &other));
    let name = reference(&format!("{}/team/app:1", registry.host()));
    let hosts =
        format!("server = \"https://{}\"\nca = \"{}/ca.pem\"\n", registry.host(), trusted.path().display());
    let test = TestStore::new();
    write_hosts(&test, &registry.host(), &hosts);
    let error = test.store.pull(&name, login("secret"), None).await.unwrap_err().to_string();
    assert!(error.contains("token service") && error.contains("certificate"), "{error}");
    assert!(!keys.path().join("asked").exists(), "the password went to a stranger");
    test.assert_nothing_left();
}
