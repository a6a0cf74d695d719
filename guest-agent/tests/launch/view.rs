//! What a container sees.

use std::fs;
use std::time::Instant;

use hull_agent::protocol::messages;

use crate::support::{CAPABILITIES, Pod, Wanted, fields, image};

crate::tests!(
    a_container_has_exactly_its_privileges,
    only_three_descriptors_are_open,
    every_namespace_is_the_pods_or_its_own,
    dev_has_the_default_nodes_and_links,
    mounts_are_the_expected_ones,
    masked_and_read_only_paths_hold,
    a_privileged_container_can_write_to_sys_and_has_all_capabilities,
    the_pods_files_are_there_and_the_images_stay_otherwise,
    a_read_only_root_is_read_only,
    a_launch_is_fast,
);

fn a_container_has_exactly_its_privileges() {
    let image = image("image", |_| ());
    // No shell between: it has signals of its own that it ignores.
    let of = |name: &str| Wanted::new(name, std::slice::from_ref(&image), &["cat", "/proc/self/status"]);
    let root = of("root");
    let mut user = of("user");
    user.process().user = Some(messages::User {
        user: Some(messages::user::User::Uid(1000)),
        supplemental_groups: vec![7],
        ..Default::default()
    });
    let mut ambient = of("ambient");
    ambient.process().user = user.process().user.clone();
    (ambient.process().cap_ambient, ambient.process().cap_inheritable) = (1 << 10, 1 << 10);
    ambient.process().no_new_privs = false;
    let pod = Pod::enter();
    let set = |value: u64| format!("{value:016x}");
    let check = |wanted: &Wanted, effective: u64, inheritable: u64, no_new_privs: &str| {
        let output = pod.run(wanted);
        let status = fields(&output.lines());
        for (key, value) in [
            ("CapBnd", set(CAPABILITIES)),
            ("CapEff", set(effective)),
            ("CapPrm", set(effective)),
            ("CapInh", set(inheritable)),
            ("CapAmb", set(inheritable)),
            ("NoNewPrivs", no_new_privs.into()),
            ("Seccomp", "2".into()),
            ("Seccomp_filters", "1".into()),
            ("SigBlk", set(0)),
            ("SigIgn", set(0)),
            ("Umask", "0022".into()),
        ] {
            assert_eq!(status[key], value, "{key}");
        }
        status
    };
    check(&root, CAPABILITIES, 0, "1");
    let status = check(&user, 0, 0, "1");
    assert_eq!((status["Uid"].as_str(), status["Groups"].as_str()), ("1000\t1000\t1000\t1000", "0 7"));
    check(&ambient, 1 << 10, 1 << 10, "0");
}

// CVE-2024-21626: a leaked descriptor.
fn only_three_descriptors_are_open() {
    let image = image("image", |_| ());
    let wanted = Wanted::script(
        "one",
        &image,
        "for f in /proc/$$/fd/*; do [ -e $f ] && echo ${f##*/} $(readlink $f); done; true",
    );
    let pod = Pod::enter();
    // Even one that the agent forgot to mark.
    let leak = fs::File::open("/run/hull/etc/hosts").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let output = pod.run(&wanted);
    let lines = output.lines();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0], "0 /dev/null");
    assert!(lines[1].starts_with("1 pipe:") && lines[2].starts_with("2 pipe:"), "{lines:?}");
}

fn every_namespace_is_the_pods_or_its_own() {
    let image = image("image", |_| ());
    let script = "for n in mnt pid ipc uts net cgroup user; do echo $n $(readlink /proc/self/ns/$n); done; \
        echo self $$; echo host $(hostname); cut -d: -f3 /proc/self/cgroup | sort -u";
    let own =
        |name: &str| fs::read_link(format!("/proc/thread-self/ns/{name}")).unwrap().display().to_string();
    let wanted = Wanted::script("one", &image, script);
    let before: Vec<String> = ["ipc", "uts"].iter().map(|name| own(name)).collect();
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    let lines = output.lines();
    let seen = fields(&lines);
    for name in ["ipc", "uts", "net", "user"] {
        assert_eq!(seen[name], own(name), "{name}");
    }
    for name in ["mnt", "pid", "cgroup"] {
        assert_ne!(seen[name], own(name), "{name}");
    }
    assert!(!before.contains(&own("ipc")) && !before.contains(&own("uts")));
    assert_eq!((seen["self"].as_str(), seen["host"].as_str()), ("1", "pod-name"));
    assert_eq!(*lines.last().unwrap(), "/", "the root of every hierarchy is the container's own leaf");
    assert_eq!(lines.iter().filter(|line| line.starts_with('/')).count(), 1, "{lines:?}");
}

