use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use hull_sys::namespace::{Namespaces, unshare};
use hull_vmm::devices::legacy::PortEvent;
use hull_vmm::devices::virtio::net::{Net, NetHandle, Port};
use hull_vmm::devices::virtio::vsock::{Service, Vsock, VsockHandle};
use hull_vmm::devices::virtio::{VirtioDevice, Worker};
use hull_vmm::logs::{LOG_PORT, Logs, LogsHandle};
use hull_vmm::machine::{Core, CoreConfig, CoreFiles, Kernel};
use hull_vmm::memory::MachineMemory;
use hull_vmm::probe;
use hull_vmm::vcpu::{VcpuEvent, VcpuEvents};

/// A guest may be emulated as a whole.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// The guest's MAC.
pub(crate) const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x07];

/// A running machine with vsock, logs and a NIC.
pub(crate) struct Guest {
    core: Core,
    pub(crate) vsock: VsockHandle,
    pub(crate) logs: LogsHandle,
    pub(crate) net: NetHandle,
    events: Receiver<VcpuEvent>,
    console: File,
    directory: tempfile::TempDir,
    _logs: Logs,
}

impl Guest {
    /// `None` where there is no KVM that can.
    pub(crate) fn boot(cmdline: &str, tap: Option<OwnedFd>) -> Option<Self> {
        let program = guest_program();
        let kvm = kvm()?;
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock.sock")).unwrap();
        let worker = |name| Worker::start(name, || Ok(())).unwrap();
        let logs = Logs::start(&worker("logs")).unwrap();
        let service: Arc<dyn Service> = Arc::new(logs.handle());
        let services = BTreeMap::from([(LOG_PORT, service)]);
        let vsock = Vsock::new(worker("vsock"), listener.into(), services).unwrap();
        let net = Net::new(worker("net"), Port { tap, mac: MAC, mtu: 1500 }).unwrap();
        let (vsock_handle, net_handle) = (vsock.handle(), net.handle());
        let devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(vsock), Box::new(net)];

        let path = directory.path().join("console");
        let append = File::options().create(true).append(true).open(&path).unwrap();
        let (sender, events) = channel();
        let sink: VcpuEvents = Arc::new(move |event| drop(sender.send(event)));
        let core = Core::boot(
            &CoreConfig { cpus: 1, cmdline_extra: cmdline.to_owned() },
            CoreFiles { kvm, console: append.into() },
            MachineMemory::new(256 << 20, 256 << 20).unwrap(),
            Kernel { kernel: File::open(kernel()).unwrap(), initramfs: initramfs(&program) },
            devices,
            &sink,
            || Ok(()),
        )
        .unwrap();
        let console = File::open(&path).unwrap();
        let mut guest = Self {
            core,
            vsock: vsock_handle,
            logs: logs.handle(),
            net: net_handle,
            events,
            console,
            directory,
            _logs: logs,
        };
        guest.core.resume().unwrap();
        Some(guest)
    }

    pub(crate) fn console(&mut self) -> String {
        let mut bytes = Vec::new();
        self.console.seek(SeekFrom::Start(0)).unwrap();
        self.console.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.console().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} on the console:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn wait_for_streams(&self, wanted: u64) {
        let start = Instant::now();
        while self.vsock.metrics().streams != wanted {
            assert!(start.elapsed() < PATIENCE, "{:?}", self.vsock.metrics());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A stream to the guest's port.
    pub(crate) fn open(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub(crate) fn power_off(mut self) {
        self.open().write_all(&wish(b'o', 0, 0)).unwrap();
        match self.events.recv_timeout(PATIENCE) {
            Ok(VcpuEvent::Port(PortEvent::PowerOff)) => {}
            other => panic!("{other:?}\n{}", self.console()),
        }
        self.core.end();
    }
}

/// What a stream begins with: see guest.rs.
pub(crate) fn wish(kind: u8, amount: u64, seed: u64) -> Vec<u8> {
    [&[kind][..], &amount.to_le_bytes(), &seed.to_le_bytes()].concat()
}

/// The bytes of a stream, from one of them on. The guest makes the same.
pub(crate) fn pattern(seed: u64, from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let mixed = (at as u64).wrapping_mul(0x9e37_79b9).wrapping_add(seed.wrapping_mul(0x85eb_ca6b));
        mixed.rotate_left(17) as u8
    };
    (from..from + length).map(byte).collect()
}

/// Runs a test on a thread with a network namespace of its own.
pub(crate) fn on_own_network(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(Namespaces::NET).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn run(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
}

fn kernel() -> PathBuf {
    std::env::var_os("HULL_GUEST_KERNEL").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target-guest/vmlinux")),
        Into::into,
    )
}

fn kvm() -> Option<OwnedFd> {
    match probe::open().and_then(|kvm| probe::probe(kvm.as_fd(), probe::LIMIT).map(|()| kvm)) {
        Ok(kvm) => Some(kvm),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// The guest's program: compiled if it is older than its source.
fn guest_program() -> PathBuf {
    static ONCE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = ONCE.lock();
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/streams/guest.rs"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("streams-guest");
    let age = |path: &Path| path.metadata().and_then(|facts| facts.modified()).ok();
    if age(&program).is_none_or(|made| age(source).is_some_and(|written| written > made)) {
        let status = Command::new("rustc")
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"])
            .args(["-C", "panic=abort", "-o"])
            .args([&program, source])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "{} does not compile", source.display());
    }
    program
}

/// A cpio archive ("newc") with the program as init, and busybox.
fn initramfs(program: &Path) -> File {
    let mut archive = tempfile::tempfile().unwrap();
    let mut entry = |name: &str, mode: u32, content: &[u8], (major, minor): (u32, u32)| {
        let fields =
            [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        let mut bytes = b"070701".to_vec();
        fields.iter().for_each(|field| bytes.extend(format!("{field:08x}").bytes()));
        bytes.extend(name.bytes().chain([0]));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        archive.write_all(&bytes).unwrap();
    };
    for directory in ["bin", "dev", "proc", "sys"] {
        entry(directory, 0o40755, b"", (0, 0));
    }
    entry("dev/console", 0o20600, b"", (5, 1));
    entry("bin/busybox", 0o100755, &std::fs::read("/bin/busybox").unwrap(), (0, 0));
    entry("bin/ip", 0o120777, b"busybox", (0, 0));
    entry("init", 0o100755, &std::fs::read(program).unwrap(), (0, 0));
    entry("TRAILER!!!", 0, b"", (0, 0));
    archive.seek(SeekFrom::Start(0)).unwrap();
    archive
}
