//! Pods with a user namespace.

use std::os::unix::fs::{MetadataExt, chown};

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::json;

use super::microvm_ground::Kubelet;

const HOST_ID: u32 = 300_000;
const LENGTH: u32 = 65_536;

fn mapping() -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id: HOST_ID, container_id: 0, length: LENGTH }]
}

fn user_namespace() -> cri::UserNamespace {
    cri::UserNamespace { mode: cri::NamespaceMode::Pod as i32, uids: mapping(), gids: mapping() }
}

fn options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap()
}

fn userns_pod(daemon: &Daemon, name: &str) -> cri::PodSandboxConfig {
    let mut config = networked_pod_config(daemon, name);
    options(&mut config).userns_options = Some(user_namespace());
    config
}

/// As kubelet makes them: every mount has the pod's mappings.
fn mount(host: &std::path::Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_its_own_ids_network_and_volumes() {
    if hull_tests::microvm::excepted("with hostUsers: false, host paths are refused") {
        return;
    }
    let registry = Registry::start();
    let of_web = Layer::default().directory("srv").owned_file("srv/file", 0o600, 1000, b"of web\n");
    let image = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (of_web, Packing::Gzip)],
        json!({"Env": ["PATH=/bin"], "Volumes": {"/srv": {}}}),
    );
    let name = registry.push("busybox", "v1", &image);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let volume = daemon.path("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "").unwrap();
    chown(volume.join("file"), Some(1000), Some(1000)).unwrap();
    let mut pod = Pod::run(&daemon, userns_pod(&daemon, "userns")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![mount(&volume, "/volume")];
    let id = pod.start(config).await;

    // Root of its own, and nobody to the node.
    let map = pod.shell(&id, "cat /proc/self/uid_map").await;
    let map: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(map, ["0", "300000", "65536"]);
    assert_eq!(pod.shell(&id, "id -u; id -g").await, "0\n0\n");
    let status = pod.container(&id).await;
    assert_eq!(status.state, cri::ContainerState::ContainerRunning as i32);

    // What the image has is the image's; what is written belongs to the container's users on the disk.
    assert_eq!(
        pod.shell(&id, "stat -c %u:%g /bin/busybox /srv/file /volume/file").await,
        "0:0\n1000:1000\n1000:1000\n"
    );
    pod.shell(&id, "touch /volume/mine && chown 5:6 /volume/mine && echo x >> /srv/file").await;
    let mine = std::fs::metadata(volume.join("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid()), (5, 6));

    // Its network belongs to it, and works.
    pod.shell(&id, "ip link add dummy0 type dummy 2>&1 || true; ip -o link show eth0 | grep -c UP").await;
    let status = pod.status().await;
    let address = status.network.unwrap().ip;
    assert!(address.starts_with("10.241."), "{address}");
    assert!(pod.shell(&id, "hostname; ip -o address show eth0").await.contains(&address));
    let gateway = pod.shell(&id, "ip route").await;
    assert!(gateway.contains("default via"), "{gateway}");
    assert_eq!(pod.shell(&id, "ping -c 1 -W 5 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') | grep -c '1 packets received'").await, "1\n");
    let told = status.linux.unwrap().namespaces.unwrap().options.unwrap().userns_options.unwrap();
    assert_eq!(told.uids, mapping());

    // A container that is stopped and removed, and one more in the same namespace.
    pod.stop_container(&id, 0).await;
    pod.remove_container(&id).await;
    let mut again = container_config(
        "again",
        &name,
        &["/bin/sh", "-c", "id -u; readlink /proc/self/ns/user; cat /proc/self/uid_map"],
    );
    let context = again.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.run_as_user = Some(cri::Int64Value { value: 1000 });
    let own = context.namespace_options.as_mut().unwrap();
    own.userns_options = Some(user_namespace());
    let id = pod.start(again).await;
    assert_eq!(pod.ended(&id).await.exit_code, 0);
    assert!(pod.log("again").starts_with("1000\nuser:["), "{}", pod.log("again"));
    daemon.finish().await;
}

/// The guest's kernel has one for the pod, and the volumes that are the guest's are its users'.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_in_a_machine_has_its_own_users_in_the_guest() {
    let daemon = Daemon::start().await;
    if !hull_tests::microvm::available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let of_web = Layer::default().directory("srv").owned_file("srv/file", 0o600, 1000, b"of web\n");
    let image = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (of_web, Packing::Gzip)],
        json!({"Env": ["PATH=/bin"], "Volumes": {"/srv": {}}}),
    );
    let name = registry.push("busybox", "v1", &image);
    daemon.pull(&name).await;
    let kubelet = Kubelet::of(&daemon, "users");
    let (secret, empty) = (kubelet.volume("secret", "s"), kubelet.volume("empty-dir", "e"));
    Kubelet::write(&secret, "..one", &[("key", "secret\n")]);
    chown(secret.join("..one/key"), Some(1000), Some(1000)).unwrap();
    let host = daemon.path("host");
    std::fs::create_dir(&host).unwrap();
    let mut pod = Pod::run_microvm(&daemon, userns_pod(&daemon, "users")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![mount(&secret, "/secret"), mount(&empty, "/empty")];
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.capabilities =
        Some(cri::Capability { add_capabilities: vec!["NET_ADMIN".into()], ..Default::default() });
    let id = pod.start(config).await;

    let map = pod.shell(&id, "cat /proc/self/uid_map").await;
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "300000", "65536"]);
    assert_eq!(
        pod.shell(&id, "id -u; stat -Lc %u:%g /bin/busybox /srv/file /secret/key; cat /secret/key").await,
        "0\n0:0\n1000:1000\n1000:1000\nsecret\n"
    );
    pod.shell(&id, "for d in /empty /srv; do touch $d/mine && chown 5:6 $d/mine; done").await;
    assert_eq!(pod.shell(&id, "stat -c %u:%g /empty/mine /srv/mine").await, "5:6\n".repeat(2));
    // Its network is its users', the machine is not
    let address = pod.status().await.network.unwrap().ip;
    assert!(pod.shell(&id, "ip -o address show eth0").await.contains(&address));
    assert_eq!(pod.shell(&id, "ip link set eth0 mtu 1400 && echo changed").await, "changed\n");
    assert_ne!(pod.exec(&id, &["sysctl", "-w", "kernel.core_pattern=x"]).await.exit_code, 0);
    // Linux maps no ids on the submounts that virtio-fs has (fs/fuse/inode.c, fuse_fill_super_submount)
    let mut config = container_config("host", &name, &["/bin/true"]);
    config.mounts = vec![mount(&host, "/host")];
    let refused = pod.start_fails(config).await;
    assert!(refused.message().contains("cannot map the ids of the mount at /host"), "{refused}");
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_share_an_image_whatever_their_ids() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut plain = Pod::run(&daemon, pod_config(&daemon, "plain")).await;
    let mut one = Pod::run(&daemon, userns_pod(&daemon, "one")).await;
    let mut config = userns_pod(&daemon, "two");
    let other = vec![cri::IdMapping { host_id: 500_000, container_id: 0, length: 2000 }];
    options(&mut config).userns_options =
        Some(cri::UserNamespace { uids: other.clone(), gids: other, ..user_namespace() });
    // Processes in sight of each other, and the pod's own sysctl.
    options(&mut config).pid = cri::NamespaceMode::Pod as i32;
    config.linux.as_mut().unwrap().sysctls = [("net.core.somaxconn".to_owned(), "4321".to_owned())].into();
    let mut two = Pod::run(&daemon, config).await;
    for (pod, host) in [(&mut plain, 0), (&mut one, HOST_ID), (&mut two, 500_000)] {
        let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
        assert_eq!(pod.shell(&id, "stat -c %u /bin/busybox; touch /x && stat -c %u /x").await, "0\n0\n");
        let map = pod.shell(&id, "cat /proc/self/uid_map").await;
        assert_eq!(map.split_whitespace().nth(1).unwrap(), host.to_string());
    }
    let shared = |name: &str, image: &str| {
        let mut config = container_config(name, image, &["/bin/sleep", "2000"]);
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
            Some(cri::NamespaceOption { pid: cri::NamespaceMode::Pod as i32, ..Default::default() });
        config
    };
    two.start(shared("first", &name)).await;
    let id = two.start(shared("second", &name)).await;
    let seen = two.shell(&id, "ps | grep -c '[s]leep 2000'; cat /proc/sys/net/core/somaxconn").await;
    assert_eq!(seen, "2\n4321\n");
    let too_high = |uid| {
        let mut config = container_config("high", &name, &["/bin/true"]);
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(cri::Int64Value { value: uid });
        config
    };
    let refused = two.start_fails(too_high(2000)).await;
    assert!(refused.message().contains("does not map"), "{refused}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_network_can_be_shared_and_nothing_can_be_done_to_it() {
    if hull_tests::microvm::excepted("hostNetwork is refused") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "hostnet");
    options(&mut config).userns_options = Some(user_namespace());
    let mut pod = Pod::run(&daemon, config).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.capabilities =
        Some(cri::Capability { add_capabilities: vec!["ALL".into()], ..Default::default() });
    let id = pod.start(config).await;
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(pod.shell(&id, "readlink /proc/self/ns/net").await.trim(), own.to_str().unwrap());
    assert_ne!(pod.exec(&id, &["ip", "link", "set", "lo", "down"]).await.exit_code, 0);
    assert!(pod.shell(&id, "ls /sys/class/net").await.contains("lo"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_before_anything_is_made() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let twice = [mapping(), mapping()].concat();
    let empty = vec![cri::IdMapping { length: 0, ..mapping().remove(0) }];
    type Change = Box<dyn Fn(&mut cri::NamespaceOption)>;
    let changes: [(&str, Change); 6] = [
        (
            "exactly one",
            Box::new(move |options| options.userns_options.as_mut().unwrap().uids = twice.clone()),
        ),
        ("empty", Box::new(move |options| options.userns_options.as_mut().unwrap().gids = empty.clone())),
        ("exactly one", Box::new(|options| options.userns_options.as_mut().unwrap().gids.clear())),
        ("NODE", Box::new(|options| options.userns_options.as_mut().unwrap().mode = 2)),
        ("IPC", Box::new(|options| options.ipc = cri::NamespaceMode::Node as i32)),
        ("PID", Box::new(|options| options.pid = cri::NamespaceMode::Node as i32)),
    ];
    for (reason, change) in changes {
        let mut config = userns_pod(&daemon, "refused");
        change(options(&mut config));
        let status = Pod::try_run(&daemon, config).await.err().unwrap();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
        assert!(status.message().contains(reason), "{reason}: {status}");
    }

    let mut pod = Pod::run(&daemon, userns_pod(&daemon, "userns")).await;
    let mut config = container_config("differs", &name, &["/bin/true"]);
    let other = vec![cri::IdMapping { host_id: 1, container_id: 0, length: 1 }];
    let own = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    own.namespace_options.as_mut().unwrap().userns_options =
        Some(cri::UserNamespace { uids: other.clone(), gids: other.clone(), ..user_namespace() });
    assert!(pod.start_fails(config).await.message().contains("differ"));
    let mut config = container_config("mount", &name, &["/bin/true"]);
    config.mounts = vec![cri::Mount {
        uid_mappings: other.clone(),
        gid_mappings: other,
        ..mount(&daemon.path("v"), "/v")
    }];
    assert!(pod.start_fails(config).await.message().contains("differ"));
    let mut config = container_config("sys", &name, &["/bin/true"]);
    config.mounts = vec![mount(std::path::Path::new("/sys/kernel"), "/v")];
    let status = pod.start_fails(config).await;
    assert!(status.message().contains("cannot map ids"), "{status}");

    let mut pod = Pod::run(&daemon, pod_config(&daemon, "plain")).await;
    let mut config = container_config("mount", &name, &["/bin/true"]);
    config.mounts = vec![mount(&daemon.path("v"), "/v")];
    assert!(pod.start_fails(config).await.message().contains("no user namespace"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_means_only_its_own_part_of_the_machine() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = userns_pod(&daemon, "privileged");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let mut pod = Pod::run(&daemon, config).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let id = pod.start(config).await;
    pod.shell(&id, "mount -t tmpfs none /tmp && touch /tmp/x && hostname inside").await;
    // A disk of the node, where there is one, is nobody's.
    for script in [
        "sysctl -w kernel.core_pattern=x",
        "echo 1 > /proc/sysrq-trigger",
        "for d in /dev/vda /dev/sda /dev/mem /dev/kmsg; do [ -e $d ] && head -c 1 $d >/dev/null && exit 0; done; exit 1",
        "mknod /tmp/mem c 1 1",
    ] {
        assert_ne!(pod.exec(&id, &["/bin/sh", "-c", script]).await.exit_code, 0, "{script}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_survives_hulld_and_takes_more_containers() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let mut daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, userns_pod(&daemon, "userns")).await;
    let id = pod.start(container_config("one", &name, &["/bin/sleep", "1000"])).await;
    daemon.kill();
    daemon.restart().await;
    pod.reconnect(&daemon).await;
    assert_eq!(pod.shell(&id, "id -u").await, "0\n");
    let id = pod.start(container_config("two", &name, &["/bin/sleep", "1000"])).await;
    let map = pod.shell(&id, "cat /proc/self/uid_map").await;
    assert_eq!(map.split_whitespace().nth(1), Some("300000"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_programs_file_gives_its_capabilities_with_and_without_a_user_namespace() {
    const NET_RAW: u32 = 1 << 13;
    let registry = Registry::start();
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let capable = Layer::default().capable_file("bin/busybox-raw", NET_RAW, &busybox);
    let image = Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (capable, Packing::Gzip)],
        json!({"Env": ["PATH=/bin"]}),
    );
    let name = registry.push("busybox", "v1", &image);
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let pods = [("plain", networked_pod_config(&daemon, "plain")), ("userns", userns_pod(&daemon, "userns"))];
    for (kind, config) in pods {
        let mut pod = Pod::run(&daemon, config).await;
        for (number, no_new_privs) in [false, true].into_iter().enumerate() {
            let script = "grep CapEff /proc/self/status; busybox-raw grep CapEff /proc/self/status";
            let mut config = container_config(&format!("{kind}{number}"), &name, &["/bin/sh", "-c", script]);
            let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            context.run_as_user = Some(cri::Int64Value { value: 1000 });
            context.no_new_privs = no_new_privs;
            let id = pod.start(config).await;
            pod.ended(&id).await;
            let raw = if no_new_privs { 0 } else { NET_RAW };
            let wanted = format!("CapEff:\t{:016x}\nCapEff:\t{raw:016x}\n", 0);
            assert_eq!(pod.log(&format!("{kind}{number}")), wanted, "{kind}, no_new_privs {no_new_privs}");
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_cni_plugins_belongs_to_the_pods_users() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let (daemon, cni) = crate::network::Cni::start().await;
    cni.configure(&daemon).await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, userns_pod(&daemon, "cni")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    let add_capabilities = vec!["NET_ADMIN".to_owned()];
    context.capabilities = Some(cri::Capability { add_capabilities, ..Default::default() });
    context.namespace_options.as_mut().unwrap().userns_options = Some(user_namespace());
    let id = pod.start(config).await;
    let address = pod.status().await.network.unwrap().ip;
    assert!(address.starts_with("10.242.9."), "{address}");
    // The plugins' interface is there, and who is root in the pod may change it: the namespace is its users' own.
    assert!(pod.shell(&id, "ip -o address show eth0").await.contains(&address));
    assert_eq!(pod.shell(&id, "ip link set eth0 mtu 1400 && echo changed").await, "changed\n");
    let gateway = "$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')";
    let reached = pod.shell(&id, &format!("ping -c 1 -W 5 {gateway} | grep -c '1 packets received'")).await;
    assert_eq!(reached, "1\n");
    pod.stop().await;
    assert_eq!(cni.leases(), 0, "DEL gave the address back");
    daemon.remove_all_pods().await;
    cni.clear();
    daemon.finish().await;
}
