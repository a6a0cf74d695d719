//! Containers of a pod with a user namespace.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, chown};

use hull_agent::container::{self, PidNamespace};
use hull_agent::protocol::messages;
use hull_sys::process;

use crate::support::{CAPABILITIES, Pod, Wanted, fields, image, scratch};

crate::tests!(
    a_container_is_root_inside_and_nobody_outside,
    every_namespace_belongs_to_the_user_namespace,
    what_a_container_writes_belongs_to_its_own_ids,
    volumes_are_mapped_as_asked,
    masks_and_read_only_mounts_cannot_be_taken_away,
    an_exec_has_the_same_ids,
    a_shared_pid_namespace_belongs_to_it_too,
    sysctls_and_names_can_be_set,
    an_id_that_is_not_mapped_is_refused,
    a_user_can_write_to_its_standard_streams_by_name,
    an_image_can_be_a_volume,
);

fn a_container_is_root_inside_and_nobody_outside() {
    let image = image("image", |_| ());
    let mut wanted =
        Wanted::script("one", &image, "cat /proc/self/uid_map /proc/self/gid_map; echo ready; sleep 1000");
    wanted.process().cap_effective = CAPABILITIES;
    let pod = Pod::in_user_namespace();
    let mut running = pod.start(&wanted).unwrap();
    let words = |line: String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(running.line()), ["0", "100000", "65536"]);
    assert_eq!(words(running.line()), ["0", "200000", "65536"]);
    assert_eq!(running.line(), "ready");
    assert_eq!((running.launched.uid, running.launched.gid), (0, 0), "as the container numbers them");
    let status = fs::read_to_string(format!("/proc/{}/status", running.launched.pid)).unwrap();
    let status = fields(&status.lines().collect::<Vec<_>>());
    assert_eq!(status["Uid"], "100000\t100000\t100000\t100000");
    assert_eq!(status["Gid"], "200000\t200000\t200000\t200000");
    assert_eq!(status["CapEff"], format!("{CAPABILITIES:016x}"));
    running.kill();
}

fn every_namespace_belongs_to_the_user_namespace() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, "echo ready; sleep 1000");
    let pod = Pod::in_user_namespace();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let of = |name: &str| {
        let path = format!("/proc/{}/ns/{name}", running.launched.pid);
        fs::File::open(path).unwrap()
    };
    let user = of("user").metadata().unwrap().ino();
    assert_ne!(user, fs::metadata("/proc/thread-self/ns/user").unwrap().ino());
    for name in ["pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let owner = hull_sys::namespace::owner(of(name).as_fd()).unwrap();
        assert_eq!(rustix::fs::fstat(owner).unwrap().st_ino, user, "{name}");
    }
    running.kill();
}

fn what_a_container_writes_belongs_to_its_own_ids() {
    let image = image("image", |root| {
        fs::write(root.join("of-web"), "web\n").unwrap();
        chown(root.join("of-web"), Some(33), Some(34)).unwrap();
    });
    let script = "stat -c '%u:%g' / /bin/sh /of-web /tmp; echo x >> /of-web; touch /mine; \
                  chown 33:34 /mine; mkdir /new; stat -c '%u:%g' /of-web /mine /new /dev /dev/shm /dev/null \
                  /dev/pts /etc/hosts; echo y > /dev/shm/y && echo z >> /etc/hosts && mknod /dev/x p";
    let wanted = Wanted::script("one", &image, script);
    let pod = Pod::in_user_namespace();
    let output = pod.run(&wanted);
    assert_eq!(
        output.lines(),
        ["0:0", "0:0", "33:34", "0:0", "33:34", "33:34", "0:0", "0:0", "0:0", "0:0", "65534:65534", "0:0"],
        "{output:?}"
    );
    // On the disk they are the container's, so that another mapping could use them.
    let on_disk = |name: &str| pod.on_host(|| fs::metadata(scratch().join("one/upper").join(name)).unwrap());
    assert_eq!((on_disk("mine").uid(), on_disk("mine").gid()), (33, 34));
    assert_eq!((on_disk("new").uid(), on_disk("of-web").uid()), (0, 33));
}

