//! systemd as the owner of cgroups. These run where systemd is init: `hack/node --systemd`.

use std::path::{Path, PathBuf};
use std::process::Command;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

fn systemd_is_init() -> bool {
    let is_init = Path::new("/run/systemd/system").is_dir();
    if !is_init {
        eprintln!("systemd is not init here; hack/node --systemd is where this is tested");
    }
    is_init
}

fn systemctl(words: &[&str]) -> String {
    let output = Command::new("systemctl").args(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "systemctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    text
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", unit, "--value", "--property", name])
}

fn memory(bytes: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { memory_limit_in_bytes: bytes, cpu_shares: 512, ..Default::default() }
}

fn with_parent(mut config: cri::PodSandboxConfig, parent: &str) -> cri::PodSandboxConfig {
    config.linux.as_mut().unwrap().cgroup_parent = parent.to_owned();
    config
}

fn control(slice: &str, scope: &str, file: &str) -> PathBuf {
    let parent = slice.split_once('-').unwrap().0;
    Path::new("/sys/fs/cgroup").join(format!("{parent}.slice")).join(slice).join(scope).join(file)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .trim()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_slices_and_containers_scopes_that_keep_their_limits() {
    if !systemd_is_init() {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut client = daemon.runtime().await;
    let told = client.runtime_config(cri::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(told.linux.unwrap().cgroup_driver, cri::CgroupDriver::Systemd as i32);

    // Given a slice that nobody has made, as kubelet names it
    let slice = format!("hulltest{}-pod1.slice", std::process::id());
    let mut config = with_parent(pod_config(&daemon, "slice"), &slice);
    config.linux.as_mut().unwrap().resources = Some(memory(256 << 20));
    let mut pod = Pod::run(&daemon, config).await;
    assert_eq!(property(&slice, "MemoryMax"), (256_u64 << 20).to_string());
    assert_eq!(property(&format!("hull-{}.scope", pod.id), "ActiveState"), "active");

    // When a container with limits runs in it
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.linux.as_mut().unwrap().resources = Some(memory(64 << 20));
    let id = pod.start(config).await;
    let scope = format!("hull-{id}.scope");
    let limit = control(&slice, &scope, "memory.max");
    let weight = control(&slice, &scope, "cpu.weight");
    // Then it is where systemd says,
    assert!(property(&scope, "ControlGroup").ends_with(&format!("/{slice}/{scope}")));
    assert_eq!((property(&scope, "Slice"), property(&scope, "Delegate")), (slice.clone(), "yes".to_owned()));
    assert_eq!(property(&scope, "TasksMax"), "infinity");
    let before = (read(&limit), read(&weight));
    assert_eq!(before.0, (64 << 20).to_string());
    // and no reload or neighbour takes its limits away.
    systemctl(&["daemon-reload"]);
    let neighbour = pod.start(container_config("other", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!((read(&limit), read(&weight)), before);
    // An update is known to systemd, too.
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() }),
        ..Default::default()
    };
    client.update_container_resources(request).await.unwrap();
    systemctl(&["daemon-reload"]);
    assert_eq!(
        (read(&limit), property(&scope, "MemoryMax")),
        ((96 << 20).to_string(), (96 << 20).to_string())
    );
    // Execs, stats and a restart of hulld work as ever.
    assert_eq!(pod.output(&id, &["/bin/echo", "hello"]).await, "hello\n");
    daemon.kill();
    daemon.restart().await;
    pod.reconnect(&daemon).await;
    let stats = cri::ContainerStatsRequest { container_id: id.clone() };
    let stats = pod.client().container_stats(stats).await.unwrap().into_inner().stats.unwrap();
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);

    // And nothing stays
    pod.stop_container(&neighbour, 0).await;
    pod.stop().await;
    pod.remove().await;
    hull_tests::eventually("its units are gone", hull_tests::patience(5), async || {
        let gone = |unit: &str| property(unit, "ActiveState") != "active";
        (gone(&scope) && gone(&slice) && gone(&format!("hull-{}.scope", pod.id))).then_some(())
    })
    .await;
    systemctl(&["stop", &format!("{}.slice", slice.split_once('-').unwrap().0)]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slice_of_kubelets_stays_and_a_kill_for_memory_is_told() {
    if !systemd_is_init() {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let slice = format!("hulltest{}-pod2.slice", std::process::id());
    systemctl(&["start", &slice]);
    let mut pod = Pod::run(&daemon, with_parent(pod_config(&daemon, "kubelets"), &slice)).await;
    for round in 0..3 {
        let hog = ["/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"];
        let mut config = container_config(&format!("hog{round}"), &name, &hog);
        config.linux.as_mut().unwrap().resources = Some(memory(16 << 20));
        let id = pod.start(config).await;
        let status = pod.ended(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    }
    // So short that systemd hears of it when it is over
    let short = pod.start(container_config("short", &name, &["/bin/true"])).await;
    assert_eq!(pod.ended(&short).await.exit_code, 0);
    pod.stop().await;
    pod.remove().await;
    assert_eq!(property(&slice, "ActiveState"), "active");
    systemctl(&["stop", &slice]);
    systemctl(&["stop", &format!("{}.slice", slice.split_once('-').unwrap().0)]);
    daemon.finish().await;
}
