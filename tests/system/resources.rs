//! Limits that change while a pod runs, and stopping under several deadlines.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::newer::{self, UpdatePodSandboxResourcesRequest};
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

fn memory(bytes: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }
}

/// The limit of the cgroup `path`, v1 or v2.
fn memory_limit(path: &str) -> String {
    let below = |root: &str| Path::new(root).join(path.trim_start_matches('/'));
    let files: [PathBuf; 2] = [
        below("/sys/fs/cgroup").join("memory.max"),
        below("/sys/fs/cgroup/memory").join("memory.limit_in_bytes"),
    ];
    let found = files.iter().find_map(|file| std::fs::read_to_string(file).ok());
    found.unwrap_or_else(|| panic!("none of {files:?}")).trim().to_owned()
}

async fn resize(
    daemon: &Daemon,
    pod: &str,
    overhead: Option<cri::LinuxContainerResources>,
    resources: Option<cri::LinuxContainerResources>,
) -> Result<(), tonic::Status> {
    let request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.to_owned(), overhead, resources };
    let path = "/runtime.v1.RuntimeService/UpdatePodSandboxResources";
    newer::call::<_, newer::Empty>(daemon.channel().await, path, request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_as_a_whole_is_resized() {
    let mut daemon = Daemon::start().await;
    let mut config = pod_config(&daemon, "resized");
    config.linux.as_mut().unwrap().resources = Some(memory(64 << 20));
    let pod = Pod::run(&daemon, config).await;
    let group = format!("{}/{}", daemon.cgroup(), pod.id);
    // A machine needs more than its containers, and gets it where nobody says how much
    let unnamed = if hull_tests::microvm::by_default() { 96 } else { 0 };
    assert_eq!(memory_limit(&group), ((64 + unnamed) << 20).to_string());

    // Given a cgroup of hull's own: limits and overhead together
    resize(&daemon, &pod.id, Some(memory(1 << 20)), Some(memory(128 << 20))).await.unwrap();
    assert_eq!(memory_limit(&group), (129 << 20).to_string());
    // A restart does not forget what the next change starts from
    daemon.kill();
    daemon.restart().await;
    resize(&daemon, &pod.id, None, Some(memory(96 << 20))).await.unwrap();
    assert_eq!(memory_limit(&group), (97 << 20).to_string());
    resize(&daemon, &pod.id, None, None).await.unwrap();

    // And what cannot be is refused
    let refused = resize(&daemon, &pod.id, None, Some(memory(-5))).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let missing = resize(&daemon, "nobody", None, None).await.unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);
    daemon.finish().await;
}

/// kubelet writes its pods' cgroups itself, and asks the runtime first.
#[tokio::test(flavor = "multi_thread")]
async fn the_cgroup_of_another_is_left_alone() {
    let daemon = Daemon::start().await;
    let parent = format!("/{}-kubelet/pod1", daemon.cgroup());
    let roots: Vec<PathBuf> = [Path::new("/sys/fs/cgroup").to_owned()]
        .into_iter()
        .chain(std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path()))
        .filter(|path| path.join("cgroup.procs").exists() && !path.is_symlink())
        .filter(|path| path != Path::new("/sys/fs/cgroup") || path.join("cgroup.controllers").exists())
        .collect();
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let roots = if v2 { vec![PathBuf::from("/sys/fs/cgroup")] } else { roots };
    for root in &roots {
        std::fs::create_dir_all(root.join(&parent[1..])).unwrap();
    }
    let mut config = pod_config(&daemon, "kubelets");
    config.linux.as_mut().unwrap().cgroup_parent = parent.clone();
    config.linux.as_mut().unwrap().resources = Some(memory(64 << 20));
    let pod = Pod::run(&daemon, config).await;
    let before = memory_limit(&parent);
    resize(&daemon, &pod.id, None, Some(memory(128 << 20))).await.unwrap();
    assert_eq!(memory_limit(&parent), before);
    daemon.remove_all_pods().await;
    for root in &roots {
        for path in [&parent[1..], parent[1..].split('/').next().unwrap()] {
            std::fs::remove_dir(root.join(path)).unwrap();
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_oom_score_follows_an_update() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "oom")).await;
    let script = "sleep 1000 & (echo 700 >/proc/self/oom_score_adj; exec sleep 1001) & wait";
    let mut config = container_config("main", &name, &["/bin/sh", "-c", script]);
    config.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { oom_score_adj: 300, ..Default::default() });
    let id = pod.start(config).await;
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources { oom_score_adj: 500, ..Default::default() }),
        ..Default::default()
    };
    let chosen = "cat /proc/[0-9]*/oom_score_adj | sort -u | tr '\\n' ' '";
    hull_tests::eventually("both sleep", hull_tests::patience(5), async || {
        pod.shell(&id, chosen).await.contains("700").then_some(())
    })
    .await;
    daemon.runtime().await.update_container_resources(request).await.unwrap();
    // Every process of it, but for one that chose its own; and those to come.
    assert_eq!(pod.shell(&id, chosen).await.trim(), "500 700");
    assert_eq!(pod.shell(&id, "cat /proc/self/oom_score_adj").await.trim(), "500");
    daemon.finish().await;
}

