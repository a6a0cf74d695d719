//! Layers, volumes and how mounts pass.

use std::fs;
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::{self, Propagation};
use hull_sys::mount::{self, Attributes};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::support::{Pod, Wanted, image, scratch};

crate::tests!(
    a_hundred_and_twenty_eight_layers_stack,
    the_writable_layer_is_found_again,
    the_root_directory_has_the_attributes_of_the_image,
    volumes_and_single_files_are_mounted,
    read_only_volumes_are_read_only_all_the_way_down_only_if_asked,
    mounts_propagate_as_asked,
    the_pods_shared_memory_is_shared,
    the_hosts_shared_memory_can_be_the_pods,
    the_termination_log_lies_over_dev,
    a_tmpfs_has_its_size_and_mode,
    a_dev_of_the_host_is_left_alone,
);

fn directory(name: &str) -> PathBuf {
    let path = scratch().join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

fn tmpfs(path: &Path) {
    rustix::mount::mount("test", path, "tmpfs", MountFlags::empty(), None).unwrap();
}

fn make_shared(path: &Path) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let shared = Attributes { propagation: Some(mount::Propagation::Shared), ..Attributes::default() };
    mount::set_attributes_at(CWD, &path, false, &shared).unwrap();
}

fn a_hundred_and_twenty_eight_layers_stack() {
    let mut layers: Vec<PathBuf> = (0..127)
        .map(|number| {
            let layer = directory(&format!("layer-{number}"));
            fs::write(layer.join(format!("file-{number}")), "").unwrap();
            fs::write(layer.join("which"), format!("{number}\n")).unwrap();
            layer
        })
        .collect();
    layers.push(image("image", |_| ()));
    let wanted = Wanted::new("one", &layers, &["sh", "-c", "cat which; ls /file-* | wc -l"]);
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["0", "127"]);
}

fn the_writable_layer_is_found_again() {
    let image = image("image", |_| ());
    let first = Wanted::script("one", &image, "echo kept > /tmp/x");
    let second = Wanted::script("one", &image, "cat /tmp/x");
    let pod = Pod::enter();
    pod.run(&first).lines();
    assert_eq!(pod.run(&second).lines(), ["kept"]);
}

fn the_root_directory_has_the_attributes_of_the_image() {
    use std::os::unix::fs::PermissionsExt;
    let image = image("image", |root| {
        fs::set_permissions(root, fs::Permissions::from_mode(0o1751)).unwrap();
        std::os::unix::fs::chown(root, Some(5), Some(6)).unwrap();
    });
    let wanted = Wanted::script("one", &image, "stat -c '%a %u:%g' /");
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["1751 5:6"]);
}

fn volumes_and_single_files_are_mounted() {
    let image = image("image", |root| fs::write(root.join("etc/config"), "old\n").unwrap());
    let volume = directory("volume");
    fs::write(volume.join("inner"), "inner\n").unwrap();
    fs::write(scratch().join("config"), "new\n").unwrap();
    let mut wanted = Wanted::script(
        "one",
        &image,
        "cat /data/inner /etc/config /new/place/config && echo back > /data/back && grep -c 'nosuid.* - ' /proc/self/mountinfo >/dev/null \
         && grep ' /data ' /proc/self/mountinfo | cut -d' ' -f6",
    );
    wanted.mount(scratch().join("config"), "/etc/config");
    wanted.mount(scratch().join("config"), "/new/place/config");
    wanted.mount(&volume, "/data").options =
        ["nosuid", "nodev", "noexec", "noatime"].map(String::from).to_vec();
    let mut mismatch = Wanted::script("two", &image, "true");
    mismatch.mount(&volume, "/etc/passwd");
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["inner", "new", "new", "rw,nosuid,nodev,noexec,noatime"]);
    pod.on_host(|| assert_eq!(fs::read_to_string(volume.join("back")).unwrap(), "back\n"));
    let error = pod.start(&mismatch).err().unwrap().to_string();
    assert_eq!(error, "cannot mount /etc/passwd: the source is a directory, but a file is there");
}

fn read_only_volumes_are_read_only_all_the_way_down_only_if_asked() {
    let image = image("image", |_| ());
    let volume = directory("volume");
    fs::create_dir(volume.join("below")).unwrap();
    tmpfs(&volume.join("below"));
    let script = "for d in /data /data/below; do touch $d/x 2>/dev/null && echo $d; done; true";
    let mut flat = Wanted::script("flat", &image, script);
    flat.mount(&volume, "/data").readonly = true;
    let mut deep = Wanted::script("deep", &image, script);
    let mount = deep.mount(&volume, "/data");
    (mount.readonly, mount.recursive_readonly) = (true, true);
    let pod = Pod::enter();
    assert_eq!(pod.run(&flat).lines(), ["/data/below"]);
    assert_eq!(pod.run(&deep).lines(), [""; 0]);
    pod.on_host(|| fs::write(volume.join("below/host"), "").unwrap());
}

