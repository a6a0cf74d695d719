//! The manners CRI asks for: idempotence, filters, joined requests, exact labels.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

#[tokio::test(flavor = "multi_thread")]
async fn version_status_and_config_answer() {
    let daemon = Daemon::start().await;
    let mut runtime = daemon.runtime().await;
    let version = runtime.version(cri::VersionRequest { version: String::new() }).await.unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("hull", "v1"));
    let status = runtime.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    for wanted in ["RuntimeReady", "NetworkReady"] {
        assert!(
            conditions.iter().any(|condition| condition.r#type == wanted && condition.status),
            "{conditions:?}"
        );
    }
    let config = runtime.runtime_config(cri::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver, cri::CgroupDriver::Cgroupfs as i32);
    let request = cri::UpdateRuntimeConfigRequest {
        runtime_config: Some(cri::RuntimeConfig {
            network_config: Some(cri::NetworkConfig { pod_cidr: String::new() }),
        }),
    };
    runtime.update_runtime_config(request).await.unwrap();
    let unknown = runtime
        .checkpoint_container(cri::CheckpointContainerRequest::default())
        .await
        .expect_err("not built");
    assert_eq!(unknown.code(), tonic::Code::Unimplemented);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_can_be_stopped_and_removed_again() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "twice")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    for _ in 0..2 {
        pod.stop_container(&id, 0).await;
    }
    for _ in 0..2 {
        pod.remove_container(&id).await;
    }
    for _ in 0..2 {
        pod.stop().await;
    }
    for _ in 0..2 {
        pod.remove().await;
    }
    pod.stop_container(&id, 0).await;
    let mut runtime = daemon.runtime().await;
    let status =
        runtime.container_status(cri::ContainerStatusRequest { container_id: id, verbose: false }).await;
    assert_eq!(status.expect_err("gone").code(), tonic::Code::NotFound);
    let status = runtime
        .pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false })
        .await;
    assert_eq!(status.expect_err("gone").code(), tonic::Code::NotFound);
    daemon.finish().await;
}

