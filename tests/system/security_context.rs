//! Users, groups, capabilities, seccomp, limits.

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::json;

fn context(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_groups_are_exactly_those_asked_for() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let by_name = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip)],
        json!({"User": "web", "Env": ["PATH=/bin"]}),
    );
    let web = registry.push("web", "v1", &by_name);
    let overflow = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip)],
        json!({"User": "4294967296", "Env": ["PATH=/bin"]}),
    );
    let overflowing = registry.push("overflow", "v1", &overflow);
    let daemon = Daemon::start().await;
    for image in [&name, &web, &overflowing] {
        daemon.pull(image).await;
    }
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "users")).await;
    let sleep = ["/bin/sleep", "1000"];

    // The image's own user, with the groups that the image's /etc/group gives
    let id = pod.start(container_config("image", &web, &sleep)).await;
    let seen = pod.shell(&id, "id; echo $HOME").await;
    assert!(
        seen.starts_with("uid=1000(web) gid=1000(web) groups=") && seen.ends_with("\n/home/web\n"),
        "{seen}"
    );
    let mut groups: Vec<&str> = seen.lines().next().unwrap().rsplit('=').next().unwrap().split(',').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["1000(web)", "29(audio)", "44(video)"]);

    // A number, a group and supplemental groups (containerd CVE-2023-25173)
    let mut config = container_config("numbers", &name, &sleep);
    context(&mut config).run_as_user = Some(cri::Int64Value { value: 1234 });
    context(&mut config).run_as_group = Some(cri::Int64Value { value: 5678 });
    context(&mut config).supplemental_groups = vec![29, 4000];
    let id = pod.start(config).await;
    let groups = pod.shell(&id, "grep -E '^(Uid|Gid|Groups)' /proc/self/status").await;
    let fields: Vec<Vec<&str>> =
        groups.lines().map(|line| line.split_whitespace().skip(1).collect()).collect();
    assert_eq!(fields[0], ["1234"; 4]);
    assert_eq!(fields[1], ["5678"; 4]);
    assert!(
        fields[2].contains(&"29") && fields[2].contains(&"4000") && !fields[2].contains(&"0"),
        "{groups}"
    );
    assert!(
        pod.shell(&id, "grep CapEff /proc/self/status").await.contains("0000000000000000"),
        "no capability for a plain user"
    );

    // By name
    let mut config = container_config("name", &name, &sleep);
    context(&mut config).run_as_username = "web".into();
    let id = pod.start(config).await;
    assert_eq!(pod.shell(&id, "id -u").await, "1000\n");

    // containerd CVE-2024-40635: a number too large never becomes root
    let refused = pod.start_fails(container_config("overflow", &overflowing, &sleep)).await;
    assert!(refused.message().contains("4294967296"), "{refused}");
    let mut config = container_config("unknown", &name, &sleep);
    context(&mut config).run_as_username = "nobody-knows".into();
    assert!(pod.start_fails(config).await.message().contains("nobody-knows"));
    let mut config = container_config("grouponly", &name, &sleep);
    context(&mut config).run_as_group = Some(cri::Int64Value { value: 1 });
    pod.start_fails(config).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_are_added_and_dropped() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "caps")).await;
    for (number, (add, drop, wanted)) in [
        (vec!["NET_ADMIN"], vec![], 0xa804_35fb_u64),
        (vec![], vec!["ALL"], 0),
        (vec!["NET_BIND_SERVICE"], vec!["ALL"], 0x400),
        (vec!["CAP_SYS_TIME"], vec!["CHOWN", "KILL"], 0xaa04_25da),
    ]
    .into_iter()
    .enumerate()
    {
        let mut config = container_config(&format!("c{number}"), &name, &["/bin/sleep", "1000"]);
        context(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: add.iter().map(|name| (*name).to_owned()).collect(),
            drop_capabilities: drop.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        });
        let id = pod.start(config).await;
        let status = pod.shell(&id, "grep CapEff /proc/1/status").await;
        let mask = u64::from_str_radix(status.split_whitespace().nth(1).unwrap(), 16).unwrap();
        assert_eq!(mask, wanted, "add {add:?}, drop {drop:?}");
    }
    let mut config = container_config("wrong", &name, &["/bin/true"]);
    context(&mut config).capabilities =
        Some(cri::Capability { add_capabilities: vec!["FLY".into()], ..Default::default() });
    assert!(pod.start_fails(config).await.message().contains("FLY"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seccomp_profiles_are_in_force() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let profile = daemon.path("no-mkdir.json");
    let text = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
    std::fs::write(&profile, text.to_string()).unwrap();
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "seccomp")).await;
    let with = |name: &str, image: &str, kind: cri::security_profile::ProfileType, file: &str| {
        let mut config = container_config(name, image, &["/bin/sleep", "1000"]);
        let profile = cri::SecurityProfile { profile_type: kind as i32, localhost_ref: file.to_owned() };
        context(&mut config).seccomp = Some(profile);
        config
    };
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};

    let id = pod.start(with("default", &name, RuntimeDefault, "")).await;
    assert!(pod.shell(&id, "grep Seccomp: /proc/1/status").await.contains('2'));
    assert_ne!(pod.exec(&id, &["unshare", "-U", "/bin/true"]).await.exit_code, 0, "unshare is refused");
    assert_eq!(pod.shell(&id, "mkdir /x && ls -d /x").await, "/x\n");

    let id = pod.start(with("unconfined", &name, Unconfined, "")).await;
    assert!(pod.shell(&id, "grep Seccomp: /proc/1/status").await.contains('0'));

    let id = pod.start(with("local", &name, Localhost, &profile.display().to_string())).await;
    let refused = pod.exec(&id, &["mkdir", "/x"]).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("not supported"), "{refused:?}");

    let missing = pod.start_fails(with("missing", &name, Localhost, "/no/such/profile.json")).await;
    assert!(missing.message().contains("/no/such/profile.json"), "{missing}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_new_privileges_is_set_when_asked() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "nnp")).await;
    for (number, asked) in [false, true].into_iter().enumerate() {
        let mut config = container_config(&format!("c{number}"), &name, &["/bin/sleep", "1000"]);
        context(&mut config).no_new_privs = asked;
        let id = pod.start(config).await;
        let status = pod.shell(&id, "grep NoNewPrivs /proc/1/status").await;
        assert!(status.trim().ends_with(if asked { '1' } else { '0' }), "{status}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sysctls_are_the_pods_own() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = networked_pod_config(&daemon, "sysctl");
    config.linux.as_mut().unwrap().sysctls =
        [("net.ipv4.ip_unprivileged_port_start", "80"), ("kernel.shm_rmid_forced", "1")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
    let mut pod = Pod::run(&daemon, config).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let values = pod
        .shell(&id, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced")
        .await;
    assert_eq!(values, "80\n1\n");

    // CRI-O CVE-2022-0811: a value is one value, and what is not namespaced is refused
    for (number, (name, value)) in [
        ("kernel.core_pattern", "|/evil"),
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil\n"),
        ("net/../kernel/core_pattern", "x"),
    ]
    .into_iter()
    .enumerate()
    {
        // A machine's kernel is its own.
        if number == 0 && hull_tests::microvm::by_default() {
            continue;
        }
        let mut config = networked_pod_config(&daemon, &format!("evil{number}"));
        config.linux.as_mut().unwrap().sysctls = [(name.to_owned(), value.to_owned())].into();
        let refused = Pod::try_run(&daemon, config).await.map(|pod| pod.id).expect_err("a refusal");
        assert!(refused.message().contains("sysctl"), "{name}: {refused}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_set_updated_and_enforced() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "limits")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let resources = cri::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: 500,
        ..Default::default()
    };
    config.linux.as_mut().unwrap().resources = Some(resources.clone());
    let id = pod.start(config).await;
    let limit =
        "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let quota = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us";
    assert_eq!(pod.shell(&id, limit).await.trim(), (64 << 20).to_string());
    assert!(pod.shell(&id, quota).await.starts_with("50000"));
    assert_eq!(pod.shell(&id, "cat /proc/1/oom_score_adj").await.trim(), "500");

    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            cpu_quota: 70_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    daemon.runtime().await.update_container_resources(request).await.unwrap();
    assert_eq!(pod.shell(&id, limit).await.trim(), (128 << 20).to_string());
    assert!(pod.shell(&id, quota).await.starts_with("70000"));

    // Memory: the kernel ends it and the status says why
    let mut config =
        container_config("hog", &name, &["/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"]);
    config.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..resources });
    let hog = pod.start(config).await;
    let status = pod.ended(&hog).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_passwd_and_group_files_are_read_with_bounds() {
    // containerd CVE-2026-47262
    let registry = Registry::start();
    let enormous = vec![b'x'; 40 << 20];
    let layer = Layer::default().directory("etc").file("etc/group", 0o644, &enormous).file(
        "etc/passwd",
        0o644,
        &enormous,
    );
    let image = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (layer, Packing::Gzip)],
        json!({"User": "web", "Env": ["PATH=/bin"]}),
    );
    let name = registry.push("enormous", "v1", &image);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "enormous")).await;
    let refused = pod.start_fails(container_config("main", &name, &["/bin/true"])).await;
    assert!(refused.message().contains("/etc/passwd") || refused.message().contains("web"), "{refused}");
    daemon.finish().await;
}
