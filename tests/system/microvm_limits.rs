//! What a machine has, and what becomes of it when that is used up.

use std::fs;

use hull_tests::pod::{Pod, container_config, networked_pod_config};
use k8s_cri::v1 as cri;

use super::microvm_ground::{Ground, perl};

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_the_size_of_its_pod_and_follows_it() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let mut config = networked_pod_config(&daemon, "sized");
    config.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 256 << 20, ..Default::default() });
    let mut pod = Pod::run_microvm(&daemon, config).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let total = async |pod: &mut Pod| -> u64 {
        let line = pod.shell(&id, "grep MemTotal /proc/meminfo | awk '{print $2}'").await;
        line.trim().parse::<u64>().unwrap() << 10
    };
    let born = total(&mut pod).await;
    assert!((150 << 20..310 << 20).contains(&born), "{born}");
    assert_eq!(pod.output(&id, &["nproc"]).await, "1\n", "as many as this machine has");
    let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = pod.client().container_status(request).await.unwrap().into_inner().info;
    assert!(info["info"].contains(r#""runtimeType":"microvm""#), "{info:?}");
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_reaches_its_pods_memory_limit_is_told_as_oom() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::with(&perl()).await else {
        return;
    };
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "oom")).await;
    let script = "sleep 3; $x = 'x' x (300 << 20); sleep 1000";
    let greedy = pod.start(container_config("greedy", &name, &["/usr/bin/perl", "-e", script])).await;
    let limit = format!("/sys/fs/cgroup/{}/{}/memory.max", daemon.cgroup(), pod.id);
    fs::write(limit, (200_u64 << 20).to_string()).unwrap();
    let status = pod.ended(&greedy).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "OOMKilled"), "{}", status.message);
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

fn privileged(mut config: cri::PodSandboxConfig) -> cri::PodSandboxConfig {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    config
}

fn privileged_container(mut config: cri::ContainerConfig) -> cri::ContainerConfig {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_owns_its_machine_and_nothing_of_the_host() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let mut config = privileged(networked_pod_config(&daemon, "root"));
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls = [
        ("kernel.core_pattern".to_owned(), "/tmp/core.%p".to_owned()),
        ("vm.max_map_count".to_owned(), "123456".to_owned()),
        // Whoever takes too much memory makes the kernel panic.
        ("vm.panic_on_oom".to_owned(), "2".to_owned()),
        ("net.core.somaxconn".to_owned(), "321".to_owned()),
    ]
    .into();
    let mut pod = Pod::run_microvm(&daemon, config).await;
    let main = privileged_container(container_config("main", &name, &["/bin/sleep", "1000"]));
    let main = pod.start(main).await;

    // Every capability of the guest's, none of the host's devices
    let status = pod.shell(&main, "grep CapEff /proc/self/status").await;
    assert!(status.contains("000001ff") || status.contains("000003ff"), "{status}");
    assert_ne!(pod.exec(&main, &["test", "-e", "/dev/kvm"]).await.exit_code, 0);
    // Sysctls of the whole kernel are the machine's own
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/kernel/core_pattern"]).await, "/tmp/core.%p\n");
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/vm/max_map_count"]).await, "123456\n");
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/net/core/somaxconn"]).await, "321\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), before);

    // And a guest whose kernel panics ends its pod, with the reason
    let mut greedy = container_config("greedy", &name, &["/bin/tail", "/dev/zero"]);
    greedy.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
    pod.start(greedy).await;
    let status = pod.ended(&main).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "GuestPanic"), "{}", status.message);
    assert!(status.message.contains("panic"), "{}", status.message);
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}
