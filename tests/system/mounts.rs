//! Volumes: what kubelet mounts, and how changes travel.

use std::os::unix::fs::PermissionsExt;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::newer;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

fn mount(host: &std::path::Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_and_files_are_mounted_read_write_and_read_only() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let volume = daemon.path("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "from the host\n").unwrap();
    std::fs::write(daemon.path("termination"), "").unwrap();
    std::os::unix::fs::symlink(&volume, daemon.path("link")).unwrap();
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "volumes")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![
        mount(&volume, "/volume"),
        cri::Mount { readonly: true, ..mount(&volume, "/deep/in/it/readonly") },
        mount(&volume.join("file"), "/etc/single"),
        mount(&daemon.path("link"), "/linked"),
        mount(&daemon.path("termination"), "/dev/termination-log"),
        mount(&daemon.path("made"), "/made"),
    ];
    let id = pod.start(config).await;

    assert_eq!(
        pod.shell(&id, "cat /volume/file /etc/single /linked/file").await,
        "from the host\n".repeat(3)
    );
    pod.shell(&id, "echo back > /volume/back; echo over > /dev/termination-log; echo x > /made/x").await;
    assert_eq!(std::fs::read_to_string(volume.join("back")).unwrap(), "back\n");
    assert_eq!(std::fs::read_to_string(daemon.path("termination")).unwrap(), "over\n");
    assert!(daemon.path("made/x").exists(), "a missing source directory is made");
    assert_ne!(pod.exec(&id, &["touch", "/deep/in/it/readonly/x"]).await.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn propagation_is_as_asked() {
    if hull_tests::microvm::excepted("Bidirectional propagation is refused") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let shared = daemon.path("shared");
    std::fs::create_dir(&shared).unwrap();
    let run = |arguments: &[&str]| {
        let status = std::process::Command::new("mount").args(arguments).status().unwrap();
        assert!(status.success(), "mount {arguments:?}");
    };
    let path = shared.display().to_string();
    run(&["--bind", &path, &path]);
    run(&["--make-shared", &path]);
    std::fs::create_dir(shared.join("later")).unwrap();
    std::fs::create_dir(shared.join("inside")).unwrap();

    let mut config = pod_config(&daemon, "propagation");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let mut pod = Pod::run(&daemon, config).await;
    let mut ids = Vec::new();
    for (number, propagation) in [
        cri::MountPropagation::PropagationPrivate,
        cri::MountPropagation::PropagationHostToContainer,
        cri::MountPropagation::PropagationBidirectional,
    ]
    .into_iter()
    .enumerate()
    {
        let mut config = container_config(&format!("c{number}"), &name, &["/bin/sleep", "1000"]);
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
        config.mounts = vec![cri::Mount { propagation: propagation as i32, ..mount(&shared, "/shared") }];
        ids.push(pod.start(config).await);
    }

    // A mount that the host makes afterwards
    run(&["-t", "tmpfs", "none", &format!("{path}/later")]);
    std::fs::write(shared.join("later/seen"), "").unwrap();
    let mut seen = Vec::new();
    for id in &ids {
        seen.push(pod.exec(id, &["test", "-e", "/shared/later/seen"]).await.exit_code == 0);
    }
    assert_eq!(seen, [false, true, true]);

    // A mount that a container makes
    pod.shell(&ids[1], "mount -t tmpfs none /shared/inside && touch /shared/inside/slave").await;
    assert!(!shared.join("inside/slave").exists(), "HostToContainer goes one way");
    pod.shell(&ids[2], "mount -t tmpfs none /shared/inside && touch /shared/inside/both").await;
    assert!(shared.join("inside/both").exists(), "Bidirectional reaches the host");

    daemon.remove_all_pods().await;
    for sub in ["/inside", "/later", ""] {
        let status = std::process::Command::new("umount").arg(format!("{path}{sub}")).status().unwrap();
        assert!(status.success());
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recursive_read_only_reaches_submounts() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let volume = daemon.path("volume");
    std::fs::create_dir_all(volume.join("sub")).unwrap();
    let sub = volume.join("sub").display().to_string();
    assert!(
        std::process::Command::new("mount").args(["-t", "tmpfs", "none", &sub]).status().unwrap().success()
    );
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "rro")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![
        cri::Mount { readonly: true, ..mount(&volume, "/ro") },
        cri::Mount { readonly: true, recursive_read_only: true, ..mount(&volume, "/rro") },
    ];
    let id = pod.start(config).await;
    let plain = pod.exec(&id, &["touch", "/ro/sub/x"]).await.exit_code;
    // Machines get every mount below read-only too.
    assert_eq!(plain == 0, !hull_tests::microvm::by_default(), "plain read-only covers the top only");
    assert_ne!(pod.exec(&id, &["touch", "/rro/sub/y"]).await.exit_code, 0);
    assert_ne!(pod.exec(&id, &["touch", "/rro/y"]).await.exit_code, 0);

    // CRI: recursive read-only needs readonly and private propagation
    let mut config = container_config("wrong", &name, &["/bin/true"]);
    config.mounts = vec![cri::Mount { recursive_read_only: true, ..mount(&volume, "/x") }];
    assert!(pod.start_fails(config).await.message().contains("read"), "refused");
    daemon.remove_all_pods().await;
    assert!(std::process::Command::new("umount").arg(&sub).status().unwrap().success());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_hostname_and_resolv_conf_are_the_pods() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = networked_pod_config(&daemon, "named");
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    let mut pod = Pod::run(&daemon, config).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!(pod.shell(&id, "cat /etc/hostname").await, "named\n");
    let resolv = pod.shell(&id, "cat /etc/resolv.conf").await;
    for wanted in ["nameserver 10.96.0.10", "search svc.cluster.local", "options ndots:5"] {
        assert!(resolv.contains(wanted), "{resolv}");
    }
    assert!(pod.shell(&id, "cat /etc/hosts").await.contains("localhost"));

    // kubelet brings its own /etc/hosts
    std::fs::write(daemon.path("hosts"), "127.0.0.1 mine\n").unwrap();
    let mut config = container_config("own", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![mount(&daemon.path("hosts"), "/etc/hosts")];
    let id = pod.start(config).await;
    assert_eq!(pod.shell(&id, "cat /etc/hosts").await, "127.0.0.1 mine\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_root_is_read_only_and_its_mounts_are_not() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    std::fs::create_dir(daemon.path("volume")).unwrap();
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "readonly")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().readonly_rootfs = true;
    config.mounts = vec![mount(&daemon.path("volume"), "/not/in/image")];
    let id = pod.start(config).await;
    assert_ne!(pod.exec(&id, &["touch", "/x"]).await.exit_code, 0);
    assert_eq!(pod.exec(&id, &["touch", "/not/in/image/x", "/dev/shm/x"]).await.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_a_read_only_volume_and_stays_while_it_is_used() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let data = image::Image::new(
        vec![
            (
                image::busybox_layer().directory("data").owned_file("data/of-web", 0o640, 1000, b"of web\n"),
                image::Packing::Gzip,
            ),
            (
                image::Layer::default().without("data/missing").file("data/new", 0o644, b"new\n"),
                image::Packing::Zstd,
            ),
        ],
        serde_json::json!({}),
    );
    let volume = registry.push("data", "v1", &data);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let id_of_volume = daemon.pull(&volume).await;
    let image_mount = |image: &str| cri::Mount {
        container_path: "/volume".into(),
        readonly: true,
        image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let mut user_namespace = networked_pod_config(&daemon, "userns");
    let ids = vec![cri::IdMapping { host_id: 300_000, container_id: 0, length: 65_536 }];
    let context = user_namespace.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap().userns_options = Some(cri::UserNamespace {
        mode: cri::NamespaceMode::Pod as i32,
        uids: ids.clone(),
        gids: ids.clone(),
    });
    for (config, mappings) in [(pod_config(&daemon, "plain"), Vec::new()), (user_namespace, ids)] {
        let mut pod = Pod::run(&daemon, config).await;
        for (number, asked) in [id_of_volume.as_str(), volume.as_str()].into_iter().enumerate() {
            let mut config = container_config(&format!("c{number}"), &name, &["/bin/sleep", "1000"]);
            let (uid_mappings, gid_mappings) = (mappings.clone(), mappings.clone());
            config.mounts = vec![cri::Mount { uid_mappings, gid_mappings, ..image_mount(asked) }];
            let id = pod.start(config).await;
            let seen = pod
                .shell(&id, "cat /volume/data/of-web /volume/data/new; stat -c %u /volume/data/of-web")
                .await;
            assert_eq!(seen, "of web\nnew\n1000\n");
            assert_eq!(pod.shell(&id, "ls /volume/data; /volume/bin/echo runs").await, "new\nof-web\nruns\n");
            let refused = pod.exec(&id, &["touch", "/volume/x"]).await;
            assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
        }
    }

    let mut pod = Pod::run(&daemon, pod_config(&daemon, "other")).await;
    let with = |mount: cri::Mount| {
        let mut config = container_config("refused", &name, &["/bin/true"]);
        config.mounts = vec![mount];
        config
    };
    let status = pod.create(with(image_mount("127.0.0.1:1/nothing:here"))).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
    for mount in [
        cri::Mount { readonly: false, ..image_mount(&volume) },
        cri::Mount { host_path: "/tmp".into(), ..image_mount(&volume) },
        image_mount(""),
    ] {
        let status = pod.create(with(mount)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }

    // Made before the image was removed, started after it.
    let mut config = with(image_mount(&volume));
    config.metadata.as_mut().unwrap().name = "late".into();
    config.command = vec!["/bin/cat".into(), "/volume/data/new".into()];
    config.log_path = "late.log".into();
    let container_id = pod.create(config).await.unwrap();
    let image = cri::ImageSpec { image: id_of_volume, ..Default::default() };
    daemon.images().await.remove_image(cri::RemoveImageRequest { image: Some(image) }).await.unwrap();
    pod.client()
        .start_container(cri::StartContainerRequest { container_id: container_id.clone() })
        .await
        .unwrap();
    assert_eq!(pod.ended(&container_id).await.exit_code, 0);
    assert_eq!(pod.log("late"), "new\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_an_image_is_a_volume_and_nothing_outside_of_it() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let layer = image::Layer::default()
        .directory("models")
        .directory("models/small")
        .file("models/small/weights", 0o644, b"weights\n")
        .file("models/readme", 0o644, b"read me\n")
        .symlink("current", "models/small")
        .symlink("out", "../../../etc");
    let data = image::Image::new(vec![(layer, image::Packing::Gzip)], serde_json::json!({}));
    let volume = registry.push("data", "v1", &data);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    daemon.pull(&volume).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "parts")).await;
    let spec = newer::ImageSpec { image: volume.clone(), ..Default::default() };
    let config = |container: &str, paths: &[(&str, &str)], script: &str| {
        let mount = |(at, path): &(&str, &str)| newer::Mount {
            container_path: (*at).to_owned(),
            readonly: true,
            image: Some(spec.clone()),
            image_sub_path: (*path).to_owned(),
            ..Default::default()
        };
        let plain = container_config(container, &name, &["/bin/sh", "-c", script]);
        newer::ContainerConfig { mounts: paths.iter().map(mount).collect(), ..plain.into() }
    };

    // A directory, the same by a link inside the image, and a file
    let paths = [("/dir", "models"), ("/link", "current"), ("/file", "/models/readme"), ("/all", "")];
    let script = "cat /dir/small/weights /link/weights /file; ls /dir /all; touch /dir/x 2>&1";
    let parts = config("parts", &paths, script);
    let container_id = newer::start(daemon.channel().await, &pod, parts).await.unwrap();
    assert_eq!(pod.ended(&container_id).await.exit_code, 1, "it is read-only");
    // The status tells which image it is
    let request = cri::ContainerStatusRequest { container_id, verbose: false };
    let path = "/runtime.v1.RuntimeService/ContainerStatus";
    let told: newer::ContainerStatusResponse =
        newer::call(daemon.channel().await, path, request).await.unwrap();
    let mounts = told.status.unwrap().mounts;
    assert_eq!(mounts.len(), paths.len());
    assert!(mounts.iter().all(|mount| mount.image.as_ref().unwrap().image_ref == data.id()), "{mounts:?}");
    let log = pod.log("parts");
    let wanted = "weights\nweights\nread me\n/all:\ncurrent\nmodels\nout\n\n/dir:\nreadme\nsmall\n";
    let (shown, refused) = log.split_at(wanted.len().min(log.len()));
    // busybox lists directories by name, whatever the order that they were named in
    assert_eq!(shown, wanted);
    assert!(refused.contains("Read-only file system"), "{refused}");

    // What is not there, or leads out of the image, is refused by name before anything is made
    for path in ["missing", "models/readme/below", "out", "../models"] {
        let refused = config("refused", &[("/volume", path)], "true");
        let outcome = newer::create(daemon.channel().await, &pod, refused).await;
        match path {
            // There is nothing above the root of an image.
            "../models" => drop(outcome.unwrap()),
            _ => {
                let status = outcome.unwrap_err();
                assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
                assert!(status.message().contains(path), "{status}");
            }
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_has_the_options_that_are_asked_for() {
    if hull_tests::microvm::excepted("host paths come with nosuid, nodev and noexec always") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let volume = daemon.path("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("script"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(volume.join("script"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "options")).await;
    let with = |container: &str, options: &[&str]| {
        let mount_options = options.iter().map(|option| (*option).to_owned()).collect();
        let host_path = volume.display().to_string();
        let mount =
            newer::Mount { container_path: "/v".into(), host_path, mount_options, ..Default::default() };
        let plain = container_config(container, &name, &["/bin/sleep", "1000"]);
        newer::ContainerConfig { mounts: vec![mount], ..plain.into() }
    };
    let channel = || daemon.channel();
    let plain = newer::start(channel().await, &pod, with("plain", &[])).await.unwrap();
    assert_eq!(pod.shell(&plain, "/v/script").await, "ran\n");
    let all = with("all", &["noexec", "nosuid", "nodev", "noatime"]);
    let strict = newer::start(channel().await, &pod, all).await.unwrap();
    let refused = pod.exec(&strict, &["/bin/sh", "-c", "/v/script"]).await;
    assert_eq!((refused.exit_code, refused.stdout.len()), (126, 0), "noexec: {refused:?}");
    let mounts = pod.shell(&strict, "grep ' /v ' /proc/self/mountinfo").await;
    let of_mount: Vec<&str> = mounts.split(' ').nth(5).unwrap().split(',').collect();
    for option in ["rw", "noexec", "nosuid", "nodev", "noatime"] {
        assert!(of_mount.contains(&option), "{option}: {mounts}");
    }
    let refused = newer::create(channel().await, &pod, with("wrong", &["noexec", "bind"])).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("\"bind\""), "{refused}");
    daemon.finish().await;
}
