//! Which namespaces containers share, as the pod asks for it.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

fn with_pid(
    mut config: cri::ContainerConfig,
    mode: cri::NamespaceMode,
    target: &str,
) -> cri::ContainerConfig {
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    let options = context.namespace_options.as_mut().unwrap();
    options.pid = mode as i32;
    options.target_id = target.to_owned();
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_share_network_ipc_and_shm_but_not_processes() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "shared")).await;
    let first = pod.start(container_config("first", &name, &["/bin/sleep", "1000"])).await;
    let second = pod.start(container_config("second", &name, &["/bin/sleep", "1000"])).await;

    for kind in ["net", "ipc", "uts"] {
        let path = format!("/proc/self/ns/{kind}");
        assert_eq!(
            pod.output(&first, &["readlink", &path]).await,
            pod.output(&second, &["readlink", &path]).await,
            "{kind}"
        );
    }
    for kind in ["pid", "mnt"] {
        let path = format!("/proc/self/ns/{kind}");
        assert_ne!(
            pod.output(&first, &["readlink", &path]).await,
            pod.output(&second, &["readlink", &path]).await,
            "{kind}"
        );
    }
    pod.shell(&first, "echo through shm > /dev/shm/message").await;
    assert_eq!(pod.shell(&second, "cat /dev/shm/message").await, "through shm\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_process_namespace_has_a_reaper_and_survives_a_container() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = networked_pod_config(&daemon, "onepid");
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Pod as i32;
    let mut pod = Pod::run(&daemon, config).await;
    let in_pod = |config| with_pid(config, cri::NamespaceMode::Pod, "");
    let first = pod.start(in_pod(container_config("first", &name, &["/bin/sleep", "1001"]))).await;
    let second = pod.start(in_pod(container_config("second", &name, &["/bin/sleep", "1002"]))).await;

    let seen = pod.shell(&second, "ps").await;
    assert!(seen.contains("sleep 1001") && seen.contains("sleep 1002"), "{seen}");
    // An orphan is reaped by the namespace's first process
    pod.shell(&second, "(sleep 0.1 &) ; true").await;
    pod.stop_container(&first, 0).await;
    assert_eq!(pod.ended(&first).await.exit_code, 137);
    hull_tests::eventually("no zombie is left", hull_tests::patience(5), async || {
        let seen = pod.shell(&second, "ps -o stat,args").await;
        (!seen.lines().any(|line| line.trim_start().starts_with('Z'))).then_some(())
    })
    .await;
    assert_eq!(pod.container(&second).await.state, cri::ContainerState::ContainerRunning as i32);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_debug_container_joins_its_targets_processes() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "debug")).await;
    let target = pod.start(container_config("target", &name, &["/bin/sleep", "1003"])).await;
    let config = with_pid(
        container_config("debugger", &name, &["/bin/sleep", "1004"]),
        cri::NamespaceMode::Target,
        &target,
    );
    let debugger = pod.start(config).await;

    let seen = pod.shell(&debugger, "ps").await;
    assert!(
        seen.lines().any(|line| line.trim_start().starts_with("1 ") && line.contains("sleep 1003")),
        "{seen}"
    );
    assert_eq!(
        pod.output(&debugger, &["readlink", "/proc/1/ns/pid"]).await,
        pod.output(&target, &["readlink", "/proc/1/ns/pid"]).await
    );
    // The debugger ends with its target's namespace, as an exit and not as a loss
    pod.stop_container(&target, 0).await;
    assert_eq!(pod.ended(&debugger).await.exit_code, 137);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_pod_sees_the_hosts_processes_and_leaves_no_orphan() {
    if hull_tests::microvm::excepted("hostPID is refused") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "hostly");
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    let options = context.namespace_options.as_mut().unwrap();
    options.pid = cri::NamespaceMode::Node as i32;
    options.ipc = cri::NamespaceMode::Node as i32;
    let mut pod = Pod::run(&daemon, config).await;
    let script = "(sleep 779 &); exec sleep 1000";
    let id = pod
        .start(with_pid(
            container_config("main", &name, &["/bin/sh", "-c", script]),
            cri::NamespaceMode::Node,
            "",
        ))
        .await;

    for kind in ["pid", "ipc", "net", "uts"] {
        let own = pod.output(&id, &["readlink", &format!("/proc/self/ns/{kind}")]).await;
        assert_eq!(
            own.trim(),
            std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap(),
            "{kind}"
        );
    }
    pod.stop().await;
    let status = pod.container(&id).await;
    assert_eq!(status.state, cri::ContainerState::ContainerExited as i32);
    pod.remove().await;
    daemon.finish().await;
}
