//! Layers on a file system that cannot back an EROFS mount by itself.

use std::path::Path;
use std::process::Command;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;

/// tmpfs (a live system, a root in memory) makes the kernel answer ENOTBLK to a file-backed mount.
#[tokio::test(flavor = "multi_thread")]
async fn layers_on_a_tmpfs_come_through_loop_devices_that_go_with_them() {
    if hull_tests::microvm::excepted(
        "a machine reads its layers from its disk of images, through no loop device",
    ) {
        return;
    }
    let memory = Tmpfs::mount();
    let registry = Registry::start();
    let busybox = image::busybox();
    let name = registry.push("busybox", "v1", &busybox);
    let mut daemon = Daemon::start_rooted_at(memory.path()).await;
    daemon.pull(&name).await;
    assert_eq!(loop_devices_below(memory.path()), 0, "a pull mounts nothing");

    // Given two containers of the same image
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "memory")).await;
    let first = pod.start(container_config("first", &name, &["/bin/sleep", "1000"])).await;
    let second = pod.start(container_config("second", &name, &["/bin/sleep", "1000"])).await;

    // Then they share one device for each layer, and see what the layers say
    assert_eq!(loop_devices_below(memory.path()), busybox.layers());
    assert_eq!(pod.shell(&first, "cat /greeting; ls /data").await, "hello from the top layer\nkept\n");
    pod.shell(&first, "echo mine > /greeting").await;
    assert_eq!(pod.shell(&second, "cat /greeting").await, "hello from the top layer\n");

    // And the layers are the same devices for a hulld that was killed and came back
    daemon.kill();
    daemon.restart().await;
    pod.reconnect(&daemon).await;
    let third = pod.start(container_config("third", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!(pod.shell(&third, "cat /greeting").await, "hello from the top layer\n");
    assert_eq!(loop_devices_below(memory.path()), busybox.layers());

    // And nothing holds them when all is gone: with a device attached the file system could not be unmounted
    daemon.finish().await;
    assert_eq!(loop_devices_below(memory.path()), 0);
    memory.unmount();
}

/// A file system in memory at a directory of its own.
struct Tmpfs {
    directory: Option<tempfile::TempDir>,
}

impl Tmpfs {
    fn mount() -> Tmpfs {
        let directory = tempfile::Builder::new().prefix("hull-e2e-tmpfs-").tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256m,mode=700", "hull-e2e"])
            .arg(directory.path())
            .status();
        assert!(mounted.unwrap().success(), "mount of a tmpfs at {}", directory.path().display());
        Tmpfs { directory: Some(directory) }
    }

    fn path(&self) -> &Path {
        self.directory.as_ref().expect("mounted").path()
    }

    /// Panics if anything still uses it.
    fn unmount(mut self) {
        let directory = self.directory.take().expect("mounted");
        let unmounted = Command::new("umount").arg(directory.path()).status();
        assert!(unmounted.unwrap().success(), "{} is still in use", directory.path().display());
    }
}

impl Drop for Tmpfs {
    /// After a failed test.
    fn drop(&mut self) {
        if let Some(directory) = &self.directory {
            let _ = Command::new("umount").arg("-l").arg(directory.path()).status();
        }
    }
}

/// How many loop devices have a file below `directory` behind them.
fn loop_devices_below(directory: &Path) -> usize {
    let devices = std::fs::read_dir("/sys/block").unwrap().flatten();
    let files =
        devices.filter_map(|device| std::fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.filter(|file| Path::new(file.trim_end()).starts_with(directory)).count()
}
