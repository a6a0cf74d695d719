//! What a pod in a machine has otherwise than one on the host: rows of the table in docs/operating.md, "microVM pods", that
//! no other test is about.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use hull_tests::image::{self, Image, Packing};
use hull_tests::microvm::available;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;

use super::microvm_ground::{Ground, Kubelet, mount};

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_the_host_end_at_the_machine() {
    let layers = vec![(image::busybox_layer(), Packing::Gzip), (image::perl_layer(), Packing::Plain)];
    let config = serde_json::json!({"Env": ["PATH=/bin:/usr/bin"]});
    let Some(Ground { daemon, image: name, registry: _registry }) =
        Ground::with(&Image::new(layers, config)).await
    else {
        return;
    };
    let kubelet = Kubelet::of(&daemon, "volumes");
    let host = daemon.path("host");
    for directory in ["before", "later"] {
        fs::create_dir_all(host.join(directory)).unwrap();
    }
    run("mount", &["-t", "tmpfs", "none", &text(&host.join("before"))]);
    fs::write(host.join("before/file"), "there\n").unwrap();
    let _listener = UnixListener::bind(host.join("socket")).unwrap();
    // A ConfigMap as a whole, and one file of it as a subPath
    let settings = kubelet.volume("configmap", "settings");
    Kubelet::write(&settings, "..one", &[("colour", "red\n")]);
    let bound = settings.ancestors().nth(3).unwrap().join("volume-subpaths/settings/main/0");
    fs::create_dir_all(bound.parent().unwrap()).unwrap();
    fs::write(&bound, "").unwrap();
    run("mount", &["--bind", &text(&settings.join("..data/colour")), &text(&bound)]);
    let empty = kubelet.volume("empty-dir", "empty");

    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "volumes")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    let propagation = cri::MountPropagation::PropagationHostToContainer as i32;
    config.mounts = vec![
        cri::Mount { propagation, ..mount(&host, "/host") },
        mount(&settings, "/settings"),
        mount(&bound, "/one"),
        mount(&empty, "/empty"),
    ];
    let id = pod.start(config).await;

    // mountPropagation HostToContainer: what was mounted before, and nothing that comes later
    assert_eq!(pod.output(&id, &["cat", "/host/before/file"]).await, "there\n");
    run("mount", &["-t", "tmpfs", "none", &text(&host.join("later"))]);
    fs::write(host.join("later/file"), "").unwrap();
    assert_ne!(pod.exec(&id, &["test", "-e", "/host/later/file"]).await.exit_code, 0);

    // Sockets of the host are not reached
    let connect = "socket(S,1,1,0); exit(connect(S, pack('Sa*',1,'/host/socket')) ? 0 : 9)";
    assert_eq!(pod.exec(&id, &["/usr/bin/perl", "-e", connect]).await.exit_code, 9);

    // An update arrives, in a subPath as little as on the host
    Kubelet::write(&settings, "..two", &[("colour", "blue\n")]);
    eventually("the update arrives", patience(20), async || {
        (pod.output(&id, &["cat", "/settings/colour"]).await == "blue\n").then_some(())
    })
    .await;
    assert_eq!(pod.output(&id, &["cat", "/one"]).await, "red\n");

    // An emptyDir is the machine's, and counted as its first user's files
    pod.shell(&id, "dd if=/dev/zero of=/empty/file bs=1M count=8 conv=fsync 2>/dev/null").await;
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    eventually("it is counted", patience(30), async || {
        let request = cri::ContainerStatsRequest { container_id: id.clone() };
        let stats = pod.client().container_stats(request).await.unwrap().into_inner().stats.unwrap();
        (stats.writable_layer?.used_bytes?.value >= 8 << 20).then_some(())
    })
    .await;
    let size: u64 = pod.shell(&id, "df -k / | tail -1 | awk '{print $2}'").await.trim().parse().unwrap();
    assert!(size <= 10 << 20, "a writable layer has {size} KiB");

    pod.stop().await;
    pod.remove().await;
    for mounted in [bound, host.join("later"), host.join("before")] {
        run("umount", &[&text(&mounted)]);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_its_own_kernel_clock_and_limits() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let shared = |mut config: cri::ContainerConfig| {
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.namespace_options.get_or_insert_default().pid = cri::NamespaceMode::Pod as i32;
        config
    };
    let mut config = networked_pod_config(&daemon, "own");
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Pod as i32;
    let mut pod = Pod::run_microvm(&daemon, config).await;

    // AppArmor: the guest's kernel has none
    let armoured = |number: usize, kind: cri::security_profile::ProfileType| {
        let mut config = container_config(&format!("a{number}"), &name, &["/bin/sleep", "1234"]);
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().apparmor =
            Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref: "some-profile".into() });
        shared(config)
    };
    let id = pod.start(armoured(0, cri::security_profile::ProfileType::RuntimeDefault)).await;
    let refused = pod.start_fails(armoured(1, cri::security_profile::ProfileType::Localhost)).await;
    assert!(refused.message().contains("AppArmor"), "{refused}");

    // shareProcessNamespace
    let second = pod.start(shared(container_config("second", &name, &["/bin/sleep", "1000"]))).await;
    assert_eq!(pod.shell(&second, "ps | grep -c '[s]leep 1234'").await, "1\n");

    // The clock is the host's
    let own = |text: String| text.trim().parse::<u64>().unwrap();
    let before = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let inside = own(pod.output(&id, &["date", "+%s"]).await);
    let after = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!((before.saturating_sub(2)..=after + 2).contains(&inside), "{before} {inside} {after}");

    // Huge pages of the node are not the machine's
    let pages = Kubelet::of(&daemon, "own").volume("empty-dir", "pages");
    run("mount", &["-t", "hugetlbfs", "none", &text(&pages)]);
    let mut config = shared(container_config("pages", &name, &["/bin/true"]));
    config.mounts = vec![mount(&pages, "/pages")];
    let refused = pod.start_fails(config).await;
    run("umount", &[&text(&pages)]);
    assert!(refused.message().contains("huge pages"), "{refused}");

    // Raw block volumes: eight at a time
    let disk = daemon.path("disk");
    fs::write(&disk, vec![b'd'; 1 << 20]).unwrap();
    let device = Command::new("losetup").args(["--find", "--show"]).arg(&disk).output().unwrap();
    let device = String::from_utf8(device.stdout).unwrap().trim().to_owned();
    let with = |count: usize| {
        let mut config = shared(container_config(&format!("disks{count}"), &name, &["/bin/sleep", "1000"]));
        let devices = (0..count).map(|number| cri::Device {
            host_path: device.clone(),
            container_path: format!("/dev/raw{number}"),
            permissions: "r".into(),
        });
        config.devices = devices.collect();
        config
    };
    let refused = pod.start_fails(with(9)).await;
    assert!(refused.message().contains("it has eight"), "{refused}");
    let eight = pod.start(with(8)).await;
    assert_eq!(pod.shell(&eight, "cat /dev/raw7 | wc -c").await.trim(), (1 << 20).to_string());
    pod.stop().await;
    pod.remove().await;
    run("losetup", &["-d", &device]);
    daemon.finish().await;
}