fn dev_has_the_default_nodes_and_links() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script(
        "one",
        &image,
        "ls /dev | tr '\\n' ' '; echo; for f in /dev/*; do [ -L $f ] && echo $f $(readlink $f); done; \
         stat -c '%n %t:%T %a %u:%g' /dev/null /dev/tty /dev/urandom /dev/fuse /dev/sub/loop; \
         echo x > /dev/null && head -c 2 /dev/zero | od -An -tx1 && stat -c %a /dev/shm",
    );
    let device = |path: &str, r#type: &str, major, minor| messages::Device {
        path: path.into(),
        r#type: r#type.into(),
        major,
        minor,
        mode: 0o640,
        uid: 3,
        gid: 4,
        access: "rwm".into(),
        block_slot: None,
        ..Default::default()
    };
    wanted.spec.devices = vec![device("/dev/fuse", "c", 10, 229), device("/dev/sub/loop", "b", 7, 1)];
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    assert_eq!(
        output.lines(),
        [
            "core fd full fuse mqueue null ptmx pts random shm stderr stdin stdout sub tty urandom zero ",
            "/dev/core /proc/kcore",
            "/dev/fd /proc/self/fd",
            "/dev/ptmx pts/ptmx",
            "/dev/stderr /proc/self/fd/2",
            "/dev/stdin /proc/self/fd/0",
            "/dev/stdout /proc/self/fd/1",
            "/dev/null 1:3 666 0:0",
            "/dev/tty 5:0 666 0:0",
            "/dev/urandom 1:9 666 0:0",
            "/dev/fuse a:e5 640 3:4",
            "/dev/sub/loop 7:1 640 3:4",
            " 00 00",
            "1777",
        ]
    );
}

fn mounts_are_the_expected_ones() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, "cat /proc/self/mountinfo");
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    let mut mounts = Vec::new();
    for line in output.lines() {
        let (left, right) = line.split_once(" - ").unwrap();
        let left: Vec<&str> = left.split(' ').collect();
        assert_eq!(left.len(), 6, "no propagation: {line}");
        let (point, options, kind) = (left[4], left[5], right.split(' ').next().unwrap());
        if !point.starts_with("/sys/fs/cgroup/") {
            mounts.push(format!("{point} {kind} {}", options.replace(",relatime", "")));
        } else {
            assert!(options.starts_with("ro,nosuid,nodev,noexec") && kind.starts_with("cgroup"), "{line}");
        }
    }
    mounts.sort();
    let kind = if pod.facts.cgroups.is_v2() { "cgroup2" } else { "tmpfs" };
    let cgroup = format!("/sys/fs/cgroup {kind} ro,nosuid,nodev,noexec");
    let null = "tmpfs rw,nosuid,noexec";
    let mut expected = vec![
        "/ overlay rw".into(),
        "/dev tmpfs rw,nosuid".into(),
        "/dev/mqueue mqueue rw,nosuid,nodev,noexec".into(),
        "/dev/pts devpts rw,nosuid,noexec".into(),
        "/dev/shm tmpfs rw,nosuid,nodev,noexec".into(),
        "/etc/hostname tmpfs rw,nosuid,noexec".into(),
        "/etc/hosts tmpfs rw,nosuid,noexec".into(),
        "/proc proc rw,nosuid,nodev,noexec".into(),
        "/sys sysfs ro,nosuid,nodev,noexec".into(),
        cgroup,
    ];
    for path in crate::support::READONLY.iter().filter(|path| fs::exists(path).unwrap()) {
        expected.push(format!("{path} proc ro,nosuid,nodev,noexec"));
    }
    for path in crate::support::MASKED.iter().filter(|path| fs::exists(path).unwrap()) {
        let directory = fs::metadata(path).unwrap().is_dir();
        let options = if directory { "tmpfs ro,nosuid,nodev,noexec" } else { null };
        expected.push(format!("{path} {options}"));
    }
    expected.sort();
    // A strictatime mount shows no word for it.
    assert_eq!(mounts, expected);
}

