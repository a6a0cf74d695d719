//! What requests ask for in fields that the other files do not reach, and requests that make no sense.

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Packing};
use hull_tests::newer;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::json;
use tonic::Code;

/// Numbers of CRI's `Signal`.
const SIGQUIT: i32 = 18;
const SIGUSR1: i32 = 29;

#[tokio::test(flavor = "multi_thread")]
async fn the_images_groups_are_merged_or_left_out_as_asked_and_the_status_tells() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "groups")).await;
    // The image has its user 1000 in the groups 29 and 44
    for (policy, wanted) in [
        (cri::SupplementalGroupsPolicy::Merge, vec![29, 44, 1000, 4000]),
        (cri::SupplementalGroupsPolicy::Strict, vec![1000, 4000]),
    ] {
        let mut config = container_config(policy.as_str_name(), &name, &["/bin/sleep", "1000"]);
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(cri::Int64Value { value: 1000 });
        context.supplemental_groups = vec![4000];
        context.supplemental_groups_policy = policy as i32;
        let id = pod.start(config).await;
        let groups = pod.shell(&id, "grep Groups: /proc/1/status").await;
        let mut groups: Vec<i64> =
            groups.split_whitespace().skip(1).map(|group| group.parse().unwrap()).collect();
        if !groups.contains(&1000) {
            groups.push(1000);
        }
        groups.sort_unstable();
        assert_eq!(groups, wanted, "{policy:?}");
        let user = pod.container(&id).await.user.unwrap().linux.unwrap();
        let mut told = user.supplemental_groups;
        if !told.contains(&1000) {
            told.push(1000);
        }
        told.sort_unstable();
        assert_eq!((user.uid, user.gid, told), (1000, 1000, wanted), "{policy:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_stopped_by_the_requests_signal_or_by_the_images() {
    let registry = Registry::start();
    let packed = vec![(image::busybox_layer(), Packing::Gzip)];
    let stops = Image::new(packed, json!({"Env": ["PATH=/bin"], "StopSignal": "SIGQUIT"}));
    let name = registry.push("stops", "v1", &stops);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "signals")).await;
    let script =
        "trap 'exit 3' QUIT; trap 'exit 4' USR1; trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    for (signal, told, code) in [(0, SIGQUIT, 3), (SIGUSR1, SIGUSR1, 4)] {
        let case = format!("signal{signal}");
        let plain = container_config(&case, &name, &["/bin/sh", "-c", script]);
        let config = newer::ContainerConfig { stop_signal: signal, ..plain.into() };
        let id = newer::start(daemon.channel().await, &pod, config).await.unwrap();
        let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let path = "/runtime.v1.RuntimeService/ContainerStatus";
        let status: newer::ContainerStatusResponse =
            newer::call(daemon.channel().await, path, request).await.unwrap();
        assert_eq!(status.status.unwrap().stop_signal, told);
        hull_tests::eventually("its traps are set", hull_tests::patience(10), async || {
            pod.log(&case).contains("ready").then_some(())
        })
        .await;
        pod.stop_container(&id, 300).await;
        assert_eq!(pod.ended(&id).await.exit_code, code);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn masked_and_read_only_paths_are_those_that_are_asked_for() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "paths")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.masked_paths = ["/greeting", "/data", "/proc/uptime", "/not/there"].map(str::to_owned).to_vec();
    context.readonly_paths = ["/home", "/not/there/either"].map(str::to_owned).to_vec();
    let id = pod.start(config).await;
    assert_eq!(pod.shell(&id, "cat /greeting /proc/uptime; ls /data").await, "");
    let refused = pod.exec(&id, &["touch", "/home/x"]).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
    // They take the place of the usual ones
    assert_eq!(pod.shell(&id, "touch /tmp/x && echo written").await, "written\n");
    assert!(pod.shell(&id, "wc -c < /proc/timer_list 2>/dev/null || echo 1").await.trim() != "0");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_handlers_are_told_to_do_they_do() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let status =
        daemon.runtime().await.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let mut names: Vec<&str> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["", "microvm", "process"]);
    let features = |name: &str| {
        let handler = status.runtime_handlers.iter().find(|handler| handler.name == name).unwrap();
        handler.features.unwrap()
    };
    assert_eq!(features(""), features("process"));
    assert!(status.features.unwrap().supplemental_groups_policy);
    assert!(status.runtime_handlers.iter().all(|one| one.features.unwrap().recursive_read_only_mounts));
    // A user namespace can be had exactly where one is promised
    let mut config = networked_pod_config(&daemon, "users");
    let ids = vec![cri::IdMapping { host_id: 300_000, container_id: 0, length: 65_536 }];
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap().userns_options =
        Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod as i32, uids: ids.clone(), gids: ids });
    let made = Pod::try_run_by(&daemon, "process", config).await;
    assert_eq!(made.is_ok(), features("process").user_namespaces, "{:?}", made.err());
    let refused = Pod::try_run_by(&daemon, "runc", pod_config(&daemon, "unknown")).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("\"runc\"") && refused.message().contains("process"), "{refused}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_on_garbage_find_nothing() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let image = daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "listed")).await;
    pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let (mut runtime, mut images) = (daemon.runtime().await, daemon.images().await);
    let long = "f".repeat(100_000);
    for garbage in ["../..", "sha256:", " ", "\0", "*", "é", "%", long.as_str()] {
        let id = garbage.to_owned();
        let labels = || [(id.clone(), id.clone())].into();
        let filters = [
            cri::ContainerFilter { id: id.clone(), ..Default::default() },
            cri::ContainerFilter { pod_sandbox_id: id.clone(), ..Default::default() },
            cri::ContainerFilter { label_selector: labels(), ..Default::default() },
            cri::ContainerFilter {
                state: Some(cri::ContainerStateValue { state: -7 }),
                ..Default::default()
            },
        ];
        for filter in filters {
            let request = cri::ListContainersRequest { filter: Some(filter) };
            let found = runtime.list_containers(request).await.unwrap().into_inner().containers;
            assert!(found.is_empty(), "{garbage:?}");
        }
        let filter = cri::PodSandboxFilter { id: id.clone(), ..Default::default() };
        let request = cri::ListPodSandboxRequest { filter: Some(filter) };
        assert!(runtime.list_pod_sandbox(request).await.unwrap().into_inner().items.is_empty());
        let filter = cri::ContainerStatsFilter { id: id.clone(), ..Default::default() };
        let request = cri::ListContainerStatsRequest { filter: Some(filter) };
        assert!(runtime.list_container_stats(request).await.unwrap().into_inner().stats.is_empty());
        let filter = cri::PodSandboxStatsFilter { id: id.clone(), ..Default::default() };
        let request = cri::ListPodSandboxStatsRequest { filter: Some(filter) };
        assert!(runtime.list_pod_sandbox_stats(request).await.unwrap().into_inner().stats.is_empty());
        let spec = Some(cri::ImageSpec { image: id.clone(), ..Default::default() });
        let filter = Some(cri::ImageFilter { image: spec.clone() });
        let request = cri::ListImagesRequest { filter };
        assert!(images.list_images(request).await.unwrap().into_inner().images.is_empty());
        let request = cri::ImageStatusRequest { image: spec.clone(), verbose: true };
        assert!(images.image_status(request).await.unwrap().into_inner().image.is_none(), "{garbage:?}");
        // And whoever removes or stops it does nothing to anybody
        images.remove_image(cri::RemoveImageRequest { image: spec }).await.unwrap();
        let request = cri::StopContainerRequest { container_id: id.clone(), timeout: 0 };
        runtime.stop_container(request).await.unwrap();
        runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id }).await.unwrap();
    }
    let left = images.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(left.into_iter().map(|image| image.id).collect::<Vec<_>>(), [image]);
    let state = Some(cri::ContainerStateValue { state: cri::ContainerState::ContainerRunning as i32 });
    let filter = Some(cri::ContainerFilter { state, ..Default::default() });
    let request = cri::ListContainersRequest { filter };
    assert_eq!(runtime.list_containers(request).await.unwrap().into_inner().containers.len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_about_nothing_are_answered_with_the_right_code() {
    let daemon = Daemon::start().await;
    let mut runtime = daemon.runtime().await;
    let nobody = || "0123456789abcdef".repeat(4);
    let (id, sandbox) = (nobody(), nobody());
    let request = cri::ExecSyncRequest { container_id: nobody(), cmd: vec!["true".into()], timeout: 1 };
    let mut codes = vec![("ExecSync", runtime.exec_sync(request).await.map(drop).err())];
    let request = cri::ExecRequest {
        container_id: nobody(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    codes.push(("Exec", runtime.exec(request).await.map(drop).err()));
    let request = cri::AttachRequest { container_id: nobody(), stdout: true, ..Default::default() };
    codes.push(("Attach", runtime.attach(request).await.map(drop).err()));
    let request = cri::PortForwardRequest { pod_sandbox_id: nobody(), port: vec![80] };
    codes.push(("PortForward", runtime.port_forward(request).await.map(drop).err()));
    let request = cri::ReopenContainerLogRequest { container_id: nobody() };
    codes.push(("ReopenContainerLog", runtime.reopen_container_log(request).await.map(drop).err()));
    let request = cri::UpdateContainerResourcesRequest { container_id: nobody(), ..Default::default() };
    codes.push((
        "UpdateContainerResources",
        runtime.update_container_resources(request).await.map(drop).err(),
    ));
    let request = cri::StartContainerRequest { container_id: nobody() };
    codes.push(("StartContainer", runtime.start_container(request).await.map(drop).err()));
    let request = cri::ContainerStatsRequest { container_id: id };
    codes.push(("ContainerStats", runtime.container_stats(request).await.map(drop).err()));
    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: sandbox };
    codes.push(("PodSandboxStats", runtime.pod_sandbox_stats(request).await.map(drop).err()));
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: nobody(),
        config: Some(container_config("main", "busybox", &["true"])),
        sandbox_config: Some(pod_config(&daemon, "nobody")),
    };
    codes.push(("CreateContainer", runtime.create_container(request).await.map(drop).err()));
    for (call, error) in codes {
        let error = error.unwrap_or_else(|| panic!("{call} found something"));
        assert_eq!(error.code(), Code::NotFound, "{call}: {error}");
        assert!(error.message().contains(&nobody()[..12]), "{call}: {error}");
    }
    // Nothing asked for at all
    let request = cri::RunPodSandboxRequest::default();
    assert_eq!(runtime.run_pod_sandbox(request).await.unwrap_err().code(), Code::InvalidArgument);
    let pod = Pod::run(&daemon, pod_config(&daemon, "empty")).await;
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: None,
        sandbox_config: Some(pod.config.clone()),
    };
    assert_eq!(runtime.create_container(request).await.unwrap_err().code(), Code::InvalidArgument);
    let mut images = daemon.images().await;
    let refused = images.pull_image(cri::PullImageRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let containers =
        runtime.list_containers(cri::ListContainersRequest::default()).await.unwrap().into_inner().containers;
    assert!(containers.is_empty(), "{containers:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_credentials_opens_a_registry_that_wants_them() {
    let registry = Registry::start();
    registry.push("team/app", "1", &image::busybox());
    let registry = registry.with_login();
    let name = format!("{}/team/app:1", registry.host());
    let daemon = Daemon::start().await;
    let mut images = daemon.images().await;
    let mut pull = async |auth: Option<cri::AuthConfig>| {
        let image = Some(cri::ImageSpec { image: name.clone(), ..Default::default() });
        let request = cri::PullImageRequest { image: image.clone(), auth, sandbox_config: None };
        let pulled = images.pull_image(request).await.map(drop);
        images.remove_image(cri::RemoveImageRequest { image }).await.unwrap();
        pulled
    };
    let me = || cri::AuthConfig { username: "me".into(), password: "secret".into(), ..Default::default() };
    // me:secret
    let packed = || cri::AuthConfig { auth: "bWU6c2VjcmV0".into(), ..Default::default() };
    let host = registry.host();
    for (form, auth) in [
        ("user and password", me()),
        ("auth", packed()),
        ("with the registry's name", cri::AuthConfig { server_address: host.clone(), ..me() }),
        ("with its address", cri::AuthConfig { server_address: format!("http://{host}"), ..packed() }),
    ] {
        pull(Some(auth)).await.unwrap_or_else(|error| panic!("{form}: {error}"));
    }
    for (form, auth) in [
        ("none", None),
        ("empty", Some(cri::AuthConfig::default())),
        ("wrong", Some(cri::AuthConfig { password: "public".into(), ..me() })),
        ("for another registry", Some(cri::AuthConfig { server_address: "quay.io".into(), ..me() })),
    ] {
        let refused = pull(auth).await.expect_err(form);
        assert_eq!(refused.code(), Code::Unauthenticated, "{form}: {refused}");
        assert!(!refused.message().contains("secret"), "{refused}");
    }
    let broken = pull(Some(cri::AuthConfig { auth: "%".into(), ..Default::default() })).await.unwrap_err();
    assert_eq!(broken.code(), Code::InvalidArgument, "{broken}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seccomp_profile_that_does_not_parse_leaves_nothing_behind() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "seccomp")).await;
    for (number, text) in [
        "",
        "{",
        r#"{"defaultAction":"SCMP_ACT_PANIC"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":-1}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
    ]
    .into_iter()
    .enumerate()
    {
        let file = daemon.path(&format!("profile{number}.json"));
        std::fs::write(&file, text).unwrap();
        let mut config = container_config("main", &name, &["/bin/true"]);
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.seccomp = Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Localhost as i32,
            localhost_ref: file.display().to_string(),
        });
        let refused = pod.create(config).await.expect_err(text);
        assert_eq!(refused.code(), Code::InvalidArgument, "{text:?}: {refused}");
        assert!(refused.message().contains(&file.display().to_string()), "{refused}");
    }
    let all = pod.client().list_containers(cri::ListContainersRequest::default()).await.unwrap();
    assert!(all.into_inner().containers.is_empty());
    assert_eq!(std::fs::read_dir(daemon.root().join("containers")).unwrap().count(), 0);
    // The name is free
    pod.start(container_config("main", &name, &["/bin/true"])).await;
    daemon.finish().await;
}

/// An evented kubelet compares these times with those of events, and asks for nothing but this.
#[tokio::test(flavor = "multi_thread")]
async fn a_pods_status_has_its_containers_and_when_that_was() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "status")).await;
    let runs = pod.start(container_config("runs", &name, &["/bin/sleep", "1000"])).await;
    let ended = pod.start(container_config("ended", &name, &["/bin/sh", "-c", "exit 9"])).await;
    pod.ended(&ended).await;
    let look = async || {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        pod.client().pod_sandbox_status(request).await.unwrap().into_inner()
    };
    let first = look().await;
    let mut states: Vec<_> = first
        .containers_statuses
        .iter()
        .map(|status| (status.id.clone(), status.state(), status.exit_code))
        .collect();
    states.sort();
    let mut wanted = vec![
        (runs, cri::ContainerState::ContainerRunning, 0),
        (ended, cri::ContainerState::ContainerExited, 9),
    ];
    wanted.sort();
    assert_eq!(states, wanted);
    assert!(first.timestamp > first.status.unwrap().created_at);
    // A machine's clock may be a little ahead.
    if !hull_tests::microvm::by_default() {
        assert!(first.containers_statuses.iter().all(|status| first.timestamp > status.finished_at));
    }
    assert!(look().await.timestamp > first.timestamp);
    daemon.finish().await;
}