fn mounts_propagate_as_asked() {
    let image = image("image", |_| ());
    let volume = directory("volume");
    for name in ["from-host", "from-container"] {
        fs::create_dir(volume.join(name)).unwrap();
    }
    tmpfs(&volume);
    fs::create_dir(volume.join("from-host")).unwrap();
    fs::create_dir(volume.join("from-container")).unwrap();
    make_shared(&volume);
    let with = |name: &str, propagation: Propagation| {
        let script = "mount -t tmpfs none /data/from-container && echo ready && exec sleep 1000";
        let mut wanted = Wanted::script(name, &image, script);
        wanted.mount(&volume, "/data").propagation = propagation.into();
        let process = wanted.process();
        let admin = process.cap_bounding | 1 << 21;
        (process.cap_bounding, process.cap_effective, process.cap_permitted) = (admin, admin, admin);
        wanted
    };
    let wanted = [
        (with("private", Propagation::Private), false, false),
        (with("slave", Propagation::HostToContainer), true, false),
        (with("shared", Propagation::Bidirectional), true, true),
    ];
    let pod = Pod::enter();
    let host_mounts = || {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains("/volume/from-container ")).count()
    };
    for (wanted, to_container, to_host) in &wanted {
        let mut running = pod.start(wanted).unwrap();
        assert_eq!(running.line(), "ready");
        let name = &wanted.spec.id;
        assert_eq!(pod.on_host(host_mounts), usize::from(*to_host), "{name}: to the host");
        pod.on_host(|| tmpfs(&volume.join("from-host")));
        let seen = pod.exec(&running, "grep -c /data/from-host /proc/self/mountinfo; true");
        assert_eq!(seen.stdout, if *to_container { "1\n" } else { "0\n" }, "{name}: to the container");
        pod.on_host(|| rustix::mount::unmount(volume.join("from-host"), UnmountFlags::DETACH).unwrap());
        running.kill();
        if *to_host {
            pod.on_host(|| {
                rustix::mount::unmount(volume.join("from-container"), UnmountFlags::DETACH).unwrap()
            });
        }
    }
}

fn the_pods_shared_memory_is_shared() {
    let image = image("image", |_| ());
    let writer = Wanted::script(
        "writer",
        &image,
        "echo hello > /dev/shm/x; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2",
    );
    let reader = Wanted::script("reader", &image, "cat /dev/shm/x");
    let mut without = Wanted::script("without", &image, "ls /dev/shm 2>/dev/null; true");
    without.spec.no_shm = true;
    let pod = Pod::enter_with(|spec, _| spec.shm_size = 1 << 20);
    assert_eq!(pod.run(&writer).lines(), ["1024"]);
    assert_eq!(pod.run(&reader).lines(), ["hello"]);
    assert_eq!(pod.run(&without).lines(), [""; 0]);
}

fn the_hosts_shared_memory_can_be_the_pods() {
    let image = image("image", |_| ());
    let shm = directory("shm");
    fs::write(shm.join("x"), "of the host\n").unwrap();
    let wanted = Wanted::script("one", &image, "cat /dev/shm/x; hostname");
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let pod = Pod::enter_with(|spec, fds| {
        (spec.new_ipc_namespace, spec.new_uts_namespace) = (false, false);
        spec.shm_source = Some(0);
        fds.push(crate::support::tree(&shm));
    });
    assert_eq!(pod.run(&wanted).lines(), ["of the host", own.as_str()]);
}

fn the_termination_log_lies_over_dev() {
    let image = image("image", |_| ());
    let log = scratch().join("termination-log");
    fs::write(&log, "").unwrap();
    let mut wanted = Wanted::script("one", &image, "echo why > /dev/termination-log; ls /dev/null");
    wanted.mount(&log, "/dev/termination-log");
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["/dev/null"]);
    pod.on_host(|| assert_eq!(fs::read_to_string(&log).unwrap(), "why\n"));
}

fn a_tmpfs_has_its_size_and_mode() {
    let image = image("image", |_| ());
    let mut wanted = Wanted::script(
        "one",
        &image,
        "stat -c %a /cache; df -k /cache | tail -1 | tr -s ' ' | cut -d' ' -f2",
    );
    wanted.spec.mounts.push(messages::Mount {
        destination: "/cache".into(),
        source: Some(messages::mount::Source::Tmpfs(messages::Tmpfs { size: 2 << 20, mode: 0o1770 })),
        ..Default::default()
    });
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["1770", "2048"]);
}

fn a_dev_of_the_host_is_left_alone() {
    let image = image("image", |_| ());
    let dev = directory("dev");
    fs::create_dir(dev.join("pts")).unwrap();
    let mut wanted = Wanted::script("one", &image, "ls /dev; ls /dev/pts");
    wanted.mount(&dev, "/dev");
    wanted.spec.devices.push(messages::Device {
        path: "/dev/fuse".into(),
        r#type: "c".into(),
        ..Default::default()
    });
    let pod = Pod::enter();
    assert_eq!(pod.run(&wanted).lines(), ["pts", "ptmx"]);
    pod.on_host(|| assert_eq!(fs::read_dir(&dev).unwrap().count(), 1));
}
