//! Pod networks: hull's own bridge, and CNI plugins.

use std::process::{Command, Stdio};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::{Registry, free_port};
use k8s_cri::v1 as cri;

#[tokio::test(flavor = "multi_thread")]
async fn pods_on_the_builtin_network_reach_each_other_and_the_host() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut server = Pod::run(&daemon, networked_pod_config(&daemon, "server")).await;
    let mut client = Pod::run(&daemon, networked_pod_config(&daemon, "client")).await;
    let script = "mkdir /www && echo over the bridge > /www/index.html && exec httpd -f -p 8080 -h /www";
    let _httpd = server.start(container_config("httpd", &name, &["/bin/sh", "-c", script])).await;
    let shell = client.start(container_config("shell", &name, &["/bin/sleep", "1000"])).await;

    let network = server.status().await.network.expect("a network");
    assert!(!network.ip.is_empty() && network.additional_ips.len() == 1, "IPv4 and IPv6: {network:?}");
    for address in [network.ip.clone(), network.additional_ips[0].ip.clone()] {
        // Debian's busybox wget crashes when it is given a time limit, so the request is written by hand.
        let request = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {address} 8080");
        let page =
            hull_tests::eventually(&format!("{address} answers"), hull_tests::patience(10), async || {
                let answer = client.exec(&shell, &["/bin/sh", "-c", &request]).await;
                let page = String::from_utf8_lossy(&answer.stdout).into_owned();
                (!page.is_empty()).then_some(page)
            })
            .await;
        assert!(page.ends_with("over the bridge\n"), "{address}: {page}");
    }
    assert!(client.shell(&shell, "ip addr show lo; ip route").await.contains("default"));
    assert!(get("127.0.0.1", &network.ip, 8080).contains("over the bridge"), "the host reaches the pod");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ports_lead_to_the_pod_and_go_away_with_it() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let host_port = i32::from(free_port());
    let mapping = cri::PortMapping {
        protocol: cri::Protocol::Tcp as i32,
        container_port: 8080,
        host_port,
        host_ip: String::new(),
    };
    let mut config = networked_pod_config(&daemon, "published");
    config.port_mappings = vec![mapping.clone()];
    let mut pod = Pod::run(&daemon, config).await;
    let script = "mkdir /www && echo published > /www/index.html && exec httpd -f -p 8080 -h /www";
    pod.start(container_config("httpd", &name, &["/bin/sh", "-c", script])).await;
    let port = u16::try_from(host_port).unwrap();
    hull_tests::eventually("the host port answers", hull_tests::patience(10), async || {
        get("127.0.0.1", "127.0.0.1", port).contains("published").then_some(())
    })
    .await;

    // The same port again is refused, and nothing of the second pod is left
    let before = daemon.residue();
    let mut config = networked_pod_config(&daemon, "conflict");
    config.port_mappings = vec![mapping];
    let refused = Pod::try_run(&daemon, config).await.map(|pod| pod.id).expect_err("the port is taken");
    assert!(refused.message().contains(&host_port.to_string()), "{refused}");
    hull_tests::eventually("nothing of it is left", hull_tests::patience(3), async || {
        daemon.residue().iter().all(|left| before.contains(left)).then_some(())
    })
    .await;

    pod.stop().await;
    assert!(!get("127.0.0.1", "127.0.0.1", port).contains("published"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_not_given_twice_across_a_kill() {
    let mut daemon = Daemon::start().await;
    let mut seen = std::collections::BTreeSet::new();
    let mut pods = Vec::new();
    for round in 0..3 {
        for number in 0..4 {
            let mut pod =
                Pod::run(&daemon, networked_pod_config(&daemon, &format!("p{round}{number}"))).await;
            let network = pod.status().await.network.unwrap();
            assert!(seen.insert(network.ip.clone()), "{} twice", network.ip);
            pods.push(pod);
        }
        daemon.kill();
        daemon.restart().await;
    }
    daemon.finish().await;
}

/// A network of Debian's CNI plugins: bridge, host-local and portmap.
pub(crate) struct Cni {
    configurations: tempfile::TempDir,
    bridge: String,
    data: std::path::PathBuf,
}

impl Cni {
    /// A daemon that waits for a CNI configuration; there is none yet.
    pub(crate) async fn start() -> (Daemon, Cni) {
        let configurations = tempfile::tempdir().unwrap();
        let bridge = format!("cni{}", std::process::id() % 100_000);
        let network = format!(
            "mode = \"cni\"\ncni_conf_dir = \"{0}\"\ncni_bin_dirs = [\"/usr/lib/cni\", \"{0}\"]\n",
            configurations.path().display()
        );
        let daemon = Daemon::start_with(&network, "").await;
        let data = daemon.path("cni-data");
        (daemon, Cni { configurations, bridge, data })
    }

    /// Writes the configuration and waits until the daemon has it.
    pub(crate) async fn configure(&self, daemon: &Daemon) {
        self.configure_with(daemon, &[]).await;
    }

    /// The same, with more plugins behind the others; programs for them may be in the directory of configurations.
    pub(crate) async fn configure_with(&self, daemon: &Daemon, more: &[serde_json::Value]) {
        let plugins = [
            serde_json::json!({"type": "bridge", "bridge": self.bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam":
                {"type": "host-local", "dataDir": self.data, "ranges": [[{"subnet": "10.242.9.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}),
            serde_json::json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
        ];
        self.write(&[&plugins[..], more].concat().into());
        hull_tests::eventually("the network is ready", hull_tests::patience(10), async || {
            network_condition(daemon).await.status.then_some(())
        })
        .await;
    }

    fn write(&self, plugins: &serde_json::Value) {
        let list = serde_json::json!({"cniVersion": "1.0.0", "name": "tests", "plugins": plugins});
        std::fs::write(self.configurations.path().join("10-tests.conflist"), list.to_string()).unwrap();
    }

    /// Makes a plugin of this name.
    pub(crate) fn add_plugin(&self, name: &str, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.configurations.path().join(name);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Addresses that are given.
    pub(crate) fn leases(&self) -> usize {
        let entries = std::fs::read_dir(self.data.join("tests")).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("10.")).count()
    }

    /// Removes what the plugins leave: their bridge and the chains of their rules are theirs to keep.
    pub(crate) fn clear(&self) {
        let quietly = |program: &str, arguments: &[&str]| {
            let _ = Command::new(program).args(arguments).stderr(Stdio::null()).status();
        };
        assert!(Command::new("ip").args(["link", "delete", &self.bridge]).status().unwrap().success());
        for table in ["nat", "filter"] {
            quietly("iptables", &["-t", table, "-F"]);
            quietly("iptables", &["-t", table, "-X"]);
        }
        for family in ["ip", "ip6"] {
            for table in ["nat", "filter"] {
                quietly("nft", &["delete", "table", family, table]);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cni_plugins_are_used_when_configured() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let (daemon, cni) = Cni::start().await;

    // Not ready until a configuration is there, with the reason
    let condition = network_condition(&daemon).await;
    assert!(!condition.status && !condition.message.is_empty(), "{condition:?}");
    cni.configure(&daemon).await;

    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "cni")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let address = pod.status().await.network.unwrap().ip;
    assert!(address.starts_with("10.242.9."), "{address}");
    assert!(pod.shell(&id, "ip addr show eth0").await.contains(&address));
    assert_eq!(cni.leases(), 1);
    pod.stop().await;
    assert_eq!(cni.leases(), 0, "DEL gave the address back");

    // A plugin that fails: an error with its words, and no address or namespace left
    cni.write(&serde_json::json!([
        {"type": "bridge", "bridge": cni.bridge, "isGateway": true, "ipam":
            {"type": "host-local", "dataDir": cni.data, "ranges": [[{"subnet": "10.242.9.0/24"}]]}},
        {"type": "no-such-plugin"},
    ]));
    let refused =
        hull_tests::eventually("the broken configuration is in use", hull_tests::patience(10), async || {
            Pod::try_run(&daemon, networked_pod_config(&daemon, "broken")).await.map(|pod| pod.id).err()
        })
        .await;
    assert!(refused.message().contains("no-such-plugin"), "{refused}");
    assert_eq!(cni.leases(), 0);
    daemon.remove_all_pods().await;
    cni.clear();
    daemon.finish().await;
}

async fn network_condition(daemon: &Daemon) -> cri::RuntimeCondition {
    let status =
        daemon.runtime().await.status(cri::StatusRequest { verbose: false }).await.unwrap().into_inner();
    status
        .status
        .unwrap()
        .conditions
        .into_iter()
        .find(|condition| condition.r#type == "NetworkReady")
        .expect("a condition")
}

/// What an HTTP server answers, or the reason why it does not.
pub(crate) fn get(host: &str, address: &str, port: u16) -> String {
    use std::io::{Read, Write};
    let attempt = || -> std::io::Result<String> {
        let target = format!("{address}:{port}").parse().map_err(std::io::Error::other)?;
        let mut stream = std::net::TcpStream::connect_timeout(&target, std::time::Duration::from_secs(3))?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        write!(stream, "GET / HTTP/1.0\r\nHost: {host}\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    attempt().unwrap_or_else(|error| error.to_string())
}
