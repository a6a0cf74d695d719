//! Volumes whose server does not answer.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_answer_fails_the_start_and_nothing_else() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    // Given a file system whose server never says a word
    let point = daemon.path("dead");
    std::fs::create_dir(&point).unwrap();
    let server = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0\0", server.as_raw_fd());
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
    mount("dead", &point, "fuse", MountFlags::NODEV, options).unwrap();

    let mut pod = Pod::run(&daemon, pod_config(&daemon, "dead")).await;
    let healthy = pod.start(container_config("healthy", &name, &["/bin/sleep", "1000"])).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![cri::Mount {
        host_path: point.join("volume").display().to_string(),
        container_path: "/volume".into(),
        ..Default::default()
    }];
    let container_id = pod.create(config).await.unwrap();
    let begun = Instant::now();
    let mut client = pod.client();
    let start =
        tokio::spawn(
            async move { client.start_container(cri::StartContainerRequest { container_id }).await },
        );
    // Then other containers of the pod go on meanwhile,
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(pod.output(&healthy, &["/bin/echo", "well"]).await, "well\n");
    pod.start(container_config("another", &name, &["/bin/true"])).await;
    // the start fails and says what it waited for,
    let refused = start.await.unwrap().expect_err("it cannot start");
    assert!(
        refused.message().contains("dead/volume") && refused.message().contains("not answered"),
        "{refused}"
    );
    assert!(begun.elapsed() < hull_tests::patience(40), "{:?}", begun.elapsed());
    // and no process is left waiting.
    hull_tests::eventually("the helper is gone", hull_tests::patience(10), async || {
        (!crate::survival::running("hulld-reach")).then_some(())
    })
    .await;
    unmount(&point, UnmountFlags::DETACH).unwrap();
    drop(server);
    daemon.finish().await;
}