/// kubelet's second StopContainer (eviction, a shorter grace period) must not wait for the first.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_stops_the_earlier_deadline_counts_and_one_signal_is_sent() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "stops")).await;
    let stubborn = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done";
    for (first, second) in [(1000, 2), (1000, 0), (2, 1000)] {
        let case = format!("c{first}-{second}");
        let id = pod.start(container_config(&case, &name, &["/bin/sh", "-c", stubborn])).await;
        hull_tests::eventually("its trap is set", hull_tests::patience(5), async || {
            pod.log(&case).contains("ready").then_some(())
        })
        .await;
        let stop = |timeout| {
            let (mut client, container_id) = (pod.client(), id.clone());
            async move { client.stop_container(cri::StopContainerRequest { container_id, timeout }).await }
        };
        let begun = Instant::now();
        let patient = tokio::spawn(stop(first));
        tokio::time::sleep(Duration::from_millis(500)).await;
        stop(second).await.unwrap();
        patient.await.unwrap().unwrap();
        let took = begun.elapsed();
        assert!(took < hull_tests::patience(6), "{case}: {took:?}");
        if second != 0 {
            assert!(took > Duration::from_millis(1900), "{case}: {took:?}");
        }
        assert_eq!(pod.ended(&id).await.exit_code, 137);
        assert_eq!(pod.log(&case).matches("asked").count(), 1, "{case}: {}", pod.log(&case));
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_of_block_io_is_what_the_nodes_file_says() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let directory = tempfile::tempdir().unwrap();
    let classes = directory.path().join("classes.yaml");
    // Whichever disks there are, of the kinds that machines have.
    let text = "Classes:\n  slow:\n  - Devices: ['/dev/vd[a-z]', '/dev/sd[a-z]', '/dev/nvme*n?']\n    ThrottleReadBps: 50M\n    \
                ThrottleWriteIOPS: 1k\n";
    std::fs::write(&classes, text).unwrap();
    let more = format!("[blockio]\nclasses = \"{}\"\n", classes.display());
    let daemon = Daemon::start_with("mode = \"builtin\"\n", &more).await;
    daemon.pull(&name).await;
    let class = |name: &str, class: &str| {
        let mut config = pod_config(&daemon, name);
        let annotation = "blockio.resources.beta.kubernetes.io/container.main";
        config.annotations.insert(annotation.to_owned(), class.to_owned());
        config
    };

    // A class that is not there is refused by name, and other containers of the pod are not concerned
    let mut pod = Pod::run(&daemon, class("unknown", "fast")).await;
    let status = pod.create(container_config("main", &name, &["/bin/true"])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    assert!(status.message().contains("\"fast\"") && status.message().contains("has slow"), "{status}");
    let other = pod.start(container_config("other", &name, &["/bin/true"])).await;
    assert_eq!(pod.ended(&other).await.exit_code, 0);

    // One that is there limits, where the kernel can
    let mut pod = Pod::run(&daemon, class("slow", "slow")).await;
    let config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default().contains("io");
    if v2 && !hull_tests::microvm::by_default() {
        let id = pod.start(config).await;
        let root = format!("/sys/fs/cgroup/{}", daemon.cgroup());
        let found = Command::new("find").args([root.as_str(), "-type", "d", "-name", &id]).output().unwrap();
        let leaf = String::from_utf8(found.stdout).unwrap();
        let limits = std::fs::read_to_string(format!("{}/io.max", leaf.trim())).unwrap();
        let disks = std::fs::read_dir("/dev")
            .unwrap()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let disks = disks
            .filter(|name| name.len() == 3 && (name.starts_with("vd") || name.starts_with("sd")))
            .count();
        assert!(limits.lines().count() >= disks, "{limits}");
        assert!(
            limits.lines().all(|line| line.ends_with("rbps=50000000 wbps=max riops=max wiops=1000")),
            "{limits}"
        );
    } else {
        let status = pod.start_fails(config).await;
        let reason = if v2 { "its own kernel" } else { "needs cgroup v2" };
        assert!(status.message().contains(reason), "{status}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_of_cache_and_memory_bandwidth_is_a_group_of_resctrl() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    // Given what looks like resctrl, with one group
    let directory = tempfile::tempdir().unwrap();
    let resctrl = directory.path();
    std::fs::create_dir(resctrl.join("gold")).unwrap();
    for group in ["", "gold"] {
        std::fs::write(resctrl.join(group).join("tasks"), "").unwrap();
    }
    let more = format!("[rdt]\nresctrl = \"{}\"\n", resctrl.display());
    let daemon = Daemon::start_with("mode = \"builtin\"\n", &more).await;
    daemon.pull(&name).await;
    let class = |name: &str, class: &str| {
        let mut config = pod_config(&daemon, name);
        let annotation = "rdt.resources.beta.kubernetes.io/container.main";
        config.annotations.insert(annotation.to_owned(), class.to_owned());
        config
    };
    let mut pod = Pod::run(&daemon, class("unknown", "silver")).await;
    let status = pod.create(container_config("main", &name, &["/bin/true"])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    assert!(status.message().contains("\"silver\"") && status.message().contains("has gold"), "{status}");
    let mut pod = Pod::run(&daemon, class("gold", "gold")).await;
    let config = container_config("main", &name, &["/bin/sleep", "1000"]);
    if hull_tests::microvm::by_default() {
        let status = pod.create(config).await.unwrap_err();
        assert!(status.message().contains("its own kernel"), "{status}");
    } else {
        // Its first process says of itself that it belongs there
        pod.start(config).await;
        assert_eq!(std::fs::read_to_string(resctrl.join("gold/tasks")).unwrap(), "0");
    }
    daemon.finish().await;
}
