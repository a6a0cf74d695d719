//! Images that attack the launch.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use hull_agent::container::LaunchError;
use hull_agent::container::Stage;
use hull_agent::protocol::messages;

use crate::support::{Pod, Wanted, image, scratch};

crate::tests!(
    a_link_at_proc_sys_or_dev_is_refused,
    a_link_at_etc_stays_inside,
    mount_destinations_stay_inside,
    nothing_is_mounted_into_proc,
    a_masked_path_that_was_redirected_stops_the_launch,
    a_working_directory_outside_is_refused,
    passwd_files_that_are_no_files_are_refused,
    a_failed_launch_leaves_nothing,
    a_replaced_null_device_is_not_used_by_an_exec,
    the_host_is_nowhere,
);

fn refused(pod: &Pod, wanted: &Wanted) -> (Stage, String) {
    match pod.start(wanted) {
        Err(LaunchError::Failed(failure)) => (failure.stage, failure.message),
        Err(error) => panic!("another error: {error}"),
        Ok(running) => panic!("it started: {:?}", running.kill()),
    }
}

fn replace(path: &Path, target: &str) {
    fs::remove_dir_all(path).unwrap();
    symlink(target, path).unwrap();
}

// CVE-2019-16884, CVE-2023-27561: /proc was a link, and the masks and labels went to the wrong place.
fn a_link_at_proc_sys_or_dev_is_refused() {
    let names = ["proc", "sys", "dev"];
    let wanted = names.map(|name| {
        let image = image(&format!("image-{name}"), |root| {
            fs::create_dir(root.join("host")).unwrap();
            replace(&root.join(name), "/host");
        });
        Wanted::script(name, &image, "true")
    });
    let pod = Pod::enter();
    for (name, wanted) in names.iter().zip(&wanted) {
        let (stage, message) = refused(&pod, wanted);
        assert_eq!(
            (stage, message),
            (Stage::Mount, format!("cannot mount /{name}: the image has a symbolic link there"))
        );
    }
}

fn a_link_at_etc_stays_inside() {
    let image = image("image", |root| {
        fs::remove_dir_all(root.join("etc")).unwrap();
        symlink("../../../../../../../usr/conf", root.join("etc")).unwrap();
    });
    let wanted = Wanted::script("one", &image, "cat /usr/conf/hostname; readlink /etc");
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["pod-name", "../../../../../../../usr/conf"]);
}

// CVE-2021-30465, CVE-2024-45310.
fn mount_destinations_stay_inside() {
    let outside = scratch().join("outside");
    fs::create_dir(&outside).unwrap();
    let volume = scratch().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "volume\n").unwrap();
    let image = image("image", |root| {
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../../../../../../../../../..", root.join("up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
    });
    let through = |name: &str, destination: &str| {
        let mut wanted = Wanted::script(
            name,
            &image,
            "find / -xdev -name file -path '*here*' 2>/dev/null; \
            cat /proc/self/mountinfo | cut -d' ' -f5 | grep here",
        );
        wanted.mount(&volume, destination);
        wanted
    };
    let wanted = [
        through("absolute", "/absolute/here"),
        through("up", "/up/here"),
        through("dots", "/a/../../../../here"),
        through("loop", "/loop/here"),
    ];
    let pod = Pod::enter();
    let expected = [format!("{}/here", outside.display()), "/here".into(), "/here".into()];
    for (wanted, expected) in wanted.iter().zip(&expected) {
        assert_eq!(pod.run(wanted).lines(), [expected]);
    }
    assert_eq!(refused(&pod, &wanted[3]).0, Stage::Mount);
    pod.on_host(|| assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nothing was made outside"));
}

// CVE-2025-52881: procfs writes were redirected.
fn nothing_is_mounted_into_proc() {
    let volume = scratch().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(scratch().join("file"), "fake").unwrap();
    let image = image("image", |root| symlink("/proc/sys", root.join("innocent")).unwrap());
    let with = |name: &str, source: &Path, destination: &str| {
        let mut wanted = Wanted::script(name, &image, "cat /proc/meminfo | head -c 4");
        wanted.mount(source, destination);
        wanted
    };
    let file = scratch().join("file");
    let bad = [
        with("attr", &volume, "/proc/self/attr"),
        with("kernel", &volume, "/proc/sys/kernel"),
        with("link", &volume, "/innocent/kernel"),
        with("proc", &volume, "/proc"),
    ];
    let good = with("lxcfs", &file, "/proc/meminfo");
    let pod = Pod::enter();
    for wanted in &bad {
        let (stage, message) = refused(&pod, wanted);
        assert!(stage == Stage::Mount && message.contains("proc"), "{message}");
    }
    assert_eq!(pod.run(&good).stdout, "fake");
}

