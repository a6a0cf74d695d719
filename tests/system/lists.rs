//! The Stream* calls give what the lists give, in pieces that always fit.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::newer::list;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

const RUNTIME: [&str; 5] = [
    "/runtime.v1.RuntimeService/StreamPodSandboxes",
    "/runtime.v1.RuntimeService/StreamContainers",
    "/runtime.v1.RuntimeService/StreamContainerStats",
    "/runtime.v1.RuntimeService/StreamPodSandboxStats",
    "/runtime.v1.RuntimeService/StreamPodSandboxMetrics",
];
const IMAGES: &str = "/runtime.v1.ImageService/StreamImages";

/// kubernetes #134750: a list of thousands of dead containers was larger than a message may be.
#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_list_is_the_list_in_pieces() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut ids = Vec::new();
    for number in 0..2 {
        let mut pod = Pod::run(&daemon, pod_config(&daemon, &format!("pod{number}"))).await;
        ids.push(pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await);
        // Each of these is large enough that few of them fit into one piece.
        for extra in 0..20 {
            let mut config = container_config(&format!("extra{extra}"), &name, &["/bin/true"]);
            config.annotations = [("long".to_owned(), "x".repeat(200 << 10))].into();
            pod.create(config).await.unwrap();
        }
    }
    let mut client = daemon.runtime().await;
    let channel = || daemon.channel();

    let pods = client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner();
    let (streamed, _) =
        list::<cri::PodSandboxFilter, cri::PodSandbox>(channel().await, RUNTIME[0], None).await.unwrap();
    assert_eq!(streamed, pods.items);

    let all = client.list_containers(cri::ListContainersRequest::default()).await.unwrap().into_inner();
    let (streamed, pieces) =
        list::<cri::ContainerFilter, cri::Container>(channel().await, RUNTIME[1], None).await.unwrap();
    assert_eq!(streamed, all.containers);
    assert!(pieces > 1, "{} containers in one piece", streamed.len());
    let running = cri::ContainerFilter {
        state: Some(cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning as i32 }),
        ..Default::default()
    };
    let (filtered, _) = list::<_, cri::Container>(channel().await, RUNTIME[1], Some(running)).await.unwrap();
    let mut found: Vec<_> = filtered.into_iter().map(|container| container.id).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids);

    let (stats, _) =
        list::<cri::ContainerStatsFilter, cri::ContainerStats>(channel().await, RUNTIME[2], None)
            .await
            .unwrap();
    let mut measured: Vec<_> = stats.into_iter().filter_map(|one| Some(one.attributes?.id)).collect();
    measured.retain(|id| ids.contains(id));
    measured.sort();
    assert_eq!(measured, ids);
    let (stats, _) =
        list::<cri::PodSandboxStatsFilter, cri::PodSandboxStats>(channel().await, RUNTIME[3], None)
            .await
            .unwrap();
    assert_eq!(stats.len(), 2);
    let (metrics, _) =
        list::<hull_tests::newer::Empty, cri::PodSandboxMetrics>(channel().await, RUNTIME[4], None)
            .await
            .unwrap();
    assert_eq!(metrics.len(), 2);
    assert!(metrics.iter().all(|pod| !pod.container_metrics.is_empty()));

    let images =
        daemon.images().await.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner();
    let (streamed, _) = list::<cri::ImageFilter, cri::Image>(channel().await, IMAGES, None).await.unwrap();
    assert_eq!(streamed, images.images);
    daemon.finish().await;
}
