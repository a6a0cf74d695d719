//! What pods use, as kubelet and Prometheus ask for it.

use std::collections::{BTreeMap, BTreeSet};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::newer;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

async fn container_stats(pod: &Pod, id: &str) -> cri::ContainerStats {
    let request = cri::ContainerStatsRequest { container_id: id.to_owned() };
    pod.client().container_stats(request).await.unwrap().into_inner().stats.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_tell_what_a_container_and_its_pod_use() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "stats")).await;
    let mut config = container_config("busy", &name, &["/bin/sh", "-c", "while :; do :; done"]);
    config.annotations = [("kept".to_owned(), "exactly".to_owned())].into();
    config.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let busy = pod.start(config).await;
    let ended = pod.start(container_config("ended", &name, &["/bin/true"])).await;
    pod.ended(&ended).await;

    // Given two looks at a container that computes
    let first = container_stats(&pod, &busy).await;
    pod.shell(&busy, "head -c 300000 /dev/zero > /big; sync").await;
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let second = container_stats(&pod, &busy).await;

    // Then its numbers are there, and its rate since the first look
    let attributes = second.attributes.unwrap();
    assert_eq!((attributes.id.as_str(), attributes.metadata.unwrap().name.as_str()), (busy.as_str(), "busy"));
    assert_eq!(attributes.annotations["kept"], "exactly");
    assert_eq!(attributes.labels["container"], "busy");
    let (before, cpu) = (first.cpu.unwrap(), second.cpu.unwrap());
    assert!(cpu.timestamp > before.timestamp);
    assert!(cpu.usage_core_nano_seconds.unwrap().value > before.usage_core_nano_seconds.unwrap().value);
    assert!(before.usage_nano_cores.is_none() && cpu.usage_nano_cores.unwrap().value > 0);
    let memory = second.memory.unwrap();
    let working_set = memory.working_set_bytes.unwrap().value;
    assert!(working_set > 0 && working_set <= memory.usage_bytes.unwrap().value);
    assert_eq!(memory.available_bytes.unwrap().value, (64 << 20) - working_set);

    // And what it wrote is counted on the filesystem that ImageFsInfo names
    let layer = hull_tests::eventually("the file is counted", hull_tests::patience(30), async || {
        let layer = container_stats(&pod, &busy).await.writable_layer?;
        (layer.used_bytes?.value >= 300_000).then_some(layer)
    })
    .await;
    let info = daemon.images().await.image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(layer.fs_id, info.container_filesystems[0].fs_id);
    assert!(std::path::Path::new(&layer.fs_id.unwrap().mountpoint).is_dir());

    // And one that ended has its writable layer only
    let gone = container_stats(&pod, &ended).await;
    assert!(gone.cpu.is_none() && gone.memory.is_none() && gone.writable_layer.is_some());

    // And the pod has it all, with its network
    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = pod.client().pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap();
    let linux = stats.linux.unwrap();
    assert_eq!(linux.containers.len(), 2);
    assert!(linux.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert!(linux.memory.unwrap().usage_bytes.unwrap().value > 0);
    assert!(linux.process.unwrap().process_count.unwrap().value >= 2, "the shell and the agent");
    assert_eq!(linux.network.unwrap().default_interface.unwrap().name, "eth0");

    // And filters let through what fits
    let list = async |filter: cri::ContainerStatsFilter| {
        let request = cri::ListContainerStatsRequest { filter: Some(filter) };
        pod.client().list_container_stats(request).await.unwrap().into_inner().stats.len()
    };
    assert_eq!(list(cri::ContainerStatsFilter::default()).await, 2);
    assert_eq!(list(cri::ContainerStatsFilter { id: busy[..12].to_owned(), ..Default::default() }).await, 1);
    let label = [("container".to_owned(), "nobody".to_owned())].into();
    assert_eq!(list(cri::ContainerStatsFilter { label_selector: label, ..Default::default() }).await, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_those_that_were_described() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "metrics")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    let mut client = pod.client();
    let described: BTreeMap<String, usize> = client
        .list_metric_descriptors(cri::ListMetricDescriptorsRequest {})
        .await
        .unwrap()
        .into_inner()
        .descriptors
        .into_iter()
        .map(|one| (one.name, one.label_keys.len()))
        .collect();
    let answer = client.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}).await.unwrap();
    let [metrics] = &answer.into_inner().pod_metrics[..] else { panic!("one pod") };
    assert_eq!(metrics.container_metrics[0].container_id, id);
    let of_container = &metrics.container_metrics[0].metrics;
    for metric in metrics.metrics.iter().chain(of_container) {
        assert_eq!(described.get(&metric.name), Some(&metric.label_values.len()), "{}", metric.name);
    }
    let names: BTreeSet<&str> = of_container.iter().map(|metric| metric.name.as_str()).collect();
    for wanted in [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_fs_usage_bytes",
        "container_processes",
        "container_start_time_seconds",
        "container_oom_events_total",
        "container_spec_memory_limit_bytes",
    ] {
        assert!(names.contains(wanted), "{wanted} is missing: {names:?}");
    }
    assert!(metrics.metrics.iter().any(|metric| metric.name == "container_network_receive_bytes_total"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pressure_is_what_the_kernel_says_on_v2_and_on_hybrid() {
    // The unified hierarchy has it, whoever has the controllers.
    let has_pressure = std::path::Path::new("/proc/pressure/cpu").exists();
    let Some(unified) = hull_tests::unified_cgroups().filter(|_| has_pressure) else { return };
    if hull_tests::microvm::by_default() {
        // The files that this test compares with are the guest's.
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "pressure")).await;
    let script = "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait";
    let busy = pod.start(container_config("busy", &name, &["/bin/sh", "-c", script])).await;
    let request = cri::ContainerStatusRequest { container_id: busy.clone(), verbose: true };
    let status = pod.client().container_status(request).await.unwrap().into_inner();
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", info["pid"])).unwrap();
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    // Microseconds of "some" and, where the kernel has it, "full".
    let totals = |what: &str| -> Vec<u64> {
        let text = std::fs::read_to_string(format!("{unified}{cgroup}/{what}.pressure")).unwrap();
        let total = |line: &str| line.rsplit('=').next().unwrap().parse().unwrap();
        text.lines().map(total).collect()
    };
    let all = || ["cpu", "memory", "io"].map(totals);
    let stats = async || {
        let request = cri::ContainerStatsRequest { container_id: busy.clone() };
        let path = "/runtime.v1.RuntimeService/ContainerStats";
        let answer: newer::ContainerStatsResponse =
            newer::call(daemon.channel().await, path, request).await.unwrap();
        let stats = answer.stats.unwrap();
        [stats.cpu.unwrap().psi, stats.memory.unwrap().psi, stats.io.unwrap().psi].map(Option::unwrap)
    };
    hull_tests::eventually("eight loops wait for each other", hull_tests::patience(20), async || {
        let [cpu, ..] = stats().await;
        (cpu.some.unwrap().total > 0).then_some(())
    })
    .await;
    let (before, told, after) = (all(), stats().await, all());
    for ((before, told), after) in before.iter().zip(told).zip(&after) {
        for (index, told) in [told.some, told.full].into_iter().enumerate() {
            let told = told.unwrap();
            let (least, most) = (before.get(index).unwrap_or(&0), after.get(index).unwrap_or(&0));
            assert!((least..=most).contains(&&told.total), "{least} {told:?} {most}");
            assert!(told.avg10 <= 100.0 && told.avg300 <= 100.0);
        }
    }
    daemon.finish().await;
}
