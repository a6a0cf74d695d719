//! A guest in the place of a pod's interface. The guest here is a namespace with a kernel stack of its own behind a second
//! tap, with a thread between the two taps that plays the machine.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use hull_network::tap::{GuestLink, GuestRoute, open_guest_link};
use hull_network::{Attachment, Bandwidth, PodNetwork, Protocol};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};

/// Whether the kernel can do what a microVM pod's network needs.
fn has_traffic_control() -> bool {
    let config = fs::read("/proc/config.gz").is_err();
    let output = std::process::Command::new("sh")
        .args(["-c", "zcat /proc/config.gz | grep -q NET_ACT_MIRRED="])
        .status();
    config || output.is_ok_and(|status| status.success())
}

/// A guest behind this link, set up as the agent does it.
fn boot(name: &str, link: GuestLink) -> PathBuf {
    assert!(has_traffic_control());
    run(&format!("ip netns add {name}"));
    let namespace = PathBuf::from("/run/netns").join(name);
    let nic = inside(&namespace, || hull_sys::tun::make_tap("eth0")).unwrap();
    let mac = link.mac.map(|byte| format!("{byte:02x}")).join(":");
    let mut script = format!("ip link set lo up; ip link set eth0 address {mac} mtu {} up\n", link.mtu);
    for address in &link.addresses {
        let nodad = if address.addr().is_ipv6() { "nodad" } else { "" };
        script += &format!("ip address add {address} dev eth0 noprefixroute {nodad}\n");
    }
    for neighbour in &link.neighbours {
        let mac = neighbour.mac.map(|byte| format!("{byte:02x}")).join(":");
        script +=
            &format!("ip neighbour replace {} lladdr {mac} dev eth0 nud permanent\n", neighbour.address);
    }
    for route in &link.routes {
        let version = if route.destination.addr().is_ipv6() { "-6" } else { "" };
        let via = route.gateway.map(|gateway| format!("via {gateway}")).unwrap_or_default();
        let source = route.source.map(|source| format!("src {source}")).unwrap_or_default();
        let onlink = if route.onlink { "onlink" } else { "" };
        script += &format!("ip {version} route add {} {via} dev eth0 {source} {onlink}\n", route.destination);
    }
    inside(&namespace, || run(&script));
    std::thread::spawn(move || copy_frames(link.tap, nic));
    namespace
}

