//! The built-in network on the real kernel.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::*;
use hull_network::{Bandwidth, Network, NetworkConfig, PodNetwork, Protocol};

fn at(address: std::net::IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

#[test]
fn pods_talk_to_each_other_to_the_host_and_to_the_outside() {
    on_own_machine("pods_talk_to_each_other_to_the_host_and_to_the_outside", |machine| async move {
        let outside = machine.add_outside();
        let network = machine.open().await;
        let a = network.set_up(&pod("a")).await.unwrap();
        let b = network.set_up(&pod("b")).await.unwrap();
        assert_eq!(a.network, "builtin");
        assert_eq!(a.namespace, network.namespace_path("a"));
        assert_eq!(a.addresses, [ip("10.213.0.2"), ip("fd68:756c:6c00::2")]);
        assert_eq!(b.addresses, [ip("10.213.0.3"), ip("fd68:756c:6c00::3")]);

        serve(Some(&b.namespace), "[::]:80");
        serve(None, "[::]:81");
        serve(Some(&outside), "[::]:82");
        for version in [0, 1] {
            // Pod to pod and host to pod keep their source addresses.
            assert_eq!(ask(Some(&a.namespace), at(b.addresses[version], 80)).unwrap(), a.addresses[version]);
            let gateway = ["10.213.0.1", "fd68:756c:6c00::1"][version];
            assert_eq!(ask(None, at(b.addresses[version], 80)).unwrap(), ip(gateway));
            // Pod to host, by the bridge's address and by another of the host's.
            assert_eq!(ask(Some(&a.namespace), at(ip(gateway), 81)).unwrap(), a.addresses[version]);
            let wan = ["198.51.100.1", "2001:db8::1"][version];
            assert_eq!(ask(Some(&a.namespace), at(ip(wan), 81)).unwrap(), a.addresses[version]);
            // The outside knows no pod: it sees the host.
            let other = ["198.51.100.2", "2001:db8::2"][version];
            assert_eq!(ask(Some(&a.namespace), at(ip(other), 82)).unwrap(), ip(wan));
        }
        // Loopback works, and the link has the MTU of the default route.
        serve(Some(&a.namespace), "127.0.0.1:83");
        assert_eq!(ask(Some(&a.namespace), at(ip("127.0.0.1"), 83)).unwrap(), ip("127.0.0.1"));
        let links = run_for_output("ip netns exec hull-a ip -o link show eth0");
        assert!(links.contains("mtu 1400"), "{links}");
        // A pod is usable at once: no duplicate address detection, no router solicitation.
        let addresses = run_for_output("ip netns exec hull-a ip -o -6 address show eth0");
        assert!(!addresses.contains("tentative") && !addresses.contains("dynamic"), "{addresses}");
        network.check(&pod("a")).await.unwrap();
    });
}

#[test]
fn after_the_last_pod_nothing_is_left_within_a_second() {
    on_own_machine("after_the_last_pod_nothing_is_left_within_a_second", |machine| async move {
        let network = machine.open().await;
        let before = host_state();
        let mut a = pod("a");
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        for _ in 0..2 {
            network.set_up(&a).await.unwrap();
            network.set_up(&pod("b")).await.unwrap();
            assert!(host_state().contains("hull0"));
            for id in ["a", "b", "a", "never"] {
                network.tear_down(&pod(id)).await.unwrap();
            }
            expect_host_state(&before).await;
        }
        assert_eq!(fs::read_dir(machine.path("data/pods")).unwrap().count(), 0);
    });
}

#[test]
fn the_bridge_waits_for_the_next_pod_and_goes_with_the_daemon() {
    let name = "the_bridge_waits_for_the_next_pod_and_goes_with_the_daemon";
    on_own_machine(name, |machine| async move {
        let patient = NetworkConfig { linger: Duration::from_secs(3600), ..machine.config() };
        let network = Network::open(patient).await.unwrap();
        let before = host_state();
        let bridge = || run_for_output("ip -o link show hull0 | cut -d: -f1");
        network.set_up(&pod("a")).await.unwrap();
        let first = bridge();
        network.tear_down(&pod("a")).await.unwrap();
        let record = machine.path("data/pods/a.json");
        while record.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        network.set_up(&pod("b")).await.unwrap();
        assert_eq!(bridge(), first);
        network.tear_down(&pod("b")).await.unwrap();
        network.release().await.unwrap();
        expect_host_state(&before).await;
    });
}

#[test]
fn a_link_goes_within_a_second_even_if_a_process_keeps_the_namespace() {
    on_own_machine(
        "a_link_goes_within_a_second_even_if_a_process_keeps_the_namespace",
        |machine| async move {
            let network = machine.open().await;
            let before = host_state();
            let attachment = network.set_up(&pod("a")).await.unwrap();
            let _held = fs::File::open(&attachment.namespace).unwrap();
            network.tear_down(&pod("a")).await.unwrap();
            expect_host_state(&before).await;
        },
    );
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere() {
    on_own_machine("host_ports_lead_to_the_pod_from_everywhere", |machine| async move {
        let outside = machine.add_outside();
        let network = machine.open().await;
        let mut web = pod("web");
        web.port_mappings = vec![
            host_port(Protocol::Tcp, 8080, 80, None),
            host_port(Protocol::Tcp, 8081, 80, Some("127.0.0.1")),
            host_port(Protocol::Tcp, 8082, 80, Some("198.51.100.1")),
            host_port(Protocol::Tcp, 8083, 80, Some("2001:db8::1")),
            host_port(Protocol::Udp, 5353, 53, None),
        ];
        let web = network.set_up(&web).await.unwrap();
        let other = network.set_up(&pod("other")).await.unwrap();
        serve(Some(&web.namespace), "[::]:80");
        serve_udp(&web.namespace, "[::]:53");

        // From outside, with the client's own address.
        assert_eq!(ask(Some(&outside), at(ip("198.51.100.1"), 8080)).unwrap(), ip("198.51.100.2"));
        assert_eq!(ask(Some(&outside), at(ip("2001:db8::1"), 8080)).unwrap(), ip("2001:db8::2"));
        assert_eq!(ask_udp(Some(&outside), at(ip("198.51.100.1"), 5353)).unwrap(), ip("198.51.100.2"));
        assert_eq!(ask_udp(Some(&outside), at(ip("2001:db8::1"), 5353)).unwrap(), ip("2001:db8::2"));
        // From the host: loopback and its own addresses.
        for host in ["127.0.0.1", "198.51.100.1", "10.213.0.1", "2001:db8::1", "fd68:756c:6c00::1"] {
            ask(None, at(ip(host), 8080)).unwrap_or_else(|error| panic!("{host}: {error}"));
        }
        ask_udp(None, at(ip("127.0.0.1"), 5353)).unwrap();
        // ::1 cannot lead to a pod; then it must be refused at once.
        let error = ask(None, at(ip("::1"), 8080)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
        // From another pod, and from the pod itself.
        for from in [&other, &web] {
            for host in ["198.51.100.1", "10.213.0.1", "2001:db8::1", "fd68:756c:6c00::1"] {
                ask(Some(&from.namespace), at(ip(host), 8080))
                    .unwrap_or_else(|error| panic!("{host}: {error}"));
            }
            ask_udp(Some(&from.namespace), at(ip("10.213.0.1"), 5353)).unwrap();
        }
        // A port on one address answers there and nowhere else.
        ask(None, at(ip("127.0.0.1"), 8081)).unwrap();
        ask(Some(&outside), at(ip("198.51.100.1"), 8081)).unwrap_err();
        ask(Some(&outside), at(ip("198.51.100.1"), 8082)).unwrap();
        ask(None, at(ip("127.0.0.1"), 8082)).unwrap_err();
        ask(Some(&outside), at(ip("2001:db8::1"), 8083)).unwrap();
        ask(Some(&outside), at(ip("198.51.100.1"), 8083)).unwrap_err();
    });
}

#[test]
fn a_udp_client_that_never_stops_reaches_the_next_pod() {
    on_own_machine("a_udp_client_that_never_stops_reaches_the_next_pod", |machine| async move {
        let outside = machine.add_outside();
        let network = machine.open().await;
        network.set_up(&pod("keeper")).await.unwrap();
        let client = inside(&outside, || UdpSocket::bind("0.0.0.0:5000").unwrap());
        client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let call = || {
            client.send_to(b"?", "198.51.100.1:5353").unwrap();
            client.recv_from(&mut [0; 100]).is_ok()
        };
        assert!(!call());
        for id in ["a", "b"] {
            let mut dns = pod(id);
            dns.port_mappings = vec![host_port(Protocol::Udp, 5353, 53, None)];
            let attachment = network.set_up(&dns).await.unwrap();
            serve_udp(&attachment.namespace, "0.0.0.0:53");
            assert!(call(), "{id}");
            network.tear_down(&dns).await.unwrap();
            // It answers no more, though the client's flow goes on.
            assert!(!call(), "{id}");
        }
    });
}

#[test]
fn pods_do_not_reach_services_on_the_hosts_loopback() {
    on_own_machine("pods_do_not_reach_services_on_the_hosts_loopback", |machine| async move {
        let network = machine.open().await;
        let a = network.set_up(&pod("a")).await.unwrap();
        serve(None, "127.0.0.1:90");
        // What a pod with NET_ADMIN could try (CVE-2020-8558).
        run("ip netns exec hull-a sh -c 'echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; \
             ip address del 127.0.0.1/8 dev lo; ip route del table local 127.0.0.0/8 2>/dev/null || true; \
             ip route add 127.0.0.0/8 via 10.213.0.1 dev eth0'");
        let error = ask(Some(&a.namespace), at(ip("127.0.0.1"), 90)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    });
}

#[test]
fn a_host_port_belongs_to_one_pod_at_a_time() {
    on_own_machine("a_host_port_belongs_to_one_pod_at_a_time", |machine| async move {
        let network = machine.open().await;
        let with_port = |id: &str, host_ip| PodNetwork {
            port_mappings: vec![host_port(Protocol::Tcp, 8080, 80, host_ip)],
            ..pod(id)
        };
        network.set_up(&with_port("a", None)).await.unwrap();
        let before = host_state();
        let error = network.set_up(&with_port("b", Some("127.0.0.1"))).await.unwrap_err().to_string();
        assert!(error.contains("8080") && error.contains("pod a"), "{error}");
        serve(None, "0.0.0.0:9090");
        let mut taken = pod("c");
        taken.port_mappings = vec![host_port(Protocol::Tcp, 9090, 80, None)];
        let error = network.set_up(&taken).await.unwrap_err().to_string();
        assert!(error.contains("9090") && error.contains("process on the host"), "{error}");
        expect_host_state(&before).await;
        // Free again the moment the pod is torn down.
        network.tear_down(&pod("a")).await.unwrap();
        let b = network.set_up(&with_port("b", None)).await.unwrap();
        network.tear_down(&pod("a")).await.unwrap();
        serve(Some(&b.namespace), "[::]:80");
        ask(None, at(ip("127.0.0.1"), 8080)).unwrap();
    });
}

#[test]
fn a_failed_step_leaves_nothing_behind() {
    on_own_machine("a_failed_step_leaves_nothing_behind", |machine| async move {
        let network = machine.open().await;
        network.set_up(&pod("keeper")).await.unwrap();
        let before = host_state();
        let records = || fs::read_dir(machine.path("data/pods")).unwrap().count();

        // The link cannot be made: its name is taken by a link that cannot be deleted as such a one.
        // (The name follows from the id; the same id gives the same name.)
        let attachment = network.set_up(&pod("x")).await.unwrap();
        let link = run_for_output("ip -o link | grep -o 'hull[0-9a-f]\\{11\\}' | tail -1").trim().to_owned();
        drop(attachment);
        network.tear_down(&pod("x")).await.unwrap();
        expect_host_state(&before).await;
        run(&format!("ip link property add dev lo altname {link}"));
        let error = network.set_up(&pod("x")).await.unwrap_err().to_string();
        assert!(error.contains(&link), "{error}");
        assert!(!run_for_output("ip link show lo").contains("alias"));
        run(&format!("ip link property del dev lo altname {link}"));
        expect_host_state(&before).await;

        // The namespace cannot be pinned.
        fs::create_dir(network.namespace_path("y")).unwrap();
        let error = network.set_up(&pod("y")).await.unwrap_err().to_string();
        assert!(error.contains("hull-y"), "{error}");
        fs::remove_dir(network.namespace_path("y")).unwrap();
        network.tear_down(&pod("y")).await.unwrap();
        expect_host_state(&before).await;

        // The last step, the host ports, cannot be made.
        let ruleset = run_for_output("nft list ruleset");
        run("nft delete table inet hull0; nft add table inet hull0");
        let mut z = pod("z");
        z.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        network.set_up(&z).await.unwrap_err();
        // collect() repairs the rules that somebody removed.
        network.collect(&BTreeSet::from(["keeper".to_owned()])).await.unwrap();
        assert_eq!(run_for_output("nft list ruleset"), ruleset);
        expect_host_state(&before).await;
        tokio::time::sleep(Duration::from_millis(600) * patience()).await;
        assert_eq!(records(), 1);
    });
}

#[test]
fn a_bridge_and_rules_that_somebody_removed_come_back_with_the_next_pod() {
    let name = "a_bridge_and_rules_that_somebody_removed_come_back_with_the_next_pod";
    on_own_machine(name, |machine| async move {
        let network = machine.open().await;
        let mut a = pod("a");
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        let a = network.set_up(&a).await.unwrap();
        serve(Some(&a.namespace), "[::]:80");
        for damage in ["nft flush ruleset", "ip link del hull0"] {
            run(damage);
            network.set_up(&pod("b")).await.unwrap();
            ask(None, at(ip("127.0.0.1"), 8080)).unwrap();
            network.tear_down(&pod("b")).await.unwrap();
        }
    });
}

#[test]
fn a_killed_daemons_successor_knows_what_is_used_and_collects_the_rest() {
    on_own_machine(
        "a_killed_daemons_successor_knows_what_is_used_and_collects_the_rest",
        |machine| async move {
            let network = machine.open().await;
            let before = host_state();
            let mut a = pod("a");
            a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
            let first = network.set_up(&a).await.unwrap();
            let mut b = pod("b");
            b.port_mappings = vec![host_port(Protocol::Tcp, 8081, 80, None)];
            network.set_up(&b).await.unwrap();
            drop(network);

            // The successor gives no address twice and repeats what it had given.
            let network = machine.open().await;
            assert_eq!(network.set_up(&a).await.unwrap(), first);
            let c = network.set_up(&pod("c")).await.unwrap();
            assert_eq!(c.addresses[0], ip("10.213.0.4"));
            let mut d = pod("d");
            d.port_mappings = vec![host_port(Protocol::Tcp, 8081, 80, None)];
            network.set_up(&d).await.unwrap_err();

            // A pod nobody knows goes with everything; the others stay.
            network.collect(&BTreeSet::from(["a".to_owned(), "c".to_owned()])).await.unwrap();
            assert!(!network.namespace_path("b").exists());
            assert!(!run_for_output("nft list ruleset").contains("8081"));
            network.set_up(&d).await.unwrap();
            serve(Some(&first.namespace), "[::]:80");
            ask(None, at(ip("127.0.0.1"), 8080)).unwrap();

            // Killed between the kernel's work and the end of its own: released, but links still there.
            network.tear_down(&a).await.unwrap();
            drop(network);
            let network = machine.open().await;
            network.collect(&BTreeSet::new()).await.unwrap();
            network.release().await.unwrap();
            expect_host_state(&before).await;
        },
    );
}

#[test]
fn links_of_lost_records_are_recognised() {
    on_own_machine("links_of_lost_records_are_recognised", |machine| async move {
        let network = machine.open().await;
        let before = host_state();
        let mut a = pod("a");
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        network.set_up(&a).await.unwrap();
        drop(network);
        fs::remove_dir_all(machine.path("data")).unwrap();
        let network = machine.open().await;
        network.collect(&BTreeSet::new()).await.unwrap();
        expect_host_state(&before).await;
    });
}

#[test]
fn after_a_reboot_records_are_undone_without_their_namespaces() {
    on_own_machine("after_a_reboot_records_are_undone_without_their_namespaces", |machine| async move {
        let before = host_state();
        let mut a = pod("a");
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
        {
            let network = machine.open().await;
            network.set_up(&a).await.unwrap();
        }
        // What a reboot does.
        run("umount /run/netns/hull-a && rm /run/netns/hull-a && rmdir /run/netns
             ip link del hull0; nft delete table inet hull0; ip link del $(ip -o link | grep -o 'hull[0-9a-f]\\{11\\}') 2>/dev/null || true");
        let record = machine.path("data/pods/a.json");
        let text = fs::read_to_string(&record).unwrap();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        fs::write(&record, text.replace(boot.trim(), "another-boot")).unwrap();

        let network = machine.open().await;
        network.tear_down(&a).await.unwrap();
        network.tear_down(&a).await.unwrap();
        network.release().await.unwrap();
        assert!(!record.exists());
        run("rmdir /run/netns 2>/dev/null || true");
        expect_host_state(&before).await;
    });
}

#[test]
fn two_daemons_live_side_by_side() {
    on_own_machine("two_daemons_live_side_by_side", |machine| async move {
        let first = machine.open().await;
        let second_config = |bridge: &str| NetworkConfig {
            data: machine.path("data2"),
            state: machine.path("state2"),
            bridge: bridge.into(),
            ..machine.config()
        };
        let a = first.set_up(&pod("a")).await.unwrap();
        // The same data directory, then the same bridge: both refused.
        assert!(Network::open(NetworkConfig { bridge: "hull1".into(), ..machine.config() }).await.is_err());
        let clash = Network::open(second_config("hull0")).await.unwrap();
        let error = clash.set_up(&pod("b")).await.unwrap_err().to_string();
        assert!(error.contains("not this daemon's"), "{error}");
        clash.collect(&BTreeSet::new()).await.unwrap();
        clash.release().await.unwrap();
        assert!(run_for_output("nft list ruleset; ip -o link").matches("hull0").count() > 2);
        drop(clash);
        tokio::time::sleep(Duration::from_millis(50)).await;
        // The same range: refused as well.
        let clash = Network::open(NetworkConfig {
            subnets: NetworkConfig::default_subnets("hull0"),
            ..second_config("hull1")
        });
        let clash = clash.await.unwrap();
        let error = clash.set_up(&pod("b")).await.unwrap_err().to_string();
        assert!(error.contains("overlaps"), "{error}");
        drop(clash);
        tokio::time::sleep(Duration::from_millis(50)).await;

        let second = Network::open(second_config("hull1")).await.unwrap();
        let b = second.set_up(&pod("b")).await.unwrap();
        serve(Some(&b.namespace), "[::]:80");
        ask(Some(&a.namespace), at(b.addresses[0], 80)).unwrap();
        // One's collection does not touch the other's.
        first.collect(&BTreeSet::new()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(600) * patience()).await;
        second.check(&pod("b")).await.unwrap();
        assert!(!run_for_output("ip -o link").contains("hull0:"));
    });
}

#[test]
fn kubelets_ranges_replace_the_configured_ones_and_outlive_a_restart() {
    on_own_machine(
        "kubelets_ranges_replace_the_configured_ones_and_outlive_a_restart",
        |machine| async move {
            let network = machine.open().await;
            let a = network.set_up(&pod("a")).await.unwrap();
            network.set_pod_cidrs(&["10.99.7.0/24".parse().unwrap()]).await.unwrap();
            let b = network.set_up(&pod("b")).await.unwrap();
            assert_eq!(b.addresses, [ip("10.99.7.2")]);
            serve(Some(&b.namespace), "[::]:80");
            assert_eq!(ask(Some(&a.namespace), at(b.addresses[0], 80)).unwrap(), a.addresses[0]);
            drop(network);
            let network = machine.open().await;
            assert_eq!(network.set_up(&pod("c")).await.unwrap().addresses, [ip("10.99.7.3")]);
            assert!(network.set_pod_cidrs(&["10.0.0.0/30".parse().unwrap()]).await.is_err());
        },
    );
}

#[test]
fn bandwidth_is_limited_in_both_directions() {
    on_own_machine("bandwidth_is_limited_in_both_directions", |machine| async move {
        let network = machine.open().await;
        let mut slow = pod("slow");
        slow.bandwidth = Some(Bandwidth {
            ingress_rate: 80_000_000,
            ingress_burst: u64::from(u32::MAX),
            egress_rate: 40_000_000,
            egress_burst: 0,
        });
        if let Err(error) = network.set_up(&slow).await {
            // The kernel may lack sch_tbf; then the limit must not be dropped silently.
            assert!(error.to_string().contains("limiting the rate"), "{error}");
            return;
        }
        let outside = run_for_output("tc qdisc show");
        assert!(outside.contains("tbf") && outside.contains("rate 80Mbit"), "{outside}");
        let inside = run_for_output("ip netns exec hull-slow tc qdisc show dev eth0");
        assert!(inside.contains("tbf") && inside.contains("rate 40Mbit"), "{inside}");
    });
}

#[test]
fn many_pods_at_once_get_different_addresses() {
    on_own_machine("many_pods_at_once_get_different_addresses", |machine| async move {
        let network = machine.open().await;
        let before = host_state();
        let start = Instant::now();
        let tasks: Vec<_> = (0..40)
            .map(|n| {
                let network = network.clone();
                tokio::spawn(
                    async move { network.set_up(&pod(&format!("p{n}"))).await.unwrap().addresses[0] },
                )
            })
            .collect();
        let mut addresses = BTreeSet::new();
        for task in tasks {
            addresses.insert(task.await.unwrap());
        }
        assert_eq!(addresses.len(), 40);
        println!("40 pods at once: {:?}", start.elapsed());
        let start = Instant::now();
        for n in 0..40 {
            network.tear_down(&pod(&format!("p{n}"))).await.unwrap();
        }
        println!("40 torn down: {:?}", start.elapsed());
        let start = Instant::now();
        while host_state() != before {
            assert!(start.elapsed() < Duration::from_secs(5) * patience(), "{}", host_state());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("all gone after {:?}", start.elapsed());
    });
}

#[test]
fn an_id_that_is_a_path_is_refused() {
    on_own_machine("an_id_that_is_a_path_is_refused", |machine| async move {
        let network = machine.open().await;
        for id in ["", "../x", "a/b", ".x", "a b", &"a".repeat(129)] {
            assert!(network.set_up(&pod(id)).await.is_err(), "{id}");
            assert!(network.tear_down(&pod(id)).await.is_err(), "{id}");
        }
        for bridge in ["", "a/b", "sixteen-bytes-xx", "1"] {
            let config =
                NetworkConfig { bridge: bridge.into(), data: machine.path("other"), ..machine.config() };
            assert!(Network::open(config).await.is_err(), "{bridge}");
        }
    });
}

#[test]
fn a_pod_is_attached_and_detached_in_milliseconds() {
    on_own_machine("a_pod_is_attached_and_detached_in_milliseconds", |machine| async move {
        let network = machine.open().await;
        network.set_up(&pod("keeper")).await.unwrap();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for n in 0..31 {
            let mut pod = pod(&format!("p{n}"));
            pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80, None)];
            let start = Instant::now();
            network.set_up(&pod).await.unwrap();
            up.push(start.elapsed());
            // Far from the last pod's end, which the kernel is still busy with.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let start = Instant::now();
            network.tear_down(&pod).await.unwrap();
            down.push(start.elapsed());
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        up.sort();
        down.sort();
        println!(
            "set_up: median {:?}, max {:?}; tear_down: median {:?}, max {:?}",
            up[15], up[30], down[15], down[30]
        );
        // Ten times what an idle machine takes: other tests run meanwhile.
        assert!(up[15] < Duration::from_millis(30) * patience(), "{up:?}");
        assert!(down[15] < Duration::from_millis(30) * patience(), "{down:?}");
    });
}
