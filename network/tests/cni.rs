//! CNI networks: Debian's real plugins, and scripted ones for what those do not have yet.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::*;
use hull_network::{Bandwidth, Mode, Network, NetworkConfig, PodNetwork, Protocol};
use serde_json::{Value, json};

impl Machine {
    fn write_network(&self, file: &str, list: Value) {
        fs::create_dir_all(self.path("net.d")).unwrap();
        fs::write(self.path("net.d").join(file), list.to_string()).unwrap();
    }

    /// A plugin that writes down each call and does what `body` says.
    fn write_plugin(&self, name: &str, body: &str) {
        let log = self.path("calls");
        let body = format!(
            "input=$(cat)\nprintf '%s\\n' \"{name} $CNI_COMMAND id=$CNI_CONTAINERID netns=$CNI_NETNS if=$CNI_IFNAME \
             args=$CNI_ARGS $input\" >> {}\n{body}",
            log.display()
        );
        script(&self.path("bin").join(name), &body);
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        text.lines().map(str::to_owned).collect()
    }

    async fn open_cni(&self) -> std::sync::Arc<Network> {
        Network::open(NetworkConfig { mode: Mode::Cni, ..self.config() }).await.unwrap()
    }
}

/// The first words of each call: plugin and command.
fn verbs(calls: &[String]) -> Vec<String> {
    calls.iter().map(|call| call.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ")).collect()
}

fn input(call: &str) -> Value {
    serde_json::from_str(&call[call.find('{').unwrap()..]).unwrap()
}

const ADD: &str = r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"interface":0,"address":"10.9.0.7/24"}]}'; exit 0"#;

#[test]
fn debians_plugins_attach_a_pod_with_host_port_and_bandwidth() {
    on_own_machine("debians_plugins_attach_a_pod_with_host_port_and_bandwidth", |machine| async move {
        machine.write_network(
            "10-net.conflist",
            json!({
                "cniVersion": "1.0.0", "name": "podnet",
                "plugins": [
                    {
                        "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                        "ipam": {
                            "type": "host-local", "dataDir": machine.path("ipam"),
                            "ranges": [[{ "subnet": "10.88.5.0/24" }], [{ "subnet": "fd00:88::/64" }]],
                            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                        },
                    },
                    { "type": "portmap", "capabilities": { "portMappings": true } },
                    { "type": "bandwidth", "capabilities": { "bandwidth": true } },
                    { "type": "firewall" },
                ],
            }),
        );
        let network = machine.open().await;
        network.ready().unwrap();
        let mut web = pod("web");
        web.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        web.bandwidth = Some(Bandwidth {
            ingress_rate: 80_000_000,
            ingress_burst: 8_000_000,
            egress_rate: 80_000_000,
            egress_burst: 8_000_000,
        });
        let attachment = network.set_up(&web).await.unwrap();
        assert_eq!(attachment.network, "podnet");
        assert_eq!(attachment.addresses, [ip("10.88.5.2"), ip("fd00:88::2")]);
        assert_eq!(network.set_up(&web).await.unwrap(), attachment, "a repeated call attaches nothing");
        serve(Some(&attachment.namespace), "[::]:80");
        ask(None, SocketAddr::new(attachment.addresses[0], 80)).unwrap();
        ask(None, "127.0.0.1:8080".parse().unwrap()).unwrap();
        serve(Some(&attachment.namespace), "127.0.0.1:81");
        ask(Some(&attachment.namespace), "127.0.0.1:81".parse().unwrap()).unwrap();
        assert!(run_for_output("tc qdisc show").contains("tbf"));

        // Bridge alone: in Debian 12's plugins (1.1.1) CHECK of portmap does not find its own rules, and that of
        // bandwidth panics without a limit.
        let ipam = json!({ "type": "host-local", "dataDir": machine.path("ipam"), "subnet": "10.88.6.0/24" });
        machine.write_network(
            "05-plain.conf",
            json!({ "cniVersion": "1.0.0", "name": "plainnet", "type": "bridge", "bridge": "cni1", "ipam": ipam }),
        );
        let plain = network.set_up(&pod("plain")).await.unwrap();
        network.check(&pod("plain")).await.unwrap();
        // Somebody takes the address away: CHECK tells.
        run(&format!("ip -n hull-plain address del {}/24 dev eth0", plain.addresses[0]));
        let error = network.check(&pod("plain")).await.unwrap_err().to_string();
        assert!(error.contains("plainnet") && error.contains("CHECK"), "{error}");
        network.tear_down(&pod("plain")).await.unwrap();

        network.tear_down(&web).await.unwrap();
        network.tear_down(&web).await.unwrap();
        assert!(!attachment.namespace.exists());
        let leases = fs::read_dir(machine.path("ipam/podnet")).unwrap().flatten();
        let leases: Vec<_> = leases.map(|entry| entry.file_name().into_string().unwrap()).collect();
        assert!(
            !leases.iter().any(|name| name.starts_with("10.88") || name.starts_with("fd00")),
            "{leases:?}"
        );
        assert!(!run_for_output("iptables-save 2>/dev/null || true").contains("8080"));
        assert_eq!(fs::read_dir(machine.path("data/pods")).unwrap().count(), 0);
    });
}

