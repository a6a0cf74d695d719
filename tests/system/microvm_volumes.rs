//! Volumes of pods in machines: what kubelet wrote, emptyDir of either kind, the image's own, and raw disks.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use k8s_cri::v1 as cri;

use super::microvm_ground::{Ground, Kubelet, mount};

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_every_kind_are_what_kubelet_means() {
    let layers = vec![
        (image::busybox_layer(), Packing::Gzip),
        (
            Layer::default().directory("data").owned_file("data/seed", 0o640, 1000, b"from the image\n"),
            Packing::Plain,
        ),
    ];
    let with_volume = Image::new(layers, serde_json::json!({"Env": ["PATH=/bin"], "Volumes": {"/data": {}}}));
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::with(&with_volume).await else {
        return;
    };
    let kubelet = Kubelet::of(&daemon, "volumes");
    let secret = kubelet.volume("secret", "keys");
    Kubelet::write(&secret, "..one", &[("key", "s3cret")]);
    fs::set_permissions(secret.join("..one/key"), fs::Permissions::from_mode(0o400)).unwrap();
    chown(secret.join("..one/key"), Some(1000), Some(1000)).unwrap();
    let memory = kubelet.volume("empty-dir", "memory");
    let run = |program: &str, arguments: &[&str]| {
        let status = std::process::Command::new(program).args(arguments).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}");
    };
    let path = |path: &Path| path.display().to_string();
    run("mount", &["-t", "tmpfs", "-o", "size=8m,mode=777", "none", &path(&memory)]);
    let parts = kubelet.volume("empty-dir", "parts");
    fs::create_dir(parts.join("sub")).unwrap();
    fs::write(parts.join("sub/there"), "already\n").unwrap();
    let bound = kubelet.path("volume-subpaths/parts/main/0");
    fs::create_dir_all(&bound).unwrap();
    run("mount", &["--bind", &path(&parts.join("sub")), &path(&bound)]);
    let read_only = daemon.path("read-only");
    fs::create_dir(&read_only).unwrap();
    fs::write(read_only.join("file"), "x").unwrap();
    fs::write(kubelet.path("etc-hosts"), "127.0.0.1 from-kubelet\n").unwrap();

    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "volumes")).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.mounts = vec![
        cri::Mount { readonly: true, ..mount(&secret, "/keys") },
        mount(&memory, "/memory"),
        mount(&bound, "/part"),
        mount(&parts, "/whole"),
        cri::Mount { readonly: true, ..mount(&read_only, "/read-only") },
        mount(&kubelet.path("etc-hosts"), "/etc/hosts"),
    ];
    let id = pod.start(config).await;

    assert_eq!(pod.shell(&id, "cat /keys/key; stat -Lc ' %a %u' /keys/key").await, "s3cret 400 1000\n");
    let size = pod.shell(&id, "df -k /memory | tail -1 | awk '{print $2}'").await;
    assert_eq!(size.trim(), "8192", "the sizeLimit is the size");
    assert_ne!(
        pod.exec(&id, &["dd", "if=/dev/zero", "of=/memory/x", "bs=1M", "count=16"]).await.exit_code,
        0
    );
    assert_eq!(pod.output(&id, &["cat", "/part/there", "/whole/sub/there"]).await, "already\nalready\n");
    pod.shell(&id, "echo written > /part/new").await;
    assert_eq!(pod.output(&id, &["cat", "/whole/sub/new"]).await, "written\n");
    assert_ne!(pod.exec(&id, &["touch", "/read-only/y"]).await.exit_code, 0);
    assert_eq!(pod.output(&id, &["cat", "/etc/hosts"]).await, "127.0.0.1 from-kubelet\n");
    assert_eq!(
        pod.shell(&id, "cat /data/seed; stat -c '%a %u' /data/seed").await,
        "from the image\n640 1000\n"
    );
    pod.shell(&id, "echo more > /data/more && rm /data/seed").await;

    pod.stop().await;
    pod.remove().await;
    run("umount", &[&path(&bound)]);
    run("umount", &[&path(&memory)]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_is_a_device_of_the_guest() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let disk = daemon.path("disk");
    fs::write(&disk, vec![b'd'; 4 << 20]).unwrap();
    let output =
        std::process::Command::new("losetup").args(["--find", "--show"]).arg(&disk).output().unwrap();
    assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();

    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "block")).await;
    for (round, letter) in ["e", "f"].into_iter().enumerate() {
        let mut config = container_config(&format!("c{round}"), &name, &["/bin/sleep", "1000"]);
        config.devices = vec![cri::Device {
            host_path: device.clone(),
            container_path: "/dev/raw".into(),
            permissions: "rwm".into(),
        }];
        let id = pod.start(config).await;
        let script = format!(
            "dd if=/dev/raw bs=1M count=8 2>/dev/null | wc -c; \
             tr '\\0' {letter} < /dev/zero | dd of=/dev/raw bs=512 count=1 conv=fsync iflag=fullblock 2>/dev/null"
        );
        assert_eq!(pod.shell(&id, &script).await.trim(), (4 << 20).to_string());
        pod.stop_container(&id, 0).await;
        pod.remove_container(&id).await;
        assert_eq!(
            fs::read(&device).unwrap()[..512],
            vec![letter.as_bytes()[0]; 512][..],
            "it is on the disk"
        );
    }
    pod.stop().await;
    pod.remove().await;
    assert!(std::process::Command::new("losetup").args(["-d", &device]).status().unwrap().success());
    daemon.finish().await;
}
