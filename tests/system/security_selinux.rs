//! SELinux, where the kernel has it and a policy is loaded: `hack/node --selinux`. Elsewhere, that it is refused.

use std::path::{Path, PathBuf};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

/// Whether the kernel confines by it. In `hack/node --selinux`, where it must, the test fails if it does not.
fn is_enabled() -> bool {
    let current = std::fs::read_to_string("/proc/thread-self/attr/current").unwrap_or_default();
    let enabled = Path::new("/sys/fs/selinux/context").exists() && current.contains("_r:");
    assert!(enabled || std::env::var_os("HULL_NODE_SELINUX").is_none(), "hack/node --selinux has no policy");
    enabled
}

fn with(
    name: &str,
    image: &str,
    change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
) -> cri::ContainerConfig {
    let mut config = container_config(name, image, &["/bin/sleep", "1000"]);
    change(config.linux.as_mut().unwrap().security_context.as_mut().unwrap());
    config
}

fn options(user: &str, role: &str, kind: &str, level: &str) -> Option<cri::SeLinuxOption> {
    let [user, role, r#type, level] = [user, role, kind, level].map(str::to_owned);
    Some(cri::SeLinuxOption { user, role, r#type, level })
}

/// The label of a file, as the host sees it.
fn label(path: impl AsRef<Path>) -> String {
    let mut value = [0; 256];
    let length = rustix::fs::lgetxattr(path.as_ref(), "security.selinux", &mut value[..]).unwrap();
    String::from_utf8_lossy(&value[..length]).trim_end_matches('\0').to_owned()
}

/// Where the host sees a path of a process's.
fn inside(pid: &str, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", pid.trim()))
}

fn categories(label: &str) -> &str {
    label.splitn(4, ':').nth(3).unwrap()
}

const LABEL: &str = "tr -d '\\0' < /proc/self/attr/current";

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_labels_that_keep_them_apart() {
    if !is_enabled() || hull_tests::microvm::excepted("the guest's kernel has no SELinux") {
        println!("no SELinux policy is loaded here: hack/node --selinux loads one");
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "one");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let mut one = Pod::run(&daemon, config).await;
    let mut two = Pod::run(&daemon, pod_config(&daemon, "two")).await;

    let id = one.start(container_config("a", &name, &["/bin/sleep", "1000"])).await;
    let of_one = one.shell(&id, LABEL).await;
    assert!(of_one.starts_with("system_u:system_r:container_t:s0:c"), "{of_one}");
    let first = one.shell(&id, "tr -d '\\0' < /proc/1/attr/current").await;
    assert_eq!(first, of_one, "an exec has the container's own");
    let beside = one.start(container_config("b", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!(one.shell(&beside, LABEL).await, of_one);
    let other = two.start(container_config("a", &name, &["/bin/sleep", "1000"])).await;
    let of_two = two.shell(&other, LABEL).await;
    assert_ne!(of_two, of_one);

    // What is mounted for the pod has the files' label with the same categories.
    let file = format!("system_u:object_r:container_file_t:{}", categories(&of_one));
    let mounts = one.shell(&id, "cat /proc/self/mountinfo").await;
    let root = mounts.lines().find(|line| line.contains(" / / ")).unwrap().to_owned();
    assert!(
        root.contains(&format!("context=\"{file}\"")) || root.contains(&format!("context={file}")),
        "{root}"
    );
    let pid = std::fs::read_to_string(find_leaf(&daemon, &id)).unwrap();
    let pid = pid.lines().next().unwrap();
    for path in
        ["/", "/bin/busybox", "/dev", "/dev/null", "/dev/shm", "/dev/mqueue", "/dev/pts/ptmx", "/etc/hosts"]
    {
        assert_eq!(label(inside(pid, path)), file, "{path}");
    }
    one.shell(&id, "echo x > /new && echo x > /dev/shm/new").await;
    assert_eq!(label(inside(pid, "/new")), file);

    // A volume is labelled only if that is asked for.
    let volume = daemon.path("volume");
    std::fs::create_dir_all(volume.join("below")).unwrap();
    std::fs::write(volume.join("below/file"), "x").unwrap();
    let before = label(volume.join("below/file"));
    let mount = |relabel| cri::Mount {
        host_path: volume.display().to_string(),
        container_path: "/data".into(),
        selinux_relabel: relabel,
        ..Default::default()
    };
    let mut plain = container_config("plain", &name, &["/bin/sleep", "1000"]);
    plain.mounts = vec![mount(false)];
    one.start(plain).await;
    assert_eq!(label(volume.join("below/file")), before);
    let mut relabelled = container_config("relabelled", &name, &["/bin/sleep", "1000"]);
    relabelled.mounts = vec![mount(true)];
    one.start(relabelled).await;
    assert_eq!(label(volume.join("below/file")), file);
    let mut system = container_config("system", &name, &["/bin/sleep", "1000"]);
    system.mounts = vec![cri::Mount { host_path: "/usr".into(), ..mount(true) }];
    let refused = one.start_fails(system).await;
    assert!(refused.message().contains("the labels of /usr are the system's own"), "{refused}");

    let privileged = with("privileged", &name, |context| context.privileged = true);
    let id = one.start(privileged).await;
    assert_eq!(one.shell(&id, LABEL).await, "system_u:system_r:spc_t:s0");
    let level = with("level", &name, |context| context.selinux_options = options("", "", "", "s0:c4,c5"));
    let id = two.start(level).await;
    assert_eq!(two.shell(&id, LABEL).await, "system_u:system_r:container_t:s0:c4,c5");
    for wrong in
        [options("", "", "", "s0,c4,c5"), options("", "", "no_such_t", ""), options("a:b", "", "", "")]
    {
        let config = with("wrong", &name, |context| context.selinux_options = wrong);
        let refused = two.create(config).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    }
    let mut config = pod_config(&daemon, "three");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().selinux_options =
        options("", "", "container_t", "s0:c1,c9");
    let mut three = Pod::run(&daemon, config).await;
    let id = three.start(container_config("a", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!(categories(&three.shell(&id, LABEL).await), "s0:c1,c9");

    // Who sees the host's IPC objects is not kept apart, unless that is asked for by level; the host's message queues
    // keep their label in either case.
    let queues = label("/dev/mqueue");
    for (number, (level, wanted)) in
        [("", "system_u:system_r:spc_t:s0"), ("s0:c7,c8", "system_u:system_r:container_t:s0:c7,c8")]
            .into_iter()
            .enumerate()
    {
        let mut config = pod_config(&daemon, &format!("ipc{number}"));
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.namespace_options.as_mut().unwrap().ipc = cri::NamespaceMode::Node as i32;
        context.selinux_options = options("", "", "", level).filter(|_| !level.is_empty());
        let mut pod = Pod::run(&daemon, config).await;
        let id = pod.start(container_config("a", &name, &["/bin/sleep", "1000"])).await;
        assert_eq!(pod.shell(&id, LABEL).await, wanted);
        let pid = std::fs::read_to_string(find_leaf(&daemon, &id)).unwrap();
        assert_eq!(label(inside(pid.lines().next().unwrap(), "/dev/mqueue")), queues, "{level:?}");
        assert_eq!(label("/dev/mqueue"), queues, "{level:?}");
    }
    daemon.finish().await;
}

/// The file with the container's processes (cgroup v2).
fn find_leaf(daemon: &Daemon, container: &str) -> PathBuf {
    let base = Path::new("/sys/fs/cgroup").join(daemon.cgroup());
    let pods = std::fs::read_dir(base).unwrap().flatten().map(|pod| pod.path().join(container));
    pods.map(|leaf| leaf.join("cgroup.procs")).find(|file| file.exists()).expect("the container's cgroup")
}

#[tokio::test(flavor = "multi_thread")]
async fn without_selinux_labels_that_would_confine_are_refused() {
    if is_enabled() {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut config = pod_config(&daemon, "confined");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().selinux_options =
        options("", "", "container_t", "s0:c1,c2");
    let Err(refused) = Pod::try_run(&daemon, config).await else { panic!("nobody can confine it") };
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("this node has no SELinux"), "{refused}");
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "free")).await;
    let confined = with("confined", &name, |context| context.selinux_options = options("", "", "", "s0:c1"));
    let refused = pod.create(confined).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    // As the charts of network plugins have it, whatever the node: it asks for no confinement.
    let free = with("free", &name, |context| context.selinux_options = options("", "", "spc_t", "s0"));
    pod.start(free).await;
    daemon.finish().await;
}