#[test]
fn plugins_are_called_by_the_letter_of_the_specification() {
    on_own_machine("plugins_are_called_by_the_letter_of_the_specification", |machine| async move {
        machine.write_plugin("first", ADD);
        machine.write_plugin("second", ADD);
        machine.write_network(
            "10-net.conflist",
            json!({
                "cniVersion": "0.4.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "net",
                "plugins": [
                    { "type": "first", "key": 1 },
                    { "type": "second", "capabilities": { "ipRanges": true, "portMappings": true, "dns": true } },
                ],
            }),
        );
        let network = machine.open_cni().await;
        network.status().await.unwrap();
        network.ready().unwrap();
        assert_eq!(verbs(&machine.calls()), ["first STATUS", "second STATUS"]);

        network.set_pod_cidrs(&["10.9.0.0/24".parse().unwrap()]).await.unwrap();
        let mut a = pod("a");
        a.port_mappings = vec![host_port(Protocol::Udp, 53, 5353, None)];
        let attachment = network.set_up(&a).await.unwrap();
        assert_eq!(attachment.addresses, [ip("10.9.0.7")]);
        let calls = machine.calls();
        assert_eq!(verbs(&calls), ["first ADD", "second ADD"]);
        assert!(calls[0].contains(
            "id=a netns=/run/netns/hull-a if=eth0 args=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=name-a;\
             K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=uid {"
        ));
        assert_eq!(
            input(&calls[0]),
            json!({ "type": "first", "key": 1, "cniVersion": "1.1.0", "name": "net" })
        );
        let second = input(&calls[1]);
        assert_eq!(second["prevResult"]["ips"][0]["address"], "10.9.0.7/24");
        let ports = json!([{ "hostPort": 53, "containerPort": 5353, "protocol": "udp" }]);
        assert_eq!(
            second["runtimeConfig"],
            json!({ "portMappings": ports, "ipRanges": [[{ "subnet": "10.9.0.0/24" }]] })
        );
        assert!(second.get("capabilities").is_none());

        network.check(&a).await.unwrap();
        let calls = machine.calls();
        assert_eq!(verbs(&calls), ["first CHECK", "second CHECK"]);
        assert_eq!(input(&calls[0])["prevResult"]["ips"][0]["address"], "10.9.0.7/24");

        network.collect(&BTreeSet::from(["a".to_owned()])).await.unwrap();
        let calls = machine.calls();
        assert_eq!(verbs(&calls), ["first GC", "second GC"]);
        assert_eq!(
            input(&calls[0])["cni.dev/valid-attachments"],
            json!([{ "containerID": "a", "ifname": "eth0" }])
        );

        // The configuration goes; DEL still has the recorded one, in reverse order, with the result.
        fs::remove_dir_all(machine.path("net.d")).unwrap();
        network.tear_down(&a).await.unwrap();
        let calls = machine.calls();
        assert_eq!(verbs(&calls), ["second DEL", "first DEL"]);
        assert_eq!(input(&calls[0])["prevResult"]["ips"][0]["address"], "10.9.0.7/24");
        assert_eq!(input(&calls[0])["runtimeConfig"]["portMappings"], ports);
        network.tear_down(&a).await.unwrap();
        assert!(machine.calls().is_empty());
    });
}

