//! Devices by name: the Container Device Interface.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

/// In the directory that vendors' daemons write to; removed whatever becomes of the test.
struct SpecFile(std::path::PathBuf, bool);

impl SpecFile {
    fn write(name: &str, text: &str) -> Self {
        let directory = std::path::Path::new("/var/run/cdi");
        let made = std::fs::create_dir(directory).is_ok();
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        Self(path, made)
    }
}

impl Drop for SpecFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        if self.1 {
            let _ = std::fs::remove_dir("/var/run/cdi");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_comes_with_all_that_its_vendor_describes() {
    if hull_tests::microvm::excepted("character devices of the host are refused") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    std::fs::create_dir(daemon.path("libraries")).unwrap();
    std::fs::write(daemon.path("libraries/vendor.so"), "of the vendor\n").unwrap();
    let text = format!(
        "cdiVersion: 0.7.0\nkind: hull.test/zero\ncontainerEdits:\n  env:\n  - VENDOR=yes\n  mounts:\n  - hostPath: {}\n    containerPath: /vendor\n    options: [ro, nosuid, nodev, rbind]\ndevices:\n- name: \"0\"\n  containerEdits:\n    deviceNodes:\n    - path: /dev/vendor0\n      hostPath: /dev/loop-control\n      permissions: r\n    additionalGids: [4242]\n- name: hooked\n  containerEdits:\n    hooks:\n    - hookName: createContainer\n      path: /bin/true\n",
        daemon.path("libraries").display()
    );
    let spec = SpecFile::write("hull-test.yaml", &text);
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "cdi")).await;
    let with = |name_of: &str, device: &str| {
        let mut config = container_config(name_of, &name, &["/bin/sleep", "1000"]);
        config.cdi_devices = vec![cri::CdiDevice { name: device.to_owned() }];
        config
    };
    let by_annotation = {
        let mut config = container_config("annotated", &name, &["/bin/sleep", "1000"]);
        config.annotations.insert("cdi.k8s.io/plugin_zero".into(), "hull.test/zero=0".into());
        config
    };
    for config in [with("named", "hull.test/zero=0"), by_annotation] {
        let id = pod.start(config).await;
        assert_eq!(
            pod.shell(&id, "exec 3< /dev/vendor0 && echo open; echo $VENDOR; cat /vendor/vendor.so").await,
            "open\nyes\nof the vendor\n"
        );
        assert_ne!(pod.exec(&id, &["/bin/sh", "-c", "echo x > /dev/vendor0"]).await.exit_code, 0, "r is r");
        assert_ne!(pod.exec(&id, &["touch", "/vendor/x"]).await.exit_code, 0);
        assert!(pod.shell(&id, "grep Groups: /proc/self/status").await.contains("4242"));
    }
    for (device, reason) in [
        ("hull.test/zero=1", "hull.test/zero=1 is neither in /etc/cdi nor in /var/run/cdi"),
        ("hull.test/zero=hooked", "createContainer hook /bin/true; hull runs no hooks"),
        ("zero", "is not the name of a CDI device"),
    ] {
        let status = pod.create(with("refused", device)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
        assert!(status.message().contains(reason), "{status}");
    }
    drop(spec);
    daemon.finish().await;
}
