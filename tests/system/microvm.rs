//! Pods in machines of their own: the same containers, and what only a machine can or cannot do.
//!
//! Where KVM cannot run a guest's kernel, the reason is printed and only the refusal is tested; in hack/node everything is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Packing};
use hull_tests::microvm::{available, problem};
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;

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
fn perl() -> Image {
    Image::new(
        vec![(image::busybox_layer(), Packing::Gzip), (image::perl_layer(), Packing::Plain)],
        serde_json::json!({"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"]}),
    )
}

async fn prints(pod: &Pod, name: &str, text: &str) {
    eventually(text, patience(30), async || pod.log(name).contains(text).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_be_is_refused_at_once_with_the_reason() {
    let daemon = Daemon::start().await;
    if let Some(reason) = problem(&daemon).await {
        assert!(available(&daemon).await || std::env::var_os("HULL_IN_NODE").is_none());
        let begun = std::time::Instant::now();
        let refused = Pod::try_run_by(&daemon, "microvm", networked_pod_config(&daemon, "vm")).await;
        let Err(status) = refused else { panic!("a pod, although {reason}") };
        assert!(status.message().contains(&reason), "{status}");
        assert!(begun.elapsed() < patience(5));
    }
    let unknown = Pod::try_run_by(&daemon, "no-such", networked_pod_config(&daemon, "vm")).await;
    assert!(unknown.is_err_and(|status| status.message().contains("there is no runtime handler")));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_in_a_machine_does_what_pods_do() {
    let daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let (one, two) =
        (registry.push("busybox", "v1", &image::busybox()), registry.push("perl", "v1", &perl()));
    daemon.pull(&one).await;
    daemon.pull(&two).await;
    let kubelet = Kubelet::of(&daemon, "all");
    let settings = kubelet.volume("configmap", "settings");
    Kubelet::write(&settings, "..one", &[("colour", "red\n")]);
    let scratch = kubelet.volume("empty-dir", "scratch");
    fs::set_permissions(&scratch, fs::Permissions::from_mode(0o2777)).unwrap();
    chown(&scratch, None, Some(2000)).unwrap();
    let host = daemon.path("host");
    fs::create_dir(&host).unwrap();
    fs::set_permissions(&host, fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(daemon.path("single"), "a single file\n").unwrap();
    fs::create_dir_all(kubelet.path("containers/first")).unwrap();
    let message = kubelet.path("containers/first/0a1b2c3d");
    fs::write(&message, "").unwrap();

    // Given a pod with a host port, an address of its own and two containers of different images
    let port = hull_tests::registry::free_port();
    let mut config = networked_pod_config(&daemon, "all");
    config.port_mappings = vec![cri::PortMapping {
        protocol: cri::Protocol::Tcp as i32,
        container_port: 8080,
        host_port: port.into(),
        host_ip: "127.0.0.1".into(),
    }];
    config.dns_config = Some(cri::DnsConfig { servers: vec!["10.9.8.7".into()], ..Default::default() });
    let mut pod = Pod::run_microvm(&daemon, config).await;
    let mut first = container_config(
        "first",
        &one,
        &["/bin/sh", "-c", "echo out; echo err >&2; echo told > /dev/termination-log; sleep 1000"],
    );
    first.mounts = vec![
        mount(&settings, "/etc/settings"),
        mount(&scratch, "/scratch"),
        mount(&host, "/host"),
        mount(&daemon.path("single"), "/etc/single"),
        mount(&message, "/dev/termination-log"),
    ];
    let first = pod.start(first).await;
    let mut second = container_config("second", &two, &["/bin/sleep", "1000"]);
    second.mounts = vec![mount(&settings, "/etc/settings"), mount(&scratch, "/scratch")];
    let second = pod.start(second).await;

    // Then the kernel is the guest's
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(pod.output(&first, &["uname", "-r"]).await, own);
    assert_ne!(
        pod.output(&first, &["cat", "/proc/cmdline"]).await,
        fs::read_to_string("/proc/cmdline").unwrap()
    );

    // And the layers are those of each image
    assert_eq!(pod.shell(&first, "cat /greeting; ls /data").await, "hello from the top layer\nkept\n");
    assert_eq!(pod.output(&second, &["/usr/bin/perl", "-e", "print 6*7"]).await, "42");

    // And what is printed is logged, what is executed answers, also with an exit code
    prints(&pod, "first", "out\n").await;
    prints(&pod, "first", "err\n").await;
    let failing = pod.exec(&first, &["/bin/sh", "-c", "echo no >&2; exit 42"]).await;
    assert_eq!((failing.exit_code, failing.stderr.as_slice()), (42, &b"no\n"[..]));

    // And a ConfigMap that changes is seen by who watches it
    assert_eq!(pod.output(&first, &["cat", "/etc/settings/colour"]).await, "red\n");
    let watch = "$f = syscall(294, 0); $p = '/etc/settings'; syscall(254, $f, $p, 0x180) >= 0 or die; \
                 open(W, '>', '/scratch/watching'); close(W); \
                 open(F, '<&=', $f); sysread(F, $b, 4096) or die; print 'seen'";
    let watching = {
        let (mut client, id) = (pod.client(), second.clone());
        let cmd = ["/usr/bin/perl", "-e", watch].map(str::to_owned).to_vec();
        tokio::spawn(async move {
            let request = cri::ExecSyncRequest { container_id: id, cmd, timeout: 0 };
            client.exec_sync(request).await.unwrap().into_inner()
        })
    };
    eventually("the watch begins", patience(30), async || {
        assert!(!watching.is_finished(), "the watch ended before it began");
        (pod.exec(&first, &["test", "-e", "/scratch/watching"]).await.exit_code == 0).then_some(())
    })
    .await;
    Kubelet::write(&settings, "..two", &[("colour", "blue\n")]);
    let seen = tokio::time::timeout(patience(20), watching).await.expect("inotify fires").unwrap();
    assert_eq!((seen.exit_code, seen.stdout.as_slice()), (0, &b"seen"[..]));
    for id in [&first, &second] {
        assert_eq!(pod.output(id, &["cat", "/etc/settings/colour"]).await, "blue\n");
    }

    // And a single file and a directory of the host are there, for users of all kinds
    assert_eq!(pod.output(&first, &["cat", "/etc/single"]).await, "a single file\n");
    for user in [0, 1000, 70_000] {
        pod.shell(
            &first,
            &format!("touch /host/{user} && chown {user} /host/{user} && stat -c %u /host/{user}"),
        )
        .await;
        assert_eq!(fs::metadata(host.join(user.to_string())).unwrap().uid(), user);
    }
    fs::write(host.join("from-the-host"), "hello\n").unwrap();
    assert_eq!(pod.output(&first, &["cat", "/host/from-the-host"]).await, "hello\n");

    // And an emptyDir is one place for both: owner, locks and sockets
    assert_eq!(pod.output(&first, &["stat", "-c", "%g %a", "/scratch"]).await, "2000 2777\n");
    let locked = "open(L, '>', '/scratch/lock'); flock(L, 2) or die; open(W, '>', '/scratch/locked'); close(W); sleep 1000";
    let holder = container_config("holder", &two, &["/usr/bin/perl", "-e", locked]);
    let holder =
        pod.start(cri::ContainerConfig { mounts: vec![mount(&scratch, "/scratch")], ..holder }).await;
    eventually("the lock is held", patience(30), async || {
        (pod.exec(&first, &["test", "-e", "/scratch/locked"]).await.exit_code == 0).then_some(())
    })
    .await;
    let try_lock = "open(L, '>', '/scratch/lock'); exit(flock(L, 6) ? 0 : 3)";
    assert_eq!(pod.exec(&second, &["/usr/bin/perl", "-e", try_lock]).await.exit_code, 3);
    pod.stop_container(&holder, 0).await;
    assert_eq!(pod.exec(&second, &["/usr/bin/perl", "-e", try_lock]).await.exit_code, 0);
    let listen = "socket(S,1,1,0); bind(S, pack('Sa*',1,'/scratch/socket')) or die; listen(S,1); accept(C,S); \
                  print C \"over a socket\\n\"; close(C)";
    let server = container_config("server", &two, &["/usr/bin/perl", "-e", listen]);
    let server =
        pod.start(cri::ContainerConfig { mounts: vec![mount(&scratch, "/scratch")], ..server }).await;
    eventually("the socket is there", patience(30), async || {
        (pod.exec(&first, &["test", "-S", "/scratch/socket"]).await.exit_code == 0).then_some(())
    })
    .await;
    let connect = "socket(S,1,1,0); connect(S, pack('Sa*',1,'/scratch/socket')) or die; print <S>";
    assert_eq!(pod.output(&second, &["/usr/bin/perl", "-e", connect]).await, "over a socket\n");
    pod.ended(&server).await;

    // And the network is the pod's: address, resolver, host port
    let address = pod.status().await.network.unwrap().ip;
    assert!(pod.output(&first, &["ip", "addr", "show", "eth0"]).await.contains(&address));
    assert!(pod.output(&first, &["cat", "/etc/resolv.conf"]).await.contains("nameserver 10.9.8.7"));
    pod.shell(&first, "mkdir -p /www && echo by the port > /www/index.html && httpd -p 8080 -h /www").await;
    for target in [format!("{address}:8080"), format!("127.0.0.1:{port}")] {
        let answer = eventually("the port answers", patience(20), async || http_get(&target)).await;
        assert!(answer.ends_with("by the port\n"), "{target}: {answer}");
    }

    // And the numbers are there
    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats =
        pod.client().pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap().linux.unwrap();
    assert!(stats.memory.unwrap().usage_bytes.unwrap().value > 0);
    assert_eq!(stats.network.unwrap().default_interface.unwrap().name, "eth0");
    let of_first = stats.containers.iter().find(|one| one.attributes.as_ref().unwrap().id == first).unwrap();
    assert!(of_first.memory.as_ref().unwrap().working_set_bytes.unwrap().value > 0);
    assert!(of_first.writable_layer.as_ref().unwrap().used_bytes.unwrap().value > 0);

    // And a container that takes too much memory is told as such
    let mut greedy =
        container_config("greedy", &two, &["/usr/bin/perl", "-e", "$x = 'x' x (200 << 20); sleep 1000"]);
    greedy.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() });
    let greedy = pod.start(greedy).await;
    assert_eq!(pod.ended(&greedy).await.reason, "OOMKilled");

    // And exit codes and the last message come out
    pod.stop_container(&first, 0).await;
    assert_eq!(pod.ended(&first).await.exit_code, 137);
    assert_eq!(fs::read_to_string(&message).unwrap(), "told\n");
    let coded = pod.start(container_config("coded", &one, &["/bin/sh", "-c", "exit 3"])).await;
    assert_eq!(pod.ended(&coded).await.exit_code, 3);

    // And nothing stays
    for id in [&first, &greedy, &coded] {
        pod.remove_container(id).await;
    }
    pod.stop().await;
    pod.remove().await;
    assert_eq!(machines_of(&daemon), Vec::<String>::new());
    daemon.finish().await;
}

fn http_get(target: &str) -> Option<String> {
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

/// Answers every question for an address (RFC 1035) with 10.1.2.3, on UDP port 53.
const NAME_SERVER: &str = r#"socket(S, 2, 2, 17); bind(S, pack('Sna4x8', 2, 53, "\0\0\0\0")) or die;
while (defined($from = recv(S, $m, 512, 0))) { $q = substr($m, 12); $q = substr($q, 0, index($q, "\0") + 5);
send(S, substr($m, 0, 2) . "\x81\x80\0\1\0\1\0\0\0\0$q\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x0a\1\2\3", 0, $from) }"#;

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_on_the_networks_of_cni_plugins() {
    let (daemon, cni) = crate::network::Cni::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    cni.configure(&daemon).await;
    let registry = Registry::start();
    let name = registry.push("perl", "v1", &perl());
    daemon.pull(&name).await;

    // Given a machine that serves a page, also on a port of the host, and names
    let port = hull_tests::registry::free_port();
    let mut config = networked_pod_config(&daemon, "server");
    config.port_mappings = vec![cri::PortMapping {
        protocol: cri::Protocol::Tcp as i32,
        container_port: 8080,
        host_port: port.into(),
        host_ip: String::new(),
    }];
    let mut server = Pod::run_microvm(&daemon, config).await;
    let address = server.status().await.network.unwrap().ip;
    assert!(address.starts_with("10.242.9."), "{address}");
    let script = "mkdir -p /www && echo from a machine > /www/index.html && exec httpd -f -p 8080 -h /www";
    let web = server.start(container_config("web", &name, &["/bin/sh", "-c", script])).await;
    server.start(container_config("names", &name, &["/usr/bin/perl", "-e", NAME_SERVER])).await;
    assert!(server.output(&web, &["ip", "addr", "show", "eth0"]).await.contains(&address));

    // And another one whose resolver is the first
    let mut config = networked_pod_config(&daemon, "client");
    config.dns_config = Some(cri::DnsConfig { servers: vec![address.clone()], ..Default::default() });
    let mut client = Pod::run_microvm(&daemon, config).await;
    let shell = client.start(container_config("shell", &name, &["/bin/sleep", "1000"])).await;
    assert_ne!(client.status().await.network.unwrap().ip, address);
    assert_eq!(cni.leases(), 2);

    // Then the second reaches the first, the host reaches it by its address and its port, and names are found
    let request = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {address} 8080");
    eventually("the first answers the second", patience(20), async || {
        let answer = client.exec(&shell, &["/bin/sh", "-c", &request]).await;
        String::from_utf8_lossy(&answer.stdout).ends_with("from a machine\n").then_some(())
    })
    .await;
    for target in [format!("{address}:8080"), format!("127.0.0.1:{port}")] {
        let answer = eventually(&target, patience(20), async || http_get(&target)).await;
        assert!(answer.ends_with("from a machine\n"), "{target}: {answer}");
    }
    eventually("a name is found", patience(20), async || {
        let answer = client.exec(&shell, &["nslookup", "some.where"]).await;
        String::from_utf8_lossy(&answer.stdout).contains("10.1.2.3").then_some(())
    })
    .await;

    for pod in [&mut server, &mut client] {
        pod.stop().await;
        pod.remove().await;
    }
    assert_eq!(cni.leases(), 0);
    cni.clear();
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_loses_nothing_of_a_machine() {
    let mut daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let kubelet = Kubelet::of(&daemon, "kept");
    let settings = kubelet.volume("configmap", "settings");
    Kubelet::write(&settings, "..one", &[("colour", "red\n")]);
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "kept")).await;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 20000; done; exit 7";
    let mut counting = container_config("counting", &name, &["/bin/sh", "-c", script]);
    counting.mounts = vec![mount(&settings, "/etc/settings")];
    let counting = pod.start(counting).await;
    let staying = pod.start(container_config("staying", &name, &["/bin/sleep", "1000"])).await;
    prints(&pod, "counting", "line 3\n").await;

    daemon.kill();
    Kubelet::write(&settings, "..two", &[("colour", "blue\n")]);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    daemon.restart().await;
    pod.reconnect(&daemon).await;

    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxReady as i32);
    assert_eq!(pod.ended(&counting).await.exit_code, 7);
    let expected: String = (0..400).map(|number| format!("line {number}\n")).collect();
    assert_eq!(pod.log("counting"), expected);
    assert_eq!(pod.output(&staying, &["echo", "here"]).await, "here\n");
    let mut again = container_config("again", &name, &["/bin/sleep", "1000"]);
    again.mounts = vec![mount(&settings, "/etc/settings")];
    let again = pod.start(again).await;
    assert_eq!(pod.output(&again, &["cat", "/etc/settings/colour"]).await, "blue\n");
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_ends_its_pod_and_no_other() {
    let mut daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let mut victim = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "victim")).await;
    let mut other = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "other")).await;
    let doomed = victim.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let safe = other.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    rustix::process::kill_process(vmm_of(&daemon, &victim).await, rustix::process::Signal::KILL).unwrap();

    eventually("the pod has ended", patience(2), async || {
        (victim.status().await.state == cri::PodSandboxState::SandboxNotready as i32).then_some(())
    })
    .await;
    let status = victim.ended(&doomed).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "VMMLost"));
    assert_eq!(other.output(&safe, &["echo", "alive"]).await, "alive\n");
    assert_eq!(other.status().await.state, cri::PodSandboxState::SandboxReady as i32);

    // And one that dies while nobody looks is found dead
    let pid = vmm_of(&daemon, &other).await;
    daemon.kill();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    daemon.restart().await;
    other.reconnect(&daemon).await;
    victim.reconnect(&daemon).await;
    assert_eq!(other.ended(&safe).await.exit_code, 255);
    assert_eq!(other.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    for pod in [&mut victim, &mut other] {
        pod.stop().await;
        pod.remove().await;
    }
    assert_eq!(machines_of(&daemon), Vec::<String>::new());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_reaches_its_pods_memory_limit_is_told_as_oom() {
    let daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("perl", "v1", &perl());
    daemon.pull(&name).await;
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "oom")).await;
    let script = "sleep 3; $x = 'x' x (300 << 20); sleep 1000";
    let greedy = pod.start(container_config("greedy", &name, &["/usr/bin/perl", "-e", script])).await;
    let limit = format!("/sys/fs/cgroup/{}/{}/memory.max", daemon.cgroup(), pod.id);
    fs::write(limit, (200_u64 << 20).to_string()).unwrap();
    let status = pod.ended(&greedy).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "OOMKilled"), "{}", status.message);
    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

