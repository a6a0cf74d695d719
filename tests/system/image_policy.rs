//! The image policy and pinned images, through the real socket.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use tonic::Code;

use crate::cli::Hull;

/// A policy file in a directory of its own, and the configuration that names it.
struct Policy(tempfile::TempDir);

impl Policy {
    fn new(text: &str) -> Self {
        let policy = Self(tempfile::tempdir().unwrap());
        policy.write(text);
        policy
    }

    fn write(&self, text: &str) {
        std::fs::write(self.0.path().join("policy.toml"), text).unwrap();
    }

    fn config(&self) -> String {
        format!("[image]\npolicy = \"{}\"\n", self.0.path().join("policy.toml").display())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_policy_accepts_is_pulled_and_run() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let digest = image::digest(image::busybox().manifest());
    let by_digest = format!("{}/team/app@{digest}", registry.host());
    let policy = Policy::new("default = \"reject\"\n");
    let daemon = Daemon::start_with("mode = \"builtin\"\n", &policy.config()).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "policy")).await;

    // At the pull; kubelet reads the message's first word if the code is Unknown
    let refused = daemon.try_pull(&name).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unknown);
    let message = refused.message();
    assert!(message.starts_with("SignatureValidationFailed: the image policy "), "{message}");
    assert!(message.contains("policy.toml") && message.contains("default"), "{message}");
    assert!(Hull::of(&daemon).fails(125, &["pull", &name]).contains("default"));

    // A rule, read while hulld runs; the line is that of its pattern
    let rule = |action: &str| {
        let host = registry.host();
        format!("default = \"reject\"\n\n[[rule]]\nimage = \"{host}/team/**\"\naction = \"{action}\"\n")
    };
    policy.write(&rule("require-digest"));
    let message = daemon.try_pull(&name).await.unwrap_err().message().to_owned();
    assert!(message.contains("policy.toml:4") && message.contains("wants a digest for"), "{message}");
    let id = daemon.try_pull(&by_digest).await.unwrap();
    policy.write(&rule("accept"));
    assert_eq!(daemon.try_pull(&name).await.unwrap(), id);

    // At the creation again: the policy may have changed since
    let container = |number: usize, image: &str, written: &str| {
        let mut config = container_config(&format!("c{number}"), image, &["true"]);
        config.image.as_mut().unwrap().user_specified_image = written.to_owned();
        config
    };
    pod.create(container(1, &id, &name)).await.unwrap();
    policy.write(&rule("require-digest"));
    let refused = pod.create(container(2, &id, &name)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("policy.toml:4"), "{}", refused.message());
    pod.create(container(3, &id, &by_digest)).await.unwrap();
    pod.create(container(4, &by_digest, "")).await.unwrap();
    policy.write(&rule("reject"));
    for (image, written) in [(&*id, ""), (&*id, &*name), (&*name, ""), (&*by_digest, "")] {
        pod.create(container(5, image, written)).await.unwrap_err();
    }
    // A name that means another image, or none, says nothing
    pod.create(container(6, &id, "registry.example/good:1")).await.unwrap_err();

    // An image volume is an image too
    policy.write(&rule("accept"));
    let mut config = container(7, &id, &name);
    config.mounts.push(cri::Mount {
        container_path: "/data".into(),
        image: Some(cri::ImageSpec { image: name.clone(), ..Default::default() }),
        readonly: true,
        ..Default::default()
    });
    pod.create(config.clone()).await.unwrap();

    // What is wrong with the file closes the door, and says where
    policy.write("default = \"accept\"\n[[rule]]\nimage = \"busybox\"\naction = \"accept\"\n");
    let message = daemon.try_pull(&name).await.unwrap_err().message().to_owned();
    assert!(message.contains("policy.toml:3") && message.contains("registry"), "{message}");
    pod.create(container(8, &id, &name)).await.unwrap_err();

    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_say_so_and_are_not_collected() {
    let registry = Registry::start();
    let one = registry.push("infra/pause", "3.10", &image::busybox());
    let host = registry.host();
    let config = format!("[image]\npinned = [\"{host}/infra/*:3.*\"]\n");
    let daemon = Daemon::start_with("mode = \"builtin\"\n", &config).await;
    let id = daemon.pull(&one).await;
    let other = registry.push("team/app", "1", &image::Image::new(Vec::new(), serde_json::json!({})));
    let other_id = daemon.pull(&other).await;

    let mut client = daemon.images().await;
    let listed = client.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images;
    let pinned = |id: &str| listed.iter().find(|image| image.id == id).unwrap().pinned;
    assert!(pinned(&id) && !pinned(&other_id));
    let spec = Some(cri::ImageSpec { image: one.clone(), ..Default::default() });
    let status = client.image_status(cri::ImageStatusRequest { image: spec, verbose: false }).await.unwrap();
    assert!(status.into_inner().image.unwrap().pinned);

    let hull = Hull::of(&daemon);
    hull.ok(&["image", "prune", "--all"]);
    assert_eq!(hull.ok(&["images", "--quiet"]).lines().count(), 1);
    assert!(hull.ok(&["inspect", &one]).contains(&id));
    // Whoever names it may remove it
    hull.ok(&["rmi", &one]);
    assert_eq!(hull.ok(&["images", "--quiet"]), "");
    daemon.finish().await;
}
