//! Events of containers and pods, as an evented kubelet reads them.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

use cri::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
    ContainerStoppedEvent as Stopped,
};

async fn collect(
    events: &mut tonic::Streaming<cri::ContainerEventResponse>,
    count: usize,
) -> Vec<cri::ContainerEventResponse> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(hull_tests::patience(20), events.message()).await;
        found.push(next.expect("an event in time").unwrap().expect("the stream goes on"));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn every_subscriber_sees_every_change_once_in_order_and_committed() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut client = daemon.runtime().await;
    let mut one = client.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
    let mut other = client.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();

    // When a pod and a container go through their lives
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "events")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sh", "-c", "exit 3"])).await;
    pod.ended(&id).await;
    pod.remove_container(&id).await;
    pod.stop().await;
    pod.remove().await;

    // Then both subscribers see all of it, with the states that were committed
    let seen = collect(&mut one, 8).await;
    let kinds: Vec<_> =
        seen.iter().map(|event| (event.container_id.as_str(), event.container_event_type())).collect();
    let (container, sandbox) = (id.as_str(), pod.id.as_str());
    assert_eq!(
        kinds,
        [
            (sandbox, Created),
            (sandbox, Started),
            (container, Created),
            (container, Started),
            (container, Stopped),
            (container, Deleted),
            (sandbox, Stopped),
            (sandbox, Deleted),
        ]
    );
    assert!(seen.windows(2).all(|pair| pair[0].created_at < pair[1].created_at), "times are numbers");
    let stopped = &seen[4].containers_statuses[0];
    assert_eq!((stopped.id.as_str(), stopped.exit_code), (container, 3));
    assert!(seen[5].containers_statuses.is_empty(), "a deleted container has no status");
    let last = seen[6].pod_sandbox_status.as_ref().unwrap();
    assert_eq!(last.state, cri::PodSandboxState::SandboxNotready as i32);
    assert_eq!(collect(&mut other, 8).await, seen);

    // And a daemon that stops says so instead of waiting for its subscribers
    daemon.stop();
    assert_eq!(one.message().await.unwrap_err().code(), tonic::Code::Unavailable);
    daemon.restart().await;
    daemon.finish().await;
}