fn privileged(mut config: cri::PodSandboxConfig) -> cri::PodSandboxConfig {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    config
}

fn privileged_container(mut config: cri::ContainerConfig) -> cri::ContainerConfig {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_owns_its_machine_and_nothing_of_the_host() {
    let daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let mut config = privileged(networked_pod_config(&daemon, "root"));
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls = [
        ("kernel.core_pattern".to_owned(), "/tmp/core.%p".to_owned()),
        ("vm.max_map_count".to_owned(), "123456".to_owned()),
        // Whoever takes too much memory makes the kernel panic.
        ("vm.panic_on_oom".to_owned(), "2".to_owned()),
        ("net.core.somaxconn".to_owned(), "321".to_owned()),
    ]
    .into();
    let mut pod = Pod::run_microvm(&daemon, config).await;
    let main = privileged_container(container_config("main", &name, &["/bin/sleep", "1000"]));
    let main = pod.start(main).await;

    // Every capability of the guest's, none of the host's devices
    let status = pod.shell(&main, "grep CapEff /proc/self/status").await;
    assert!(status.contains("000001ff") || status.contains("000003ff"), "{status}");
    assert_ne!(pod.exec(&main, &["test", "-e", "/dev/kvm"]).await.exit_code, 0);
    // Sysctls of the whole kernel are the machine's own
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/kernel/core_pattern"]).await, "/tmp/core.%p\n");
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/vm/max_map_count"]).await, "123456\n");
    assert_eq!(pod.output(&main, &["cat", "/proc/sys/net/core/somaxconn"]).await, "321\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), before);

    // And a guest whose kernel panics ends its pod, with the reason
    let mut greedy = container_config("greedy", &name, &["/bin/tail", "/dev/zero"]);
    greedy.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
    pod.start(greedy).await;
    let status = pod.ended(&main).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "GuestPanic"), "{}", status.message);
    assert!(status.message.contains("panic"), "{}", status.message);
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_cannot_do_is_refused_with_the_reason() {
    let daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let node = cri::NamespaceMode::Node as i32;
    type Change = fn(&mut cri::NamespaceOption, i32);
    let cases: [(Change, &str); 3] = [
        (|options, node| options.network = node, "hostNetwork"),
        (|options, node| options.pid = node, "hostPID"),
        (|options, node| options.ipc = node, "hostIPC"),
    ];
    for (change, reason) in cases {
        let mut config = networked_pod_config(&daemon, "host");
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        change(context.namespace_options.as_mut().unwrap(), node);
        let Err(status) = Pod::try_run_by(&daemon, "microvm", config).await else { panic!("{reason}") };
        assert!(status.message().contains(reason), "{status}");
    }
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "refusals")).await;
    let fails =
        async |pod: &mut Pod, number: usize, change: &dyn Fn(&mut cri::ContainerConfig), reason: &str| {
            let mut config = container_config(&format!("c{number}"), &name, &["/bin/true"]);
            change(&mut config);
            let status = pod.start_fails(config).await;
            assert!(status.message().contains(reason), "{status}");
        };
    let volume = daemon.path("volume");
    fs::create_dir(&volume).unwrap();
    let both = cri::MountPropagation::PropagationBidirectional as i32;
    fails(
        &mut pod,
        0,
        &|config| config.mounts = vec![cri::Mount { propagation: both, ..mount(&volume, "/v") }],
        "Bidirectional",
    )
    .await;
    let device = cri::Device {
        host_path: "/dev/fuse".into(),
        container_path: "/dev/fuse".into(),
        permissions: "rw".into(),
    };
    fails(&mut pod, 1, &|config| config.devices = vec![device.clone()], "character device").await;
    let pages = cri::HugepageLimit { page_size: "2MB".into(), limit: 2 << 20 };
    fails(
        &mut pod,
        2,
        &|config| {
            config.linux.as_mut().unwrap().resources.as_mut().unwrap().hugepage_limits = vec![pages.clone()]
        },
        "huge pages",
    )
    .await;
    let socket = daemon.path("service.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fails(&mut pod, 3, &|config| config.mounts = vec![mount(&socket, "/run/service.sock")], "socket").await;
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_the_size_of_its_pod_and_follows_it() {
    let daemon = Daemon::start().await;
    if !available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    daemon.pull(&name).await;
    let mut config = networked_pod_config(&daemon, "sized");
    config.linux.as_mut().unwrap().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 256 << 20, ..Default::default() });
    let mut pod = Pod::run_microvm(&daemon, config).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let total = async |pod: &mut Pod| -> u64 {
        let line = pod.shell(&id, "grep MemTotal /proc/meminfo | awk '{print $2}'").await;
        line.trim().parse::<u64>().unwrap() << 10
    };
    let born = total(&mut pod).await;
    assert!((150 << 20..310 << 20).contains(&born), "{born}");
    assert_eq!(pod.output(&id, &["nproc"]).await, "1\n", "as many as this machine has");
    let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = pod.client().container_status(request).await.unwrap().into_inner().info;
    assert!(info["info"].contains(r#""runtimeType":"microvm""#), "{info:?}");
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}