/// Adds an interface net1 to what the plugins before it made (CNI specification, section 5).
const SECOND_INTERFACE: &str = r#"#!/usr/bin/python3
import json, os, subprocess, sys
if os.environ["CNI_COMMAND"] == "VERSION":
    print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}))
elif os.environ["CNI_COMMAND"] == "ADD":
    result, pin = json.load(sys.stdin)["prevResult"], os.environ["CNI_NETNS"]
    subprocess.run(["nsenter", "--net=" + pin, "ip", "link", "add", "net1", "type", "bridge"], check=True)
    result["interfaces"].append({"name": "net1", "sandbox": pin})
    result["ips"].append({"address": "10.242.10.7/24", "interface": len(result["interfaces"]) - 1})
    print(json.dumps(result))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn of_several_interfaces_a_machine_has_eth0() {
    let (daemon, cni) = crate::network::Cni::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    cni.add_plugin("second", SECOND_INTERFACE);
    cni.configure_with(&daemon, &[serde_json::json!({"type": "second"})]).await;
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "several")).await;
    let network = pod.status().await.network.unwrap();
    assert!(network.ip.starts_with("10.242.9.") && network.additional_ips.is_empty(), "{network:?}");
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let interfaces = pod.output(&id, &["ls", "/sys/class/net"]).await;
    assert!(interfaces.contains("eth0") && !interfaces.contains("net1"), "{interfaces}");
    pod.stop().await;
    pod.remove().await;
    assert_eq!(cni.leases(), 0);
    cni.clear();
    daemon.finish().await;
}