#[test]
fn a_failed_add_is_undone_with_del() {
    on_own_machine("a_failed_add_is_undone_with_del", |machine| async move {
        machine.write_plugin("good", ADD);
        machine.write_plugin(
            "bad",
            r#"[ $CNI_COMMAND = ADD ] || exit 0; echo '{"code":11,"msg":"no lease","details":"server busy"}'; exit 1"#,
        );
        machine.write_network(
            "10-net.conflist",
            json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "good" }, { "type": "bad" }] }),
        );
        let network = machine.open().await;
        let before = host_state();
        let error = network.set_up(&pod("a")).await.unwrap_err().to_string();
        for part in ["net", "bad", "ADD", "11", "no lease", "server busy"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(verbs(&machine.calls()), ["good ADD", "bad ADD", "bad DEL", "good DEL"]);
        expect_host_state(&before).await;
        assert_eq!(fs::read_dir(machine.path("data/pods")).unwrap().count(), 0);

        // Even DEL fails: no namespace stays, but the record does, and DEL is tried again without the namespace.
        machine.write_plugin("bad", "[ -e /run/mended ] && exit 0; echo broken >&2; exit 1");
        network.set_up(&pod("b")).await.unwrap_err();
        expect_host_state(&before).await;
        let error = network.collect(&BTreeSet::new()).await.unwrap_err().to_string();
        assert!(error.contains("broken"), "{error}");
        fs::write("/run/mended", "").unwrap();
        machine.calls();
        network.collect(&BTreeSet::new()).await.unwrap();
        let calls = machine.calls();
        assert_eq!(verbs(&calls), ["bad DEL", "good DEL"]);
        assert!(calls[0].contains("netns= if=eth0"), "{}", calls[0]);
        assert_eq!(fs::read_dir(machine.path("data/pods")).unwrap().count(), 0);
    });
}

#[test]
fn a_failed_del_keeps_the_pod_for_another_try() {
    on_own_machine("a_failed_del_keeps_the_pod_for_another_try", |machine| async move {
        machine
            .write_plugin("p", &format!("[ $CNI_COMMAND = DEL ] && [ ! -e /run/mended ] && exit 1; {ADD}"));
        machine.write_network("10-net.conf", json!({ "cniVersion": "1.0.0", "name": "net", "type": "p" }));
        let network = machine.open().await;
        let attachment = network.set_up(&pod("a")).await.unwrap();
        network.tear_down(&pod("a")).await.unwrap_err();
        assert!(attachment.namespace.exists());
        // The daemon is killed and its successor tries again.
        drop(network);
        let network = machine.open().await;
        fs::write("/run/mended", "").unwrap();
        network.tear_down(&pod("a")).await.unwrap();
        assert!(!attachment.namespace.exists());
    });
}

#[test]
fn a_plugin_that_fails_del_keeps_no_other_from_its_own() {
    on_own_machine("a_plugin_that_fails_del_keeps_no_other_from_its_own", |machine| async move {
        machine.write_plugin("last", &format!("[ $CNI_COMMAND = DEL ] && echo stuck >&2 && exit 1; {ADD}"));
        machine.write_plugin("middle", ADD);
        let ipam = json!({ "type": "host-local", "dataDir": machine.path("ipam"), "subnet": "10.88.7.0/24" });
        machine.write_network(
            "10-net.conflist",
            json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [
                { "type": "bridge", "bridge": "cni0", "ipam": ipam }, { "type": "middle" }, { "type": "last" },
            ]}),
        );
        let leases = || {
            let names =
                fs::read_dir(machine.path("ipam/net")).unwrap().flatten().map(|entry| entry.file_name());
            names.filter(|name| name.to_string_lossy().starts_with("10.")).count()
        };
        let network = machine.open().await;
        network.set_up(&pod("a")).await.unwrap();
        assert_eq!(leases(), 1);
        machine.calls();

        // When one plugin is gone and another one fails
        let (middle, away) = (machine.path("bin/middle"), machine.path("away"));
        fs::rename(&middle, &away).unwrap();
        let error = network.tear_down(&pod("a")).await.unwrap_err().to_string();

        // Then the error tells of both, the address is given back, and the rest is tried again
        assert!(error.contains("stuck") && error.contains("middle is not in"), "{error}");
        assert_eq!((verbs(&machine.calls()), leases()), (vec!["last DEL".to_owned()], 0));
        fs::rename(&away, &middle).unwrap();
        machine.write_plugin("last", ADD);
        network.collect(&BTreeSet::new()).await.unwrap();
        assert_eq!(verbs(&machine.calls()), ["last DEL", "middle DEL"]);
        assert_eq!(fs::read_dir(machine.path("data/pods")).unwrap().count(), 0);
    });
}