fn masked_and_read_only_paths_hold() {
    let image = image("image", |_| ());
    let wanted = Wanted::script(
        "one",
        &image,
        "wc -c < /proc/timer_list; ls -A /sys/firmware | wc -l; cat /proc/keys | wc -c; \
         for f in /proc/sys/kernel/printk /proc/sysrq-trigger /sys/fs/cgroup/x; do \
         (echo 1 > $f) 2>/dev/null && echo written $f; done; touch /sys/firmware/x 2>&1 | grep -c Read-only",
    );
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["0", "0", "0", "1"]);
}

fn a_privileged_container_can_write_to_sys_and_has_all_capabilities() {
    let image = image("image", |_| ());
    let script = "grep -E 'CapEff|Seccomp:' /proc/self/status; grep ' /sys ' /proc/mounts | cut -d' ' -f4 | cut -c1-2; \
        mount -t tmpfs none /tmp && echo mounted";
    let mut wanted = Wanted::script("one", &image, script);
    let all = hull_sys::privilege::bounding_set().unwrap();
    let process = wanted.process();
    (process.cap_bounding, process.cap_effective, process.cap_permitted) = (all, all, all);
    process.seccomp.clear();
    process.no_new_privs = false;
    wanted.spec.masked_paths.clear();
    wanted.spec.readonly_paths.clear();
    (wanted.spec.writable_sys, wanted.spec.writable_cgroup) = (true, true);
    let pod = Pod::enter();
    let output = pod.run(&wanted);
    assert_eq!(output.lines(), [&format!("CapEff:\t{all:016x}"), "Seccomp:\t0", "rw", "mounted"]);
}

fn the_pods_files_are_there_and_the_images_stay_otherwise() {
    let image = image("image", |root| fs::write(root.join("etc/resolv.conf"), "of the image\n").unwrap());
    let script = "cat /etc/hostname /etc/hosts /etc/resolv.conf";
    let own = Wanted::script("own", &image, script);
    let mut mounted = Wanted::script("mounted", &image, script);
    fs::write(crate::support::scratch().join("hosts"), "of the request\n").unwrap();
    mounted.mount(crate::support::scratch().join("hosts"), "/etc/hosts");
    let pod = Pod::enter();
    assert_eq!(pod.run(&own).lines(), ["pod-name", "127.0.0.1 localhost", "of the image"]);
    assert_eq!(pod.run(&mounted).lines(), ["pod-name", "of the request", "of the image"]);
}

fn a_read_only_root_is_read_only() {
    let image = image("image", |root| fs::remove_dir(root.join("sys")).unwrap());
    let mut wanted = Wanted::script(
        "one",
        &image,
        "for f in /x /etc/hosts /etc/x; do (echo 1 > $f) 2>/dev/null && echo written $f; done; \
         echo 1 > /dev/shm/x; pwd; ls -d /sys",
    );
    wanted.rootfs().readonly = true;
    wanted.process().cwd = "/made/for/me".into();
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["/made/for/me", "/sys"]);
}

/// Not a promise that a test could hold on a shared machine: only printed.
fn a_launch_is_fast() {
    let image = image("image", |_| ());
    let wanted: Vec<_> = (0..12)
        .map(|number| Wanted::new(&format!("c{number}"), std::slice::from_ref(&image), &["true"]))
        .collect();
    let before = Instant::now();
    let pod = Pod::enter();
    println!("sandbox::enter and the pod's cgroup: {:?}", before.elapsed());
    for one in &wanted {
        let leaf = pod.leaf(&one.spec.cgroup_leaf);
        let before = Instant::now();
        let running = pod.start(one).unwrap();
        let launched = before.elapsed();
        assert_eq!(running.finish().code, 0);
        println!("launch: {launched:?}, to its end {:?}", before.elapsed());
        drop(leaf);
    }
}