fn volumes_are_mapped_as_asked() {
    let image = image("image", |_| ());
    for name in ["mapped", "plain"] {
        let volume = scratch().join(name);
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "").unwrap();
        chown(volume.join("file"), Some(7), Some(8)).unwrap();
    }
    let script = "stat -c '%u:%g' /mapped/file /plain/file; touch /mapped/new && chown 5:6 /mapped/new; \
                  touch /plain/new 2>&1";
    let mut wanted = Wanted::script("one", &image, script);
    wanted.mount(scratch().join("mapped"), "/mapped").idmapped = true;
    wanted.mount(scratch().join("plain"), "/plain");
    let pod = Pod::in_user_namespace();
    let output = pod.run(&wanted);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[..2], ["7:8", "65534:65534"], "{output:?}");
    assert!(lines[2].contains("Permission denied"), "{output:?}");
    let new = pod.on_host(|| fs::metadata(scratch().join("mapped/new")).unwrap());
    assert_eq!((new.uid(), new.gid()), (5, 6));

    // sysfs knows no mapped ids.
    let wanted = pod.on_host(|| {
        let mut wanted = Wanted::script("two", &image, "true");
        wanted.mount("/sys", "/mapped").idmapped = true;
        wanted
    });
    let error = pod.start(&wanted).err().unwrap().to_string();
    assert!(error.contains("/mapped") && error.contains("user namespace"), "{error}");
}

fn masks_and_read_only_mounts_cannot_be_taken_away() {
    let image = image("image", |_| ());
    fs::create_dir(scratch().join("volume")).unwrap();
    // With every capability, in its own user namespace.
    let script = "for p in /volume /sys /sys/firmware; do umount $p; done; mount -o remount,rw,bind /volume; \
        touch /volume/x; mount -t tmpfs none /tmp && echo mounted; \
        ls /sys/firmware | wc -l";
    let mut wanted = Wanted::script("one", &image, script);
    let all = (1 << 40) - 1;
    let process = wanted.process();
    (process.cap_bounding, process.cap_effective, process.cap_permitted) = (all, all, all);
    let mount = wanted.mount(scratch().join("volume"), "/volume");
    (mount.idmapped, mount.readonly) = (true, true);
    let pod = Pod::in_user_namespace();
    let output = pod.run(&wanted);
    let empty = pod.on_host(|| fs::read_dir(scratch().join("volume")).unwrap().count());
    assert_eq!(empty, 0, "{output:?}");
    // Mounts of its own it can make.
    assert_eq!(output.stdout, "mounted\n0\n", "{output:?}");
}

fn an_exec_has_the_same_ids() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, "echo ready; sleep 1000");
    wanted.process().user =
        Some(messages::User { user: Some(messages::user::User::Uid(33)), ..Default::default() });
    let pod = Pod::in_user_namespace();
    let mut running = pod.start(&wanted).unwrap();
    assert_eq!(running.line(), "ready");
    let output = pod.exec(
        &running,
        "id -u; cat /proc/self/uid_map | wc -l; \
         for p in self 1; do readlink /proc/$p/ns/user; done | uniq | wc -l; echo named > /dev/stdout",
    );
    assert_eq!(output.lines(), ["33", "1", "1", "named"]);
    let request = messages::Process {
        user: Some(messages::User { user: Some(messages::user::User::Uid(0)), ..Default::default() }),
        ..crate::support::process(&[
            "sh",
            "-c",
            "id -u; cat /proc/self/status | grep CapEff; echo sleep > /proc/1/comm || true",
        ])
    };
    let output = pod.exec_request(&running, &request, false).unwrap().finish();
    assert!(output.stdout.starts_with(&format!("0\nCapEff:\t{CAPABILITIES:016x}\n")), "{output:?}");
    let terminal = messages::Process { terminal: true, ..request };
    let running_exec = pod.exec_request(&running, &terminal, false).unwrap();
    assert!(running_exec.launched.terminal.is_some());
    running_exec.kill();
    running.kill();
}