#[test]
fn nothing_is_begun_while_a_plugin_is_not_installed() {
    on_own_machine("nothing_is_begun_while_a_plugin_is_not_installed", |machine| async move {
        machine.write_plugin("good", ADD);
        let plugins = json!([{ "type": "good" }, { "type": "no-such-plugin" }]);
        machine.write_network(
            "10-net.conflist",
            json!({ "cniVersion": "1.0.0", "name": "net", "plugins": plugins }),
        );
        let network = machine.open_cni().await;
        let error = network.set_up(&pod("a")).await.unwrap_err().to_string();
        assert!(error.contains("no-such-plugin"), "{error}");
        network.tear_down(&pod("a")).await.unwrap();
        assert!(machine.calls().is_empty());
        assert!(!network.namespace_path("a").exists());
    });
}

#[test]
fn without_a_configuration_the_network_is_not_ready_and_then_it_is() {
    on_own_machine("without_a_configuration_the_network_is_not_ready_and_then_it_is", |machine| async move {
        let network = machine.open_cni().await;
        let reason = network.ready().unwrap_err();
        assert!(reason.contains("no CNI configuration"), "{reason}");
        let error = network.set_up(&pod("a")).await.unwrap_err().to_string();
        assert!(error.contains("not ready"), "{error}");
        assert!(!network.namespace_path("a").exists());

        machine.write_network("10-net.conf", json!({ "cniVersion": "1.0.0", "name": "net", "type": "p" }));
        let reason = network.ready().unwrap_err();
        assert!(reason.contains("plugin p is not in"), "{reason}");
        machine.write_plugin("p", ADD);
        network.ready().unwrap();
        assert_eq!(network.set_up(&pod("a")).await.unwrap().addresses, [ip("10.9.0.7")]);

        // A plugin that says it is not ready.
        machine.write_plugin(
            "q",
            r#"[ -e /run/mended ] && exit 0; echo '{"code":50,"msg":"no tunnel"}'; exit 1"#,
        );
        machine.write_network("05-net.conf", json!({ "cniVersion": "1.1.0", "name": "other", "type": "q" }));
        let reason = network.status().await.unwrap_err();
        assert!(reason.contains("no tunnel") && reason.contains("50"), "{reason}");
        assert_eq!(network.ready().unwrap_err(), reason);
        fs::write("/run/mended", "").unwrap();
        let start = Instant::now();
        while network.ready().is_err() {
            assert!(start.elapsed() < Duration::from_secs(8));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

#[test]
fn auto_uses_the_bridge_until_there_is_a_configuration_and_undoes_each_pod_its_own_way() {
    let name = "auto_uses_the_bridge_until_there_is_a_configuration_and_undoes_each_pod_its_own_way";
    on_own_machine(name, |machine| async move {
        let network = machine.open().await;
        let before = host_state();
        network.ready().unwrap();
        assert_eq!(network.set_up(&pod("a")).await.unwrap().network, "builtin");
        machine.write_plugin("p", ADD);
        machine.write_network("10-net.conf", json!({ "cniVersion": "1.0.0", "name": "net", "type": "p" }));
        assert_eq!(network.set_up(&pod("b")).await.unwrap().network, "net");
        for id in ["a", "b"] {
            network.tear_down(&pod(id)).await.unwrap();
        }
        assert_eq!(verbs(&machine.calls()), ["p ADD", "p DEL"]);
        expect_host_state(&before).await;
    });
}

#[test]
fn a_caller_that_goes_away_stops_nothing_half_way() {
    on_own_machine("a_caller_that_goes_away_stops_nothing_half_way", |machine| async move {
        machine.write_plugin("p", &format!("sleep 0.3; {ADD}"));
        machine.write_network("10-net.conf", json!({ "cniVersion": "1.0.0", "name": "net", "type": "p" }));
        let network = machine.open().await;
        let a: PodNetwork = pod("a");
        let early = tokio::time::timeout(Duration::from_millis(50), network.set_up(&a)).await;
        assert!(early.is_err());
        // The retry waits for the first and gets its result; nothing is attached twice.
        assert_eq!(network.set_up(&a).await.unwrap().addresses, [ip("10.9.0.7")]);
        assert_eq!(verbs(&machine.calls()), ["p ADD"]);
    });
}
