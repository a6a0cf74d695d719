//! Pods in machines of their own: the same containers, and what only a machine can or cannot do.
//!
//! Where KVM cannot run a guest's kernel, the reason is printed and only the refusal is tested; in hack/node everything is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use hull_tests::daemon::Daemon;
use hull_tests::microvm::{available, problem};
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;

use super::microvm_ground::{Ground, Kubelet, http_get, machines_of, mount, perl, prints};

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
    let Some(Ground { daemon, image: one, registry }) = Ground::new().await else { return };
    let two = registry.push("perl", "v1", &perl());
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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_cannot_do_is_refused_with_the_reason() {
    let Some(Ground { daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
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