/// Both taps have the same header and no offloads: frames are copied as they are.
fn copy_frames(a: OwnedFd, b: OwnedFd) {
    let mut frame = vec![0; 70_000];
    loop {
        let mut both = [PollFd::new(&a, PollFlags::IN), PollFd::new(&b, PollFlags::IN)];
        if rustix::event::poll(&mut both, None::<&Timespec>).is_err() {
            return;
        }
        for (from, to) in [(&a, &b), (&b, &a)] {
            while let Ok(length) = rustix::io::read(from, &mut frame) {
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}

async fn open(attachment: &Attachment) -> GuestLink {
    let pin = attachment.namespace.clone();
    tokio::task::spawn_blocking(move || open_guest_link(&pin, "eth0")).await.unwrap().unwrap()
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

fn direct(destination: &str, source: &str) -> GuestRoute {
    GuestRoute {
        destination: destination.parse().unwrap(),
        gateway: None,
        onlink: false,
        source: (!source.is_empty()).then(|| source.parse().unwrap()),
        metric: if destination.contains(':') { 256 } else { 0 },
    }
}

#[test]
fn a_guest_is_a_pod_of_the_built_in_network_like_any_other() {
    on_own_machine("a_guest_is_a_pod_of_the_built_in_network_like_any_other", |machine| async move {
        let outside = machine.add_outside();
        let network = machine.open().await;
        let mut web = pod("web");
        web.port_mappings =
            vec![host_port(Protocol::Tcp, 8080, 80, None), host_port(Protocol::Udp, 5353, 53, None)];
        let before = network.set_up(&web).await.unwrap();
        let other = network.set_up(&pod("other")).await.unwrap();
        let link = open(&before).await;
        assert_eq!((link.name.as_str(), link.mtu), ("eth0", 1400));
        let addresses: Vec<IpAddr> = link.addresses.iter().map(ipnet::IpNet::addr).collect();
        assert_eq!(addresses, before.addresses);
        assert_eq!(link.routes[0], direct("10.213.0.0/24", "10.213.0.2"));
        assert_eq!(link.routes.iter().filter(|route| route.destination.prefix_len() == 0).count(), 2);
        assert!(link.routes.iter().position(|route| route.gateway.is_some()).unwrap() >= 2);

        let guest = boot("guest-web", link);
        serve(Some(&guest), "[::]:80");
        serve_udp(&guest, "[::]:53");
        serve(Some(&other.namespace), "[::]:80");
        serve(None, "[::]:81");
        serve(Some(&outside), "[::]:82");
        for version in [0, 1] {
            let own = before.addresses[version];
            assert_eq!(ask(Some(&other.namespace), at(own, 80)).unwrap(), other.addresses[version]);
            assert_eq!(ask(Some(&guest), at(other.addresses[version], 80)).unwrap(), own);
            let gateway = ip(["10.213.0.1", "fd68:756c:6c00::1"][version]);
            assert_eq!(ask(None, at(own, 80)).unwrap(), gateway);
            assert_eq!(ask(Some(&guest), at(gateway, 81)).unwrap(), own);
            // Masquerading, and host ports from outside.
            let (host, far) =
                (["198.51.100.1", "2001:db8::1"][version], ["198.51.100.2", "2001:db8::2"][version]);
            assert_eq!(ask(Some(&guest), at(ip(far), 82)).unwrap(), ip(host));
            assert_eq!(ask(Some(&outside), at(ip(host), 8080)).unwrap(), ip(far));
            assert_eq!(ask_udp(Some(&outside), at(ip(host), 5353)).unwrap(), ip(far));
        }
        // Nothing in the namespace on the host's side answers any more, and the pod is still what was recorded.
        let counts =
            run_for_output("ip netns exec hull-web cat /proc/net/snmp | awk '/^Ip: [0-9]/ {print $4, $11}'");
        assert_eq!(counts.trim(), "0 0", "packets received and sent by the namespace itself");
        network.check(&web).await.unwrap();
        assert_eq!(network.set_up(&web).await.unwrap(), before);
        network.tear_down(&web).await.unwrap();
        network.tear_down(&pod("other")).await.unwrap();
        run("ip netns del guest-web");
    });
}

#[test]
fn a_guests_bandwidth_is_limited_both_ways() {
    on_own_machine("a_guests_bandwidth_is_limited_both_ways", |machine| async move {
        let network = machine.open().await;
        let mut slow = pod("slow");
        slow.bandwidth = Some(Bandwidth {
            ingress_rate: 16_000_000,
            ingress_burst: 524_288,
            egress_rate: 16_000_000,
            egress_burst: 524_288,
        });
        let attachment = network.set_up(&slow).await.unwrap();
        let guest = boot("guest-slow", open(&attachment).await);
        let amount = 2_000_000;
        // At 2 MB/s less a burst of 64 KiB: about a second each.
        let to_guest = transfer(None, Some(&guest), at(attachment.addresses[0], 90), amount);
        let from_guest = transfer(Some(&guest), None, at(ip("10.213.0.1"), 91), amount);
        for elapsed in [to_guest, from_guest] {
            assert!(elapsed > Duration::from_millis(700) && elapsed < Duration::from_secs(5), "{elapsed:?}");
        }
        network.tear_down(&slow).await.unwrap();
        run("ip netns del guest-slow");
    });
}

/// How long it takes to send so many bytes.
fn transfer(from: Option<&Path>, to: Option<&Path>, address: SocketAddr, amount: usize) -> Duration {
    let listen =
        || std::net::TcpListener::bind(SocketAddr::new("0.0.0.0".parse().unwrap(), address.port())).unwrap();
    let listener = to.map_or_else(listen, |namespace| inside(namespace, listen));
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    let connect = || TcpStream::connect(address).unwrap();
    let mut stream = from.map_or_else(connect, |namespace| inside(namespace, connect));
    let start = Instant::now();
    stream.write_all(&vec![7; amount]).unwrap();
    drop(stream);
    assert_eq!(reader.join().unwrap(), amount);
    start.elapsed()
}

/// The plugins' links need some seconds for IPv6, with or without guests.
fn ask_until_answered(namespace: Option<&Path>, address: SocketAddr) -> IpAddr {
    let start = Instant::now();
    loop {
        match ask(namespace, address) {
            Ok(seen) => return seen,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(15), "{address}: {error}"),
        }
    }
}

fn write_plugin_network(machine: &Machine, plugin: &str, extra: Value) {
    let mut network = json!({
        "cniVersion": "1.0.0", "name": format!("{plugin}net"), "type": plugin, "ipMasq": true,
        "ipam": {
            "type": "host-local", "dataDir": machine.path("ipam"),
            "ranges": [[{ "subnet": "10.88.5.0/24" }], [{ "subnet": "fd00:88::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    });
    network.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    fs::create_dir_all(machine.path("net.d")).unwrap();
    fs::write(machine.path("net.d/10-net.conf"), network.to_string()).unwrap();
}

#[test]
fn a_guest_is_a_pod_of_debians_plugins_like_any_other() {
    on_own_machine("a_guest_is_a_pod_of_debians_plugins_like_any_other", |machine| async move {
        run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        for (plugin, extra) in [
            ("bridge", json!({ "bridge": "cni0", "isGateway": true, "hairpinMode": true })),
            ("ptp", json!({ "mtu": 1450 })),
        ] {
            write_plugin_network(&machine, plugin, extra);
            let network = machine.open().await;
            let [a, b] = ["a", "b"].map(|id| pod(&format!("{plugin}-{id}")));
            let (of_a, of_b) = (network.set_up(&a).await.unwrap(), network.set_up(&b).await.unwrap());
            let link = open(&of_a).await;
            assert_eq!(link.mtu, if plugin == "ptp" { 1450 } else { 1500 });
            let (guest_a, guest_b) = (
                boot(&format!("guest-{plugin}-a"), link),
                boot(&format!("guest-{plugin}-b"), open(&of_b).await),
            );
            serve(Some(&guest_a), "[::]:80");
            for version in [0, 1] {
                assert_eq!(
                    ask_until_answered(Some(&guest_b), at(of_a.addresses[version], 80)),
                    of_b.addresses[version]
                );
                ask_until_answered(None, at(of_a.addresses[version], 80));
            }
            if plugin == "bridge" {
                network.check(&a).await.unwrap();
            }
            for pod in [&a, &b] {
                network.tear_down(pod).await.unwrap();
            }
            run(&format!("ip netns del guest-{plugin}-a; ip netns del guest-{plugin}-b"));
        }
    });
}

#[test]
fn permanent_neighbours_and_odd_routes_reach_the_guest() {
    on_own_machine("permanent_neighbours_and_odd_routes_reach_the_guest", |machine| async move {
        let network = machine.open().await;
        let attachment = network.set_up(&pod("odd")).await.unwrap();
        // As Calico and Cilium have it.
        run("ip -n hull-odd route del default
             ip -n hull-odd route add 169.254.1.1 dev eth0 scope link
             ip -n hull-odd route add default via 169.254.1.1 dev eth0 onlink
             ip -n hull-odd route add 192.0.2.0/24 via 169.254.1.1 dev eth0 metric 50
             ip -n hull-odd route add blackhole 203.0.113.0/24
             ip -n hull-odd route add 198.51.100.0/24 dev eth0 table 77
             ip -n hull-odd neighbour replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent
             ip -n hull-odd neighbour replace 10.213.0.9 lladdr 02:00:00:00:00:01 dev eth0 nud reachable");
        let link = open(&attachment).await;
        assert_eq!(link.neighbours.len(), 1);
        assert_eq!((link.neighbours[0].address, link.neighbours[0].mac), (ip("169.254.1.1"), [0xee; 6]));
        let of = |destination: &str| {
            let wanted: ipnet::IpNet = destination.parse().unwrap();
            link.routes.iter().filter(move |route| route.destination == wanted).cloned().collect::<Vec<_>>()
        };
        assert_eq!(of("169.254.1.1/32"), [direct("169.254.1.1/32", "")]);
        let default = &of("0.0.0.0/0")[0];
        assert_eq!((default.gateway, default.onlink), (Some(ip("169.254.1.1")), true));
        assert_eq!(of("192.0.2.0/24")[0].metric, 50);
        assert!(of("203.0.113.0/24").is_empty() && of("198.51.100.0/24").is_empty());
        network.tear_down(&pod("odd")).await.unwrap();
    });
}

#[test]
fn a_network_that_a_guest_cannot_have_is_refused_by_name() {
    on_own_machine("a_network_that_a_guest_cannot_have_is_refused_by_name", |machine| async move {
        let network = machine.open().await;
        let attachment = network.set_up(&pod("a")).await.unwrap();
        let refusal = |name: &'static str| {
            let pin = attachment.namespace.clone();
            async move {
                let work = move || open_guest_link(&pin, name);
                tokio::task::spawn_blocking(work).await.unwrap().unwrap_err().to_string()
            }
        };
        assert!(refusal("eth7").await.contains("eth0"));
        run("ip -n hull-a link add net1 type bridge; ip -n hull-a link set net1 up");
        let error = refusal("eth0").await;
        assert!(error.contains("beside eth0 there is net1"), "{error}");
        run("ip -n hull-a link set net1 down; ip -n hull-a link set eth0 down");
        assert!(refusal("eth0").await.contains("is down"));
        assert!(open_guest_link(Path::new("/dev/null"), "eth0").is_err());
        network.tear_down(&pod("a")).await.unwrap();
    });
}

#[test]
fn a_second_tap_takes_the_place_of_one_that_was_lost_and_nothing_is_left_in_the_end() {
    on_own_machine(
        "a_second_tap_takes_the_place_of_one_that_was_lost_and_nothing_is_left_in_the_end",
        |machine| async move {
            let network = machine.open().await;
            let before = host_state();
            let attachment = network.set_up(&pod("a")).await.unwrap();
            drop(open(&attachment).await);
            // Somebody's clsact in the place of the ingress discipline serves as well.
            run(
                "ip netns exec hull-a tc qdisc del dev eth0 ingress; ip netns exec hull-a tc qdisc add dev eth0 clsact",
            );
            drop(open(&attachment).await);
            let link = open(&attachment).await;
            assert!(open_guest_link(&attachment.namespace, "eth0").is_err(), "the tap is in use");
            let filters = run_for_output("ip netns exec hull-a tc filter show dev eth0 ingress");
            assert_eq!(filters.matches("mirred").count(), 1, "{filters}");
            let guest = boot("guest-a", link);
            serve(Some(&guest), "0.0.0.0:80");
            ask(None, at(attachment.addresses[0], 80)).unwrap();
            network.tear_down(&pod("a")).await.unwrap();
            run("ip netns del guest-a");
            expect_host_state(&before).await;
        },
    );
}

#[test]
fn a_tap_can_be_read_as_the_machine_does() {
    on_own_machine("a_tap_can_be_read_as_the_machine_does", |machine| async move {
        let network = machine.open().await;
        let attachment =
            network.set_up(&PodNetwork { id: "a".into(), ..PodNetwork::default() }).await.unwrap();
        let link = open(&attachment).await;
        // The host asks for the guest's MAC: that is the first frame.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"x", at(attachment.addresses[0], 9)).unwrap();
        let mut tap = File::from(link.tap.as_fd().try_clone_to_owned().unwrap());
        let start = Instant::now();
        let mut frame = [0; 2000];
        loop {
            if let Ok(length) = tap.read(&mut frame)
                && frame[10..][..length - 10].get(12..14) == Some(&[8, 6])
            {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        network.tear_down(&pod("a")).await.unwrap();
    });
}