// CVE-2025-31133: a masked path was not what it seemed.
fn a_masked_path_that_was_redirected_stops_the_launch() {
    let image = image("image", |root| symlink("/tmp", root.join("proc2")).unwrap());
    let mut outside = Wanted::script("outside", &image, "true");
    fs::create_dir_all(scratch().join("fake/kcore")).unwrap();
    outside.spec.mounts.push(messages::Mount {
        destination: "/proc/sys".into(),
        source: Some(messages::mount::Source::Tmpfs(messages::Tmpfs { size: 4096, mode: 0o755 })),
        ..Default::default()
    });
    // A masked path behind a link: what is masked is what the link leads to, inside.
    let mut linked = Wanted::script("linked", &image, "ls -A /tmp; touch /tmp/x 2>&1 | grep -c Read-only");
    linked.spec.masked_paths.push("/proc2".into());
    let pod = Pod::enter();
    assert_eq!(refused(&pod, &outside).0, Stage::Mount);
    assert_eq!(pod.run(&linked).lines(), ["1"]);
}

// CVE-2024-21626.
fn a_working_directory_outside_is_refused() {
    let image = image("image", |root| {
        symlink("/proc/self/fd/9", root.join("magic")).unwrap();
        fs::write(root.join("file"), "").unwrap();
    });
    let with = |name: &str, cwd: &str| {
        let mut wanted = Wanted::script(name, &image, "pwd");
        wanted.process().cwd = cwd.into();
        wanted
    };
    let bad = [with("descriptor", "/proc/self/fd/9"), with("link", "/magic"), with("file", "/file")];
    let good = with("dots", "/../../tmp/../new");
    let pod = Pod::enter();
    for wanted in &bad {
        assert_eq!(refused(&pod, wanted).0, Stage::WorkingDirectory);
    }
    assert_eq!(pod.run(&good).lines(), ["/new"]);
}

fn passwd_files_that_are_no_files_are_refused() {
    let device = image("image-device", |root| {
        fs::remove_file(root.join("etc/passwd")).unwrap();
        let kind = rustix::fs::FileType::CharacterDevice;
        let zero = rustix::fs::makedev(1, 5);
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, root.join("etc/passwd"), kind, mode, zero).unwrap();
    });
    let fifo = image("image-fifo", |root| {
        fs::remove_file(root.join("etc/group")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let path = root.join("etc/group");
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    });
    let huge = image("image-huge", |root| {
        fs::write(root.join("etc/passwd"), "x".repeat((1 << 20) + 1)).unwrap();
    });
    let wanted = [("device", &device), ("fifo", &fifo), ("huge", &huge)]
        .map(|(name, image)| Wanted::script(name, image, "true"));
    let pod = Pod::enter();
    for wanted in &wanted {
        let (stage, message) = refused(&pod, wanted);
        assert_eq!(stage, Stage::User, "{message}");
    }
}

fn a_failed_launch_leaves_nothing() {
    let image = image("image", |_| ());
    let wanted = Wanted::new("one", &[image], &["/no/such/program"]);
    let pod = Pod::enter();
    let mounts = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let descriptors = || fs::read_dir("/proc/thread-self/fd").unwrap().count();
    let leaf = pod.leaf("one");
    let before = (mounts(), descriptors());
    assert_eq!(refused(&pod, &wanted).0, Stage::Execute);
    assert_eq!((mounts(), descriptors()), before);
    assert_eq!(pod.processes(), []);
    drop(leaf);
}

// CVE-2025-31133, for a container that has been running.
fn a_replaced_null_device_is_not_used_by_an_exec() {
    let image = image("image", |_| ());
    let script = "rm /dev/null && mkfifo /dev/null && echo ready && exec sleep 1000";
    let wanted = Wanted::script("one", &image, script);
    let pod = Pod::enter();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let output = pod.exec(&running, "stat -L -c '%t:%T' /proc/self/fd/0; cat");
    assert_eq!(output.lines(), ["1:3"]);
    running.kill();
}

fn the_host_is_nowhere() {
    let image = image("image", |_| ());
    let wanted = Wanted::script(
        "one",
        &image,
        "ls -d /work /proc/1/root/work /run/hull 2>/dev/null; cat /proc/self/mountinfo",
    );
    let pod = Pod::enter();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let mut points: Vec<&str> = mounts.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
    points.sort_unstable();
    let mut expected = vec!["/", "/proc", "/run/hull/shm", "/sys"];
    if pod.facts.cgroups.is_v2() {
        expected.insert(2, "/run/hull/cgroup");
    }
    assert_eq!(points, expected);
    let output = pod.run(&wanted);
    assert!(!output.stdout.contains("/work\n") && !output.stdout.contains("ext4"), "{output:?}");
}