fn a_shared_pid_namespace_belongs_to_it_too() {
    let image = image("image", |_| ());
    let first = Wanted::script("first", &image, "echo ready; exec sleep 1000");
    let second =
        Wanted::script("second", &image, "ps | grep -c 'sleep 1000'; kill -9 1; kill -15 1; echo still");
    let pod = Pod::in_user_namespace();
    let leaf = pod.leaf("reaper");
    let reaper = container::start_reaper(&leaf, pod.facts.user_namespace.as_deref()).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", reaper.pid)).unwrap();
    let status = fields(&status.lines().collect::<Vec<_>>());
    assert_eq!(
        (status["Uid"].as_str(), status["CapBnd"].as_str()),
        ("100000\t100000\t100000\t100000", "0000000000000000")
    );
    let join = || PidNamespace::Join(reaper.pidfd.as_fd());
    let mut running = pod.start_in(&first, join()).unwrap();
    assert_eq!(running.line(), "ready");
    let output = pod.start_in(&second, join()).unwrap().finish();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!((lines[0] != "0", lines[1]), (true, "still"), "{output:?}");
    process::pidfd_send_signal(reaper.pidfd.as_fd(), 15).unwrap();
    assert_eq!(running.finish().code, 137);
    assert_eq!(process::wait(reaper.pidfd.as_fd()).unwrap().exit_code(), 0);
}

fn sysctls_and_names_can_be_set() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script(
        "one",
        &image,
        "hostname; stat -c %u /dev/mqueue; ip link set lo up && ip link add dummy0 type dummy 2>/dev/null; ip link show lo | grep -c UP",
    );
    let process = wanted.process();
    for set in [&mut process.cap_bounding, &mut process.cap_effective, &mut process.cap_permitted] {
        *set |= 1 << 12;
    }
    let pod = Pod::in_user_namespace();
    assert_eq!(pod.run(&wanted).lines(), ["pod-name", "0", "1"], "CAP_NET_ADMIN counts in its own network");
}

fn an_id_that_is_not_mapped_is_refused() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script("one", &image, "true");
    wanted.process().user =
        Some(messages::User { user: Some(messages::user::User::Uid(70_000)), ..Default::default() });
    let pod = Pod::in_user_namespace();
    let error = pod.start(&wanted).err().unwrap();
    assert!(error.is_invalid_request(), "{error}");
    assert!(error.to_string().contains("70000") && error.to_string().contains("user namespace"), "{error}");
    assert!(pod.processes().is_empty());
}

fn a_user_can_write_to_its_standard_streams_by_name() {
    let image = image("image", |_| ());
    let of = |name: &str, uid| {
        let mut wanted = Wanted::script(name, &image, "echo out > /dev/stdout; echo err > /proc/self/fd/2");
        wanted.process().user =
            Some(messages::User { user: Some(messages::user::User::Uid(uid)), ..Default::default() });
        wanted
    };
    let both = [of("root", 0), of("web", 33)];
    let pod = Pod::in_user_namespace();
    for wanted in &both {
        let output = pod.run(wanted);
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("out\n", "err\n"),
            "{}",
            wanted.spec.id
        );
    }
}

fn an_image_can_be_a_volume() {
    let root = image("image", |_| ());
    let volume = image("volume", |root| {
        fs::write(root.join("etc/own"), "of the volume\n").unwrap();
        chown(root.join("etc/own"), Some(33), Some(34)).unwrap();
        std::os::unix::fs::symlink("/etc/own", root.join("link")).unwrap();
    });
    let script = "cat /volume/etc/own /etc-only/own /file; stat -c %u /volume/etc/own; touch /volume/x 2>&1; \
                  /volume/bin/echo it runs";
    let mut wanted = Wanted::script("one", &root, script);
    for (destination, sub_path) in [("/volume", ""), ("/etc-only", "etc"), ("/file", "link")] {
        let slot = wanted.slot(crate::support::tree(&volume));
        let image = messages::ImageVolume { layers: vec![slot], sub_path: sub_path.into() };
        wanted.spec.mounts.push(messages::Mount {
            destination: destination.into(),
            source: Some(messages::mount::Source::Image(image)),
            ..Default::default()
        });
    }
    let mut missing = Wanted::script("two", &root, "true");
    let slot = missing.slot(crate::support::tree(&volume));
    let pod = Pod::in_user_namespace();
    let output = pod.run(&wanted);
    let expected =
        ["of the volume"; 3].join("\n") + "\n33\ntouch: /volume/x: Read-only file system\nit runs\n";
    assert_eq!(output.stdout, expected, "{output:?}");

    let image = messages::ImageVolume { layers: vec![slot], sub_path: "../../missing".into() };
    missing.spec.mounts.push(messages::Mount {
        destination: "/volume".into(),
        source: Some(messages::mount::Source::Image(image)),
        ..Default::default()
    });
    let error = pod.start(&missing).err().unwrap().to_string();
    assert!(error.contains("../../missing"), "{error}");
}
