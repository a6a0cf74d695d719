//! Nothing is lost when a part is killed.

use std::time::Duration;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_loses_no_container_no_line_and_no_exit_code() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;

    // Given a container that prints numbers and one that will end while hulld is away
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "survivor")).await;
    let printing = "i=0; while true; do echo $i; i=$((i+1)); usleep 1000; done";
    let printer = pod.start(container_config("printer", &name, &["/bin/sh", "-c", printing])).await;
    let mortal = pod.start(container_config("mortal", &name, &["/bin/sh", "-c", "sleep 1; exit 7"])).await;
    let address = pod.status().await.network.unwrap().ip;

    // When hulld is killed three times
    for _ in 0..3 {
        daemon.kill();
        tokio::time::sleep(Duration::from_millis(800)).await;
        daemon.restart().await;
        pod.reconnect(&daemon).await;
    }

    // Then the same containers are there
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxReady as i32);
    assert_eq!(pod.status().await.network.unwrap().ip, address);
    assert_eq!(pod.container(&printer).await.state, cri::ContainerState::ContainerRunning as i32);
    assert_eq!(pod.ended(&mortal).await.exit_code, 7);
    assert_eq!(pod.shell(&printer, "echo exec works").await, "exec works\n");

    // And no line is missing or doubled
    pod.stop_container(&printer, 0).await;
    let log = pod.log("printer");
    let numbers: Vec<usize> = log.lines().map(|line| line.parse().expect("a number")).collect();
    assert!(numbers.len() > 20, "only {} lines", numbers.len());
    assert!(
        numbers.iter().enumerate().all(|(index, number)| index == *number),
        "lines are missing or doubled"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_ends_its_pod_and_no_other() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut victim = Pod::run(&daemon, networked_pod_config(&daemon, "victim")).await;
    let mut other = Pod::run(&daemon, networked_pod_config(&daemon, "other")).await;
    let doomed =
        victim.start(container_config("main", &name, &["/bin/sh", "-c", "sleep 777 & sleep 777"])).await;
    let safe = other.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    // When the agent of one pod is killed
    let pid = agent_of(&daemon, &victim.id).await;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();

    // Then within a second that pod is not ready, its container has ended, and nothing of it runs
    hull_tests::eventually("the pod has ended", hull_tests::patience(1), async || {
        let status = victim.status().await;
        (status.state == cri::PodSandboxState::SandboxNotready as i32).then_some(())
    })
    .await;
    let status = victim.ended(&doomed).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, hull_tests::microvm::lost()));
    hull_tests::eventually("its processes are gone", hull_tests::patience(1), async || {
        (!running("sleep\u{0}777")).then_some(())
    })
    .await;

    // And the other pod has noticed nothing
    assert_eq!(other.status().await.state, cri::PodSandboxState::SandboxReady as i32);
    assert_eq!(other.container(&safe).await.state, cri::ContainerState::ContainerRunning as i32);
    victim.stop().await;
    victim.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_leaves_pods_running() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "kept")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let created = pod.container(&id).await;

    daemon.stop();
    daemon.restart().await;
    pod.reconnect(&daemon).await;

    let found = pod.container(&id).await;
    assert_eq!(found, created, "the status is what it was");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_while_the_daemon_is_away_is_noticed_afterwards() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "orphan")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "778"])).await;
    let pid = agent_of(&daemon, &pod.id).await;

    daemon.kill();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    daemon.restart().await;
    pod.reconnect(&daemon).await;

    let status = pod.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, hull_tests::microvm::lost()));
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    hull_tests::eventually("its process is gone", hull_tests::patience(1), async || {
        (!running("sleep\u{0}778")).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_cleared_away_is_not_ready_until_it_can() {
    if hull_tests::microvm::by_default() {
        // Its cgroups are another's business there; the order of things is the same.
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "stuck")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    // Given a cgroup that the kernel does not let go: something is mounted on it
    let unified = hull_tests::unified_cgroups().unwrap();
    let leaf = format!("{unified}/{}/{1}/{1}", daemon.cgroup(), pod.id);
    let leaf = match std::path::Path::new(&leaf).exists() {
        true => leaf,
        false => format!("{unified}/{}/{}", daemon.cgroup(), pod.id),
    };
    let none = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &leaf, "tmpfs", none, None).unwrap();

    // When it is stopped
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    let stopped = pod.client().stop_pod_sandbox(request).await;
    let status = pod.status().await;
    rustix::mount::unmount(&leaf, rustix::mount::UnmountFlags::empty()).unwrap();

    // Then that fails, and nobody takes the pod for one that works
    assert!(stopped.is_err());
    assert_eq!(status.state, cri::PodSandboxState::SandboxNotready as i32);
    assert_eq!(pod.container(&id).await.state, cri::ContainerState::ContainerExited as i32);
    let config = container_config("late", &name, &["/bin/true"]);
    assert_eq!(pod.start_fails(config).await.code(), tonic::Code::FailedPrecondition);
    // And another attempt succeeds
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

/// From the verbose status: `info` is JSON with the agent's pid.
pub(crate) async fn agent_of(daemon: &Daemon, sandbox: &str) -> i32 {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
    let info = daemon.runtime().await.pod_sandbox_status(request).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    i32::try_from(info["pid"].as_i64().expect("pid of the agent")).unwrap()
}

pub(crate) fn running(command: &str) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    entries.flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(command)
    })
}
