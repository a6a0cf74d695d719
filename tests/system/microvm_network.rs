//! Machines on networks that are not hull's own.

use hull_tests::microvm::available;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;

use super::microvm_ground::{http_get, perl};

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
