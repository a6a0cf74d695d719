//! A guest whose init is busybox and a script; words of the kernel's command line say what it does.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use hull_vmm::probe;

const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
echo "test: init"
for word in $(cat /proc/cmdline); do
  case $word in
    test.memory) grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem ;;
    test.cpus)
      echo "test: $(nproc) online of $(cat /sys/devices/system/cpu/present)"
      for cpu in 1 2 3; do
        echo 1 >/sys/devices/system/cpu/cpu$cpu/online && echo "test: $(nproc) online"
      done ;;
    test.idle) echo "test: idle"; sleep 16; echo "test: awake" ;;
    test.count)
      mount -t devtmpfs dev /dev
      for disk in /dev/vd?; do dd if=$disk of=/dev/null bs=4096 count=1 2>/dev/null; done
      i=0; while :; do i=$((i + 1)); echo "test: count $i"; usleep 200000; done ;;
    test.volumes)
      mkdir /mnt /etc
      mount -t virtiofs volumes /mnt && echo "test: mounted"
      until cat /mnt/0/go 2>/dev/null; do usleep 200000; done
      for user in 0 1000 70000; do
        echo "u$user:x:$user:$user::/:/bin/sh" >>/etc/passwd
        su u$user -c "echo 'of $user' >/mnt/0/by-$user" && echo "test: $(stat -c '%u %g' /mnt/0/by-$user)"
      done
      echo x 2>/dev/null >/mnt/1/new || echo "test: read-only"
      echo "test: $(cat /mnt/2)"
      echo "test: volumes done" ;;
    test.off) poweroff -f ;;
    test.restart) reboot -f ;;
    test.panic) exit 3 ;;
    test.devices) ls -l /sys/bus/virtio/devices /sys/bus/acpi/devices; dmesg | tail -150 ;;
  esac
done
sleep 1000
"#;

/// The guest's kernel.
pub(crate) fn kernel() -> PathBuf {
    std::env::var_os("HULL_GUEST_KERNEL").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target-guest/vmlinux")),
        Into::into,
    )
}

/// /dev/kvm, if it can.
pub(crate) fn kvm() -> Option<OwnedFd> {
    match probe::open().and_then(|kvm| probe::probe(kvm.as_fd(), probe::LIMIT).map(|()| kvm)) {
        Ok(kvm) => Some(kvm),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// A cpio archive ("newc") with busybox and the script.
pub(crate) fn initramfs() -> File {
    let mut archive = tempfile::tempfile().unwrap();
    let mut entry =
        |name: &str, mode: u32, content: &[u8], device: (u32, u32)| {
            let mut bytes = format!(
            "070701{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{name}\0",
            0, mode, 0, 0, 1, 0, content.len(), 0, 0, device.0, device.1, name.len() + 1, 0
        )
        .into_bytes();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            archive.write_all(&bytes).unwrap();
        };
    for directory in ["bin", "dev", "proc", "sys"] {
        entry(directory, 0o40755, b"", (0, 0));
    }
    entry("dev/console", 0o20600, b"", (5, 1));
    entry("bin/busybox", 0o100755, &std::fs::read("/bin/busybox").unwrap(), (0, 0));
    let applets = [
        "sh", "mount", "grep", "cat", "nproc", "sleep", "usleep", "poweroff", "reboot", "ls", "dmesg",
        "tail", "mkdir", "su", "stat",
    ];
    for applet in applets {
        entry(&format!("bin/{applet}"), 0o120777, b"busybox", (0, 0));
    }
    entry("init", 0o100755, INIT.as_bytes(), (0, 0));
    entry("TRAILER!!!", 0, b"", (0, 0));
    archive
}

/// What an idle machine may cost in two seconds: 2 % of a processor. Where the guest is emulated as a whole, each of its
/// dozen timers a second takes about two milliseconds instead of some microseconds.
pub(crate) fn idle_cost() -> Duration {
    Duration::from_millis(if std::env::var_os("HULL_IN_NODE").is_some() { 120 } else { 40 })
}
