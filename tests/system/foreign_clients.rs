//! Streams with clients that know nothing of hull: Debian's python3-websocket for WebSocket, and for SPDY/3.1 Go's
//! spdystream (golang-go, golang-github-docker-spdystream-dev), from which kubectl's descends. For Python there is none
//! that could: spdylay's and spdy-py end at SPDY/3.0 without servers of today.

use std::process::Command;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_client_of_pythons_runs_a_command() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "python")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let script = hull_tests::binaries::workspace().join("tests/clients/exec_over_websocket.py");
    // v4 cannot tell the end of its input, so that command counts what it wants.
    for (protocol, megabytes, command) in [
        ("v5.channel.k8s.io", "20", "cat; echo errors >&2; exit 5"),
        ("v4.channel.k8s.io", "2", "head -c 2097152; echo errors >&2; exit 5"),
    ] {
        let request = cri::ExecRequest {
            container_id: id.clone(),
            cmd: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let url = pod.client().exec(request).await.unwrap().into_inner().url;
        // Debian's own Python, whatever else is first in PATH.
        let output = Command::new("/usr/bin/python3")
            .arg(&script)
            .args([url.as_str(), protocol, megabytes])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{protocol}: {stderr}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(told["1"], told["sent"], "{protocol}: what came back is what was sent");
        assert_eq!(told["2"], "errors\n");
        let status: Value = serde_json::from_str(told["3"].as_str().unwrap()).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "5", "{protocol}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spdy_client_that_kubectls_descends_from_runs_a_command() {
    // Given the client, compiled from Debian's packages alone
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("client");
    let source = hull_tests::binaries::workspace().join("tests/clients/exec_over_spdy.go");
    let built = Command::new("/usr/bin/go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("GO111MODULE", "off")
        .env("GOPATH", "/usr/share/gocode")
        .env("GOCACHE", directory.path().join("cache"))
        .output()
        .expect("the package golang-go is needed");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    // And a command that says again what it is told
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "go")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let request = cri::ExecRequest {
        container_id: id,
        cmd: ["/bin/sh", "-c", "cat; echo errors >&2; exit 5"].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let url = pod.client().exec(request).await.unwrap().into_inner().url;

    // When it sends 20 MB, which is more than it would ever be granted if anybody waited for WINDOW_UPDATE
    let output = Command::new(&program).args([url.as_str(), "20"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");

    // Then they come back, and how it ended
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["stdout"], told["sent"]);
    assert_eq!(told["stderr"], "errors\n");
    let status: Value = serde_json::from_str(told["error"].as_str().unwrap()).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "5");
    daemon.finish().await;
}
