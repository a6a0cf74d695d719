//! A machine for each test: the test runs again in a process with a network and a mount namespace of its own, so that
//! its bridge, rules and sysctls are never the real machine's.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_network::{Mode, Network, NetworkConfig, PodNetwork, PortMapping, Protocol};

const INSIDE: &str = "HULL_NETWORK_TEST_INSIDE";

/// Runs `test` inside a machine of its own. `name` is the test function's.
pub(crate) fn on_own_machine<F: Future<Output = ()>>(name: &str, test: impl FnOnce(Machine) -> F) {
    if std::env::var_os(INSIDE).is_none() {
        let output = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("1 passed"), "{text}");
        print!("{text}");
        return;
    }
    run("mount -t tmpfs tmpfs /run && mount --make-shared /run && ip link set lo up");
    let machine = Machine { directory: tempfile::tempdir().unwrap() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test(machine));
}

/// The machine inside.
pub(crate) struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn config(&self) -> NetworkConfig {
        NetworkConfig {
            mode: Mode::Auto,
            state: self.path("state"),
            data: self.path("data"),
            netns_dir: "/run/netns".into(),
            bridge: "hull0".into(),
            subnets: vec![],
            mtu: None,
            linger: Duration::from_millis(150),
            cni_conf_dir: self.path("net.d"),
            cni_bin_dirs: vec![self.path("bin"), "/usr/lib/cni".into()],
        }
    }

    pub(crate) async fn open(&self) -> Arc<Network> {
        Network::open(self.config()).await.unwrap()
    }

    /// Another machine, reached over `wan0`: 198.51.100.2 and 2001:db8::2 there, .1 and ::1 here.
    pub(crate) fn add_outside(&self) -> PathBuf {
        run("ip netns add outside
             ip link add wan0 mtu 1400 type veth peer name eth0 mtu 1400 netns outside
             ip address add 198.51.100.1/24 dev wan0
             ip address add 2001:db8::1/64 dev wan0 nodad
             ip link set wan0 up
             ip -n outside address add 198.51.100.2/24 dev eth0
             ip -n outside address add 2001:db8::2/64 dev eth0 nodad
             ip -n outside link set eth0 up
             ip route add default via 198.51.100.2
             # A link that is up drops what it is given until the kernel has seen its carrier, some time later.
             up() { ip \"$@\" | grep -q 'state UP'; }
             for _ in $(seq 1000); do
               up -o link show wan0 && up -n outside -o link show eth0 && exit
               sleep 0.01
             done
             echo 'the links have no carrier' >&2; exit 1");
        "/run/netns/outside".into()
    }
}

/// Everything on the machine that a pod's network could leave behind. Not whether a link has a carrier: the kernel sees that
/// some time after a port has come.
pub(crate) fn host_state() -> String {
    let mut state = run_for_output(
        "ip -o link | sed 's/^[0-9]*: //; s/@.*//; s/,LOWER_UP//; s/NO-CARRIER,//; s/ state [A-Z]* / /'; \
         ip -o address | awk '{print $2, $4}'; nft list ruleset; \
         ls /run/netns 2>/dev/null | grep -v '^outside$'; cut -d' ' -f5 /proc/self/mountinfo | sort; \
         ip route; ip -6 route | grep -v '^fe80'",
    );
    state.retain(|c| c != '\t');
    state
}

/// How much longer things may take on an emulated machine (hack/node).
pub(crate) fn patience() -> u32 {
    let vendor = fs::read_to_string("/sys/class/dmi/id/sys_vendor").unwrap_or_default();
    if vendor.trim() == "QEMU" { 20 } else { 1 }
}

/// Waits until the machine looks like this again; one second is what the kernel may take.
pub(crate) async fn expect_host_state(wanted: &str) {
    let start = Instant::now();
    loop {
        let now = host_state();
        if now == wanted {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(1) * patience(),
            "left behind:\n{now}\nwanted:\n{wanted}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn run(script: &str) {
    run_for_output(script);
}

pub(crate) fn run_for_output(script: &str) -> String {
    let output = Command::new("bash").args(["-e", "-o", "pipefail", "-c", script]).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    // grep and ls in host_state may find nothing.
    assert!(output.status.success() || complaint.is_empty(), "{script}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn pod(id: &str) -> PodNetwork {
    PodNetwork {
        id: id.into(),
        name: format!("name-{id}"),
        namespace: "default".into(),
        uid: "uid".into(),
        ..PodNetwork::default()
    }
}

pub(crate) fn host_port(
    protocol: Protocol,
    host_port: u16,
    container_port: u16,
    host_ip: Option<&str>,
) -> PortMapping {
    PortMapping { protocol, container_port, host_port, host_ip: host_ip.map(|ip| ip.parse().unwrap()) }
}

/// Runs `f` in a pinned namespace.
pub(crate) fn inside<T: Send>(namespace: &Path, f: impl FnOnce() -> T + Send) -> T {
    let file = File::open(namespace).unwrap();
    hull_sys::namespace::on_thread_in(&[file.as_fd()], f).unwrap()
}

/// A TCP server in a namespace that tells each client which address it came from.
pub(crate) fn serve(namespace: Option<&Path>, address: &str) {
    let listen = || TcpListener::bind(address).unwrap();
    let listener = match namespace {
        Some(namespace) => inside(namespace, listen),
        None => listen(),
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(plain(peer).to_string().as_bytes());
        }
    });
}

/// The same for UDP.
pub(crate) fn serve_udp(namespace: &Path, address: &str) {
    let socket = inside(namespace, || UdpSocket::bind(address).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(plain(peer.ip()).to_string().as_bytes(), peer);
        }
    });
}

fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Asks a server which address it sees.
pub(crate) fn ask(namespace: Option<&Path>, address: SocketAddr) -> io::Result<IpAddr> {
    let connect = || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        answer.parse().map_err(io::Error::other)
    };
    match namespace {
        Some(namespace) => inside(namespace, connect),
        None => connect(),
    }
}

pub(crate) fn ask_udp(namespace: Option<&Path>, address: SocketAddr) -> io::Result<IpAddr> {
    let exchange = || {
        let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0".parse() } else { "[::]:0".parse() }.unwrap();
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        socket.send_to(b"?", address)?;
        let mut buffer = [0; 100];
        let (length, _) = socket.recv_from(&mut buffer)?;
        String::from_utf8_lossy(&buffer[..length]).parse().map_err(io::Error::other)
    };
    match namespace {
        Some(namespace) => inside(namespace, exchange),
        None => exchange(),
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// An executable script.
pub(crate) fn script(path: &Path, body: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/bash\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
