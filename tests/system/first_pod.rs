//! From a registry to running containers and back to nothing.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_two_containers_lives_and_leaves_nothing() {
    let registry = Registry::start();
    let busybox = image::busybox();
    let name = registry.push("library/busybox", "v1", &busybox);
    let daemon = Daemon::start().await;

    // Given a multi-layer image and a pod with a network of its own
    let image_ref = daemon.pull(&name).await;
    assert_eq!(image_ref, busybox.id());
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "two")).await;
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxReady as i32);

    // When two containers run in it
    let script = "cat /greeting; echo to stderr >&2; ls /data; exec sleep 1000";
    let first = pod.start(container_config("first", &name, &["/bin/sh", "-c", script])).await;
    let second = pod.start(container_config("second", &name, &["/bin/sleep", "1000"])).await;

    // Then each layer is in its place, the hidden file is hidden, and output is in the log
    let wanted = "hello from the top layer\nto stderr\nkept\n";
    hull_tests::eventually("the log is written", hull_tests::patience(10), async || {
        let mut lines: Vec<String> = pod.log("first").lines().map(str::to_owned).collect();
        lines.sort();
        let mut expected: Vec<&str> = wanted.lines().collect();
        expected.sort();
        (lines == expected).then_some(())
    })
    .await;
    let raw = std::fs::read_to_string(pod.log_path("first")).unwrap();
    assert!(raw.contains(" stdout F hello from the top layer\n"), "{raw}");
    assert!(raw.contains(" stderr F to stderr\n"), "{raw}");

    // And both run, with their own writable layer
    assert_eq!(pod.container(&first).await.state, cri::ContainerState::ContainerRunning as i32);
    pod.shell(&first, "echo mine > /written").await;
    assert_eq!(pod.exec(&second, &["/bin/cat", "/written"]).await.exit_code, 1);
    let status = pod.container(&second).await;
    assert_eq!((status.image_ref, status.image_id), (image_ref.clone(), image_ref));

    // And they end as they are told to
    pod.stop_container(&first, 1).await;
    assert_eq!(pod.ended(&first).await.exit_code, 137);
    pod.stop_container(&second, 0).await;
    assert_eq!(pod.ended(&second).await.exit_code, 137);
    pod.remove_container(&first).await;
    pod.stop().await;
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    pod.remove().await;

    // And nothing of them remains
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_are_the_processes_own() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "codes")).await;

    for (number, (script, code, reason)) in [
        ("exit 0", 0, "Completed"),
        ("exit 7", 7, "Error"),
        ("kill -9 $$", 137, "Error"),
        ("sleep 0.1; exit 1", 1, "Error"),
    ]
    .into_iter()
    .enumerate()
    {
        // PID 1 of a namespace cannot kill itself, so the shell under test is a child of the first one.
        let command = ["/bin/sh", "-c", "/bin/sh -c \"$0\"; exit $?", script];
        let id = pod.start(container_config(&format!("c{number}"), &name, &command)).await;
        let status = pod.ended(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{script}");
        assert!(
            status.finished_at >= status.started_at && status.started_at >= status.created_at,
            "{status:?}"
        );
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_returns_both_streams_and_the_exit_code() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "exec")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    let answer = pod.exec(&id, &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]).await;
    assert_eq!(
        (answer.stdout.as_slice(), answer.stderr.as_slice(), answer.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 7)
    );
    assert_eq!(pod.exec(&id, &["/bin/sh", "-c", "kill -9 $$"]).await.exit_code, 137);

    // A command that does not end in time is ended, and kubelet is told so
    let late = pod.try_exec(&id, &["/bin/sleep", "100"], 1).await.expect_err("a timeout");
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded);
    assert!(!pod.shell(&id, "ps").await.contains("sleep 100\n"), "the command is gone");

    // A missing command is an error that names it
    let missing = pod.try_exec(&id, &["/bin/nosuch"], 10).await.expect_err("no such command");
    assert!(missing.message().contains("/bin/nosuch"), "{missing}");
    daemon.finish().await;
}

/// containerd CVE-2022-31030, CRI-O CVE-2022-1708: output of ExecSync must not fill the daemon's memory.
#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_output_is_capped_at_16_mib() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "flood");
    config.hostname = "flood".into();
    let mut pod = Pod::run(&daemon, config).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    let cmd = ["/bin/sh", "-c", "head -c 40000000 /dev/zero; echo done >&2"].map(str::to_owned).to_vec();
    let request = cri::ExecSyncRequest { container_id: id, cmd, timeout: 600 };
    let answer = daemon.runtime().await.exec_sync(request).await.unwrap().into_inner();
    assert_eq!(answer.exit_code, 0);
    // Both streams and what is around them fit into one message of 16 MiB, the most that kubelet takes.
    let kept = answer.stdout.len();
    assert!(kept <= 16 << 20 && kept > (16 << 20) - 8192, "{kept}");
    assert_eq!(answer.stderr, b"done\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_without_its_executable_says_so_and_is_exited() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "missing")).await;

    let error = pod.start_fails(container_config("main", &name, &["no-such-program"])).await;
    assert!(error.message().contains("no-such-program") && error.message().contains("not found"), "{error}");
    let error = pod.start_fails(container_config("second", &name, &["/etc/passwd"])).await;
    assert!(error.message().contains("permission denied"), "{error}");
    daemon.finish().await;
}
