//! What went wrong in other runtimes, by the rows of the lessons that concern pods and containers and have no test
//! nearer to the code.

use std::time::{Duration, Instant};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use rustix::process::{Pid, Signal, kill_process};

use crate::survival::{agent_of, running};

/// "failed to reserve container name" (containerd #4604, #9947): after a client's deadline the retry failed for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_a_clients_deadline_gets_what_the_first_try_made() {
    let daemon = Daemon::start().await;
    let config = pod_config(&daemon, "retried");
    let run = async || {
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: hull_tests::microvm::default_handler(),
        };
        Ok::<_, tonic::Status>(
            daemon.runtime().await.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id,
        )
    };
    for _ in 0..3 {
        // Given up at once, long before a pod can be there.
        let _ = tokio::time::timeout(Duration::from_millis(2), run()).await;
    }
    let id = run().await.unwrap();
    assert_eq!(run().await.unwrap(), id);
    let pods = daemon.runtime().await.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap();
    assert_eq!(pods.into_inner().items.len(), 1);
    daemon.finish().await;
}

/// A command without a time limit ran on for ever once its caller had gone.
#[tokio::test(flavor = "multi_thread")]
async fn an_exec_whose_client_has_gone_is_ended() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "exec")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let given_up =
        tokio::time::timeout(Duration::from_millis(500), pod.try_exec(&id, &["/bin/sleep", "7791"], 0));
    given_up.await.expect_err("it does not end");
    hull_tests::eventually("the command is gone", hull_tests::patience(2), async || {
        (!running("sleep\u{0}7791")).then_some(())
    })
    .await;
    daemon.finish().await;
}

/// A pod whose agent hangs, even in the middle of a start, can be stopped and removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_agent_hangs_in_a_start_can_be_stopped() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "hanging")).await;
    pod.start(container_config("main", &name, &["/bin/sleep", "7792"])).await;
    let agent = Pid::from_raw(agent_of(&daemon, &pod.id).await).unwrap();
    kill_process(agent, Signal::STOP).unwrap();

    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(container_config("second", &name, &["/bin/sleep", "7793"])),
        sandbox_config: Some(pod.config.clone()),
    };
    let mut client = pod.client();
    let container_id = client.create_container(request).await.unwrap().into_inner().container_id;
    let start =
        tokio::spawn(
            async move { client.start_container(cri::StartContainerRequest { container_id }).await },
        );
    tokio::time::sleep(Duration::from_millis(500)).await;

    let begun = Instant::now();
    pod.stop().await;
    assert!(begun.elapsed() < hull_tests::patience(60), "{:?}", begun.elapsed());
    start.await.unwrap().expect_err("the start was broken off");
    assert!(!running("sleep\u{0}7792") && !running("sleep\u{0}7793"));
    pod.remove().await;
    daemon.finish().await;
}

/// "layer not known" (CRI-O #9856): an image may go while its containers stay, and so do their layers.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_outlives_its_image() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "orphan")).await;
    let id =
        pod.create(container_config("main", &name, &["/bin/sh", "-c", "ls /bin/busybox"])).await.unwrap();
    let image = Some(cri::ImageSpec { image: name.clone(), ..Default::default() });
    daemon.images().await.remove_image(cri::RemoveImageRequest { image }).await.unwrap();
    daemon.kill();
    daemon.restart().await;
    pod.reconnect(&daemon).await;
    pod.client().start_container(cri::StartContainerRequest { container_id: id.clone() }).await.unwrap();
    assert_eq!(pod.ended(&id).await.exit_code, 0);
    daemon.finish().await;
}
