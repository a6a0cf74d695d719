//! A container sees only what it should.

use std::collections::BTreeSet;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;

/// CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
/// SETFCAP: the set that containerd and Docker give by default.
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_only_what_it_should() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "jail")).await;
    let script = "ls -l /proc/self/fd > /tmp/fds; exec sleep 1000";
    let id = pod.start(container_config("main", &name, &["/bin/sh", "-c", script])).await;

    for status in [pod.shell(&id, "cat /proc/1/status").await, pod.shell(&id, "cat /proc/self/status").await]
    {
        let field = |name: &str| {
            let line = status
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap_or_else(|| panic!("{name} in {status}"));
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), DEFAULT_CAPABILITIES, "{set}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
        }
        // Kubernetes: no profile asked for is Unconfined; see security_context.rs for RuntimeDefault.
        assert_eq!(field("Seccomp:"), "0");
    }

    // Descriptors 0, 1, 2 and the directory that ls itself opened
    let descriptors = pod.shell(&id, "cat /tmp/fds").await;
    let numbers: BTreeSet<u32> = descriptors
        .lines()
        .filter_map(|line| line.split(" -> ").next()?.rsplit(' ').next()?.parse().ok())
        .collect();
    assert_eq!(numbers, BTreeSet::from([0, 1, 2, 3]), "{descriptors}");
    let of_exec = pod.shell(&id, "ls /proc/self/fd").await;
    assert_eq!(of_exec.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"], "{of_exec}");

    // Processes: its own
    let processes = pod.shell(&id, "ls /proc | grep -E '^[0-9]+$' | head -20").await;
    assert!(processes.lines().next() == Some("1") && processes.lines().count() <= 6, "{processes}");

    // Devices
    let devices = pod.shell(&id, "ls /dev").await;
    let found: BTreeSet<&str> = devices.split_whitespace().collect();
    let wanted = BTreeSet::from([
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    ]);
    assert_eq!(found, wanted);
    let made = pod.exec(&id, &["/bin/sh", "-c", "mknod /tmp/disk b 8 0 && head -c 1 /tmp/disk"]).await;
    assert_ne!(made.exit_code, 0, "a disk of the host can be opened");
    let made = pod.exec(&id, &["/bin/sh", "-c", "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem"]).await;
    assert_ne!(made.exit_code, 0, "/dev/mem can be opened");

    // Masked and read-only paths
    assert_eq!(pod.shell(&id, "cat /proc/kcore | wc -c").await.trim(), "0");
    assert_eq!(pod.shell(&id, "cat /proc/timer_list /proc/keys | wc -c").await.trim(), "0");
    assert_eq!(pod.shell(&id, "ls /sys/firmware | wc -l").await.trim(), "0");
    for path in
        ["/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/kernel/mm/transparent_hugepage/enabled"]
    {
        let write = pod.exec(&id, &["/bin/sh", "-c", &format!("echo x > {path}")]).await;
        assert_ne!(write.exit_code, 0, "{path} is writable");
    }

    // Mounts: nothing of the host's table
    let mounts = pod.shell(&id, "cat /proc/self/mountinfo").await;
    let points: BTreeSet<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    for wanted in [
        "/",
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys",
        "/sys/fs/cgroup",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/etc/hostname",
    ] {
        assert!(points.contains(wanted), "{wanted} is not mounted:\n{mounts}");
    }
    for point in &points {
        let expected = ["/", "/proc", "/dev", "/sys", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];
        assert!(
            expected.contains(point)
                || ["/proc/", "/dev/", "/sys/"].iter().any(|prefix| point.starts_with(prefix)),
            "unexpected mount {point}:\n{mounts}"
        );
    }
    assert!(!mounts.contains("shared:"), "a mount of the container is shared:\n{mounts}");

    // Namespaces: all its own but the time and user namespaces. Those of a machine, whose network is its only pod's, are
    // numbered by another kernel.
    let all = ["pid", "mnt", "ipc", "uts", "cgroup", "net"];
    let own_kernel = hull_tests::microvm::excepted("the machine's first network namespace is the pod's");
    for kind in all.iter().take(if own_kernel { 5 } else { 6 }) {
        let own = pod.shell(&id, &format!("readlink /proc/self/ns/{kind}")).await;
        let host = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(own.trim(), host.to_str().unwrap(), "{kind} namespace is the host's");
    }
    assert_eq!(pod.shell(&id, "hostname").await.trim(), "jail");
    let groups = pod.shell(&id, "cat /proc/self/cgroup").await;
    assert!(
        groups.lines().all(|line| line.ends_with(":/")),
        "the cgroup namespace shows the host's tree:\n{groups}"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_has_the_hosts_devices_and_every_capability() {
    if hull_tests::microvm::excepted("privileged has the guest's devices") {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "mighty");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let mut pod = Pod::run(&daemon, config).await;
    let mut config = container_config("main", &name, &["/bin/sleep", "1000"]);
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let id = pod.start(config).await;

    let bounding = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("CapBnd:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let own = bounding(&std::fs::read_to_string("/proc/self/status").unwrap());
    assert_eq!(bounding(&pod.shell(&id, "cat /proc/1/status").await), own);
    assert!(pod.shell(&id, "ls /dev").await.contains("loop-control"));
    assert_eq!(
        pod.shell(&id, "head -c 1 /proc/kcore | wc -c; mount -t tmpfs none /tmp && echo mounted")
            .await
            .lines()
            .last(),
        Some("mounted")
    );
    daemon.finish().await;
}
