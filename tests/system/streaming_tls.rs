//! Streams over TLS: for a client that trusts an authority, and for hull itself.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;

/// Puts a certificate for 127.0.0.1 and its key into the directory, and gives the path of its authority's.
fn certify(directory: &Path, authority: &str) -> std::path::PathBuf {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(rcgen::DnType::CommonName, authority);
    let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let replace = |name: &str, text: &str| {
        std::fs::write(directory.join("new"), text).unwrap();
        std::fs::rename(directory.join("new"), directory.join(name)).unwrap();
    };
    replace("streams.crt", &certificate.pem());
    replace("streams.key", &key.serialize_pem());
    replace(&format!("{authority}.crt"), &issuer.pem());
    directory.join(format!("{authority}.crt"))
}

async fn exec(pod: &Pod, id: &str) -> String {
    let request = cri::ExecRequest {
        container_id: id.to_owned(),
        cmd: ["/bin/sh", "-c", "cat; exit 5"].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    pod.client().exec(request).await.unwrap().into_inner().url
}

/// Debian's python3-websocket, which trusts this authority alone and checks the server's name.
fn foreign(url: &str, authority: &Path) -> Output {
    let script = hull_tests::binaries::workspace().join("tests/clients/exec_over_websocket.py");
    let mut command = Command::new("/usr/bin/python3");
    command.arg(script).args([url, "v5.channel.k8s.io", "5"]).arg(authority);
    command.output().unwrap()
}

fn hull(daemon: &Daemon) -> Output {
    Command::new(hull_tests::binaries::program("hull"))
        .args(["exec", "-i", "main", "sh", "-c", "echo secure; exit 7"])
        .env("HULL_SOCKET", format!("unix://{}", daemon.socket().display()))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_served_over_tls_and_a_new_certificate_is_taken_up() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let directory = tempfile::tempdir().unwrap();
    let first = certify(directory.path(), "first");
    let streaming = format!(
        "[streaming]\ncertificate = \"{0}/streams.crt\"\nkey = \"{0}/streams.key\"\n",
        directory.path().display()
    );
    let daemon = Daemon::start_with("mode = \"builtin\"\n", &streaming).await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "tls")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    // A client that knows the authority gets everything, there and back
    let url = exec(&pod, &id).await;
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let output = foreign(&url, &first);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["1"], told["sent"]);
    let status: Value = serde_json::from_str(told["3"].as_str().unwrap()).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "5");
    // And hull, which asks hulld for the certificate
    let output = hull(&daemon);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(7), &b"secure\n"[..]), "{output:?}");

    // When certificate and key are replaced
    let second = certify(directory.path(), "second");

    // Then the next connection shows them, and is not trusted by those who do not know the new authority
    let output = foreign(&exec(&pod, &id).await, &first);
    assert!(String::from_utf8_lossy(&output.stderr).contains("CERTIFICATE_VERIFY_FAILED"), "{output:?}");
    let output = foreign(&exec(&pod, &id).await, &second);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(hull(&daemon).status.code(), Some(7));
    daemon.finish().await;
}
