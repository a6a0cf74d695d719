//! What tests of machines begin with: a daemon that can make them, and volumes as kubelet makes them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Packing};
use hull_tests::microvm::available;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;

/// A daemon that can make machines, and an image that it has.
pub(crate) struct Ground {
    pub(crate) daemon: Daemon,
    /// The image's name.
    pub(crate) image: String,
    /// Where the image came from.
    pub(crate) registry: Registry,
}

impl Ground {
    /// With busybox; `None` where there can be no machines.
    pub(crate) async fn new() -> Option<Ground> {
        Ground::with(&image::busybox()).await
    }

    /// With this image.
    pub(crate) async fn with(image: &Image) -> Option<Ground> {
        let daemon = Daemon::start().await;
        if !available(&daemon).await {
            daemon.finish().await;
            return None;
        }
        let registry = Registry::start();
        let image = registry.push("app", "v1", image);
        daemon.pull(&image).await;
        Some(Ground { daemon, image, registry })
    }

    pub(crate) async fn pod(&self, name: &str) -> Pod {
        Pod::run_microvm(&self.daemon, networked_pod_config(&self.daemon, name)).await
    }

    pub(crate) fn sleeper(&self) -> cri::ContainerConfig {
        container_config("main", &self.image, &["/bin/sleep", "1000"])
    }

    pub(crate) fn record(&self, pod: &str) -> PathBuf {
        self.daemon.root().join("state/sandboxes").join(pod)
    }

    pub(crate) async fn restart(&mut self, pod: &mut Pod) {
        self.daemon.restart().await;
        pod.reconnect(&self.daemon).await;
    }
}

/// What kubelet would keep for one pod.
pub(crate) struct Kubelet(PathBuf);

impl Kubelet {
    pub(crate) fn of(daemon: &Daemon, pod: &str) -> Self {
        Self(daemon.path("kubelet/pods").join(pod))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        let path = self.0.join("volumes").join(format!("kubernetes.io~{plugin}")).join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// As kubelet's AtomicWriter does it.
    pub(crate) fn write(volume: &Path, generation: &str, files: &[(&str, &str)]) {
        let payload = volume.join(generation);
        fs::create_dir(&payload).unwrap();
        for (name, content) in files {
            fs::write(payload.join(name), content).unwrap();
            if !volume.join(name).exists() {
                symlink(Path::new("..data").join(name), volume.join(name)).unwrap();
            }
        }
        symlink(generation, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    }
}

pub(crate) fn mount(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        ..Default::default()
    }
}

/// busybox and perl.
pub(crate) fn perl() -> Image {
    Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (image::perl_layer(), Packing::Plain)],
        serde_json::json!({"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"]}),
    )
}

pub(crate) async fn prints(pod: &Pod, name: &str, text: &str) {
    eventually(text, patience(30), async || pod.log(name).contains(text).then_some(())).await;
}

pub(crate) fn http_get(target: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(target).ok()?;
    stream.set_read_timeout(Some(patience(5))).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.").then_some(answer)
}

/// Ids of the machines that have a directory.
pub(crate) fn machines_of(daemon: &Daemon) -> Vec<String> {
    let entries = fs::read_dir(daemon.root().join("machines")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "templates").collect()
}

/// From the verbose status: the VMM's pid.
pub(crate) async fn vmm_of(daemon: &Daemon, pod: &Pod) -> rustix::process::Pid {
    let pid = crate::survival::agent_of(daemon, &pod.id).await;
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(program.ends_with("hull-vmm"), "{program:?}");
    rustix::process::Pid::from_raw(pid).unwrap()
}