/// containerd #4604, #9947: "failed to reserve container name" for ever after a deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_joins_the_one_under_way() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let config = networked_pod_config(&daemon, "joined");
    let request = || cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: hull_tests::microvm::default_handler(),
    };

    // Given a client that gives up at once, several times
    for _ in 0..3 {
        let mut runtime = daemon.runtime().await;
        let _ =
            tokio::time::timeout(std::time::Duration::from_micros(500), runtime.run_pod_sandbox(request()))
                .await;
    }
    // Then the next ones, side by side, get one and the same sandbox
    let (mut a, mut b) = (daemon.runtime().await, daemon.runtime().await);
    let (first, second) = tokio::join!(a.run_pod_sandbox(request()), b.run_pod_sandbox(request()));
    let id = first.unwrap().into_inner().pod_sandbox_id;
    assert_eq!(id, second.unwrap().into_inner().pod_sandbox_id);
    let pods = a.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert_eq!(pods.len(), 1);

    // And containers likewise
    let container = || cri::CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(container_config("main", &name, &["/bin/sleep", "1000"])),
        sandbox_config: Some(config.clone()),
    };
    let (first, second) = tokio::join!(a.create_container(container()), b.create_container(container()));
    assert_eq!(first.unwrap().into_inner().container_id, second.unwrap().into_inner().container_id);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_and_labels_kept_exactly() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut one = Pod::run(&daemon, pod_config(&daemon, "one")).await;
    let mut two = Pod::run(&daemon, pod_config(&daemon, "two")).await;
    let running = one.start(container_config("running", &name, &["/bin/sleep", "1000"])).await;
    let mut config = container_config("ended", &name, &["/bin/true"]);
    config.annotations = [("weird key/ü".to_owned(), "välue\nwith lines".to_owned())].into();
    let ended = two.start(config.clone()).await;
    two.ended(&ended).await;
    let mut runtime = daemon.runtime().await;

    let mut list = async |filter: cri::ContainerFilter| {
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let mut ids: Vec<String> = runtime
            .list_containers(request)
            .await
            .unwrap()
            .into_inner()
            .containers
            .into_iter()
            .map(|c| c.id)
            .collect();
        ids.sort();
        ids
    };
    let mut both = vec![running.clone(), ended.clone()];
    both.sort();
    assert_eq!(list(cri::ContainerFilter::default()).await, both);
    let state = Some(cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning as i32 });
    assert_eq!(list(cri::ContainerFilter { state, ..Default::default() }).await, [running.as_str()]);
    assert_eq!(
        list(cri::ContainerFilter { pod_sandbox_id: two.id.clone(), ..Default::default() }).await,
        [ended.as_str()]
    );
    let label_selector = [("container".to_owned(), "ended".to_owned())].into();
    assert_eq!(list(cri::ContainerFilter { label_selector, ..Default::default() }).await, [ended.as_str()]);
    assert_eq!(
        list(cri::ContainerFilter { id: ended[..13].to_owned(), ..Default::default() }).await,
        [ended.as_str()]
    );

    let status = two.container(&ended).await;
    assert_eq!((status.annotations, status.labels), (config.annotations, config.labels));
    let status = one.status().await;
    assert_eq!(
        (status.annotations, status.labels),
        (one.config.annotations.clone(), one.config.labels.clone())
    );

    two.stop().await;
    let filter = cri::PodSandboxFilter {
        state: Some(cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady as i32 }),
        ..Default::default()
    };
    let pods = daemon
        .runtime()
        .await
        .list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) })
        .await
        .unwrap();
    assert_eq!(pods.into_inner().items.into_iter().map(|pod| pod.id).collect::<Vec<_>>(), [one.id.clone()]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_listed_described_and_removed_with_all_their_tags() {
    let registry = Registry::start();
    let busybox = image::busybox();
    let name = registry.push("busybox", "v1", &busybox);
    let second = registry.push("busybox", "v2", &busybox);
    let daemon = Daemon::start().await;
    let mut images = daemon.images().await;
    daemon.pull(&name).await;
    daemon.pull(&second).await;

    let list = images.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(list.len(), 1);
    let mut tags = list[0].repo_tags.clone();
    tags.sort();
    assert_eq!(tags, [name.clone(), second.clone()]);
    assert_eq!(list[0].id, busybox.id());
    assert!(list[0].size > 0 && list[0].repo_digests.len() == 1, "{list:?}");

    for reference in
        [name.clone(), busybox.id(), list[0].repo_digests[0].clone(), busybox.id()[7..].to_owned()]
    {
        let spec = Some(cri::ImageSpec { image: reference.clone(), ..Default::default() });
        let status = images
            .image_status(cri::ImageStatusRequest { image: spec, verbose: true })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(status.image.map(|image| image.id), Some(busybox.id()), "{reference}");
    }
    let usage = images.image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    let filesystem = &usage.image_filesystems[0];
    assert!(filesystem.used_bytes.as_ref().unwrap().value > 500_000);
    assert!(std::path::Path::new(&filesystem.fs_id.as_ref().unwrap().mountpoint).is_dir());

    let spec = Some(cri::ImageSpec { image: second, ..Default::default() });
    images.remove_image(cri::RemoveImageRequest { image: spec.clone() }).await.unwrap();
    images.remove_image(cri::RemoveImageRequest { image: spec.clone() }).await.unwrap();
    assert!(
        images.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty()
    );
    let status = images
        .image_status(cri::ImageStatusRequest { image: spec, verbose: false })
        .await
        .unwrap()
        .into_inner();
    assert!(status.image.is_none());
    assert!(daemon.try_pull(&format!("{}/no/such:image", registry.host())).await.is_err());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_log_is_reopened_without_a_lost_line() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "rotated")).await;
    let script = "i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); usleep 2000; done";
    let id = pod.start(container_config("main", &name, &["/bin/sh", "-c", script])).await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let path = pod.log_path("main");
    let old = path.with_extension("log.1");
    std::fs::rename(&path, &old).unwrap();
    daemon
        .runtime()
        .await
        .reopen_container_log(cri::ReopenContainerLogRequest { container_id: id.clone() })
        .await
        .unwrap();
    assert!(path.exists(), "the new file is there when the call returns");
    pod.ended(&id).await;
    let mut numbers = Vec::new();
    for file in [old, path] {
        let text = std::fs::read_to_string(file).unwrap();
        numbers.extend(text.lines().map(|line| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap()));
    }
    assert_eq!(numbers, (0..300).collect::<Vec<_>>());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lines_are_split_and_marked_partial() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "long")).await;
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo -n end";
    let id = pod.start(container_config("main", &name, &["/bin/sh", "-c", script])).await;
    pod.ended(&id).await;
    let raw = std::fs::read_to_string(pod.log_path("main")).unwrap();
    let shapes: Vec<(String, usize)> = raw
        .lines()
        .map(|line| {
            let parts: Vec<&str> = line.splitn(4, ' ').collect();
            (parts[2].to_owned(), parts[3].len())
        })
        .collect();
    assert_eq!(shapes[..3], [("P".into(), 16384), ("P".into(), 16384), ("F".into(), 40000 - 2 * 16384)]);
    assert_eq!(shapes[3].1, 3);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_container_has_one() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "terminal")).await;
    let mut config = container_config(
        "main",
        &name,
        &["/bin/sh", "-c", "tty; test -t 0 && test -t 1 && echo interactive"],
    );
    config.tty = true;
    config.stdin = true;
    let id = pod.start(config).await;
    assert_eq!(pod.ended(&id).await.exit_code, 0);
    let log = pod.log("main").replace('\r', "");
    assert_eq!(log, "/dev/pts/0\ninteractive\n");
    daemon.finish().await;
}
