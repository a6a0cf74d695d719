//! Volumes of the host in a real guest: hull-vmm and hull-virtiofsd as hulld starts them. Where /dev/kvm cannot run a
//! kernel, it says so and does nothing; `hack/node` has one that can.
#![cfg(feature = "virtiofs")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, dead_code)]

mod busybox;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_vmm::attach::Server;
use hull_vmm::protocol::BlockingConnection;
use hull_vmm::protocol::messages::{
    self, Boot, BootVolumes, Jail, Message, Response, ServeVolumes, message::Body, request::Call,
    response::Outcome,
};

/// A guest may be emulated as a whole.
const PATIENCE: Duration = Duration::from_secs(120);
const IDS: u32 = 1_879_048_192 + 98 * 65_536;

/// The program that is shipped, if the environment names it, or that of this build.
fn program(shipped: &str, built: &str) -> String {
    std::env::var(shipped).unwrap_or_else(|_| built.to_owned())
}

struct Process {
    connection: BlockingConnection,
    pid: i32,
    id: u64,
}

impl Process {
    fn start(program: &str, boot: Call, fds: &[OwnedFd]) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut first = Command::new(program)
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut process = Self { connection: BlockingConnection::new(ours.into()), pid: 0, id: 0 };
        match process.call(boot, fds) {
            Outcome::Booted(booted) => process.pid = booted.pid,
            other => panic!("{program}: {other:?}"),
        }
        assert!(first.wait().unwrap().success());
        process
    }

    fn call(&mut self, call: Call, fds: &[OwnedFd]) -> Outcome {
        self.id += 1;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send(&Message::request(self.id, call, fds.len()), &fds).unwrap();
        loop {
            let message = self.connection.recv().unwrap().expect("an answer").message;
            match message.body {
                Some(Body::Response(Response { outcome: Some(outcome) })) => return outcome,
                Some(Body::Event(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = hull_sys::process::kill(self.pid, libc::SIGKILL);
    }
}

fn start_machine(directory: &Path, kvm: OwnedFd) -> Process {
    let path = |name: &str| directory.join(name);
    let (mut archive, mut initramfs) = (busybox::initramfs(), File::create(path("initramfs")).unwrap());
    std::io::Seek::rewind(&mut archive).unwrap();
    std::io::copy(&mut archive, &mut initramfs).unwrap();
    let fds: Vec<OwnedFd> = vec![
        kvm,
        File::open(busybox::kernel()).unwrap().into(),
        File::open(path("initramfs")).unwrap().into(),
        File::options().read(true).write(true).create_new(true).open(path("scratch")).unwrap().into(),
        UnixListener::bind(path("vsock")).unwrap().into(),
        UnixListener::bind(path("control")).unwrap().into(),
        File::options().append(true).create_new(true).open(path("console")).unwrap().into(),
    ];
    let machine = messages::Machine {
        id: "test".into(),
        cpus: 1,
        memory: 128 << 20,
        memory_max: 128 << 20,
        scratch_capacity: 1 << 30,
        cmdline_extra: "test.volumes".into(),
        ..messages::Machine::default()
    };
    let jail = Jail { uid_base: IDS, gid_base: IDS, ids: 65_536, ..Jail::default() };
    let boot = Boot::in_order(machine, jail);
    Process::start(&program("HULL_VMM", env!("CARGO_BIN_EXE_hull-vmm")), Call::Boot(boot), &fds)
}

fn wait_for(console: &Path, text: &str) {
    let start = Instant::now();
    let read = || String::from_utf8_lossy(&fs::read(console).unwrap()).into_owned();
    while !read().contains(text) {
        assert!(start.elapsed() < PATIENCE, "no {text:?} on the console:\n{}", read());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_host_directory_written_by_uids_0_1000_and_70000_shows_these_very_uids() {
    let Some(kvm) = busybox::kvm() else { return };
    let temporary = tempfile::tempdir().unwrap();
    let (machine_directory, shared) = (temporary.path().join("machine"), temporary.path().join("shared"));
    fs::create_dir(&machine_directory).unwrap();
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, PermissionsExt::from_mode(0o777)).unwrap();
    fs::write(temporary.path().join("single"), "a file as a volume").unwrap();
    let mut machine = start_machine(&machine_directory, kvm);
    let console = machine_directory.join("console");
    wait_for(&console, "test: init");

    // The first volume comes when the guest waits for it already.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let users: OwnedFd = File::open(format!("/proc/{}/ns/user", machine.pid)).unwrap().into();
    let boot = BootVolumes { jail: Some(Jail::default()), user_namespace: 0, vmm: 1, open_files: 0 };
    let program = &program("HULL_VIRTIOFSD", env!("CARGO_BIN_EXE_hull-virtiofsd"));
    let files = Process::start(program, Call::BootVolumes(boot), &[users, theirs.into()]);
    let served = machine.call(Call::ServeVolumes(ServeVolumes { server: 0 }), &[ours.into()]);
    assert!(matches!(served, Outcome::Done(_)), "{served:?}");
    wait_for(&console, "test: mounted");
    let server = Server::of(files.pid).unwrap();
    let attach = |index: u32, path: &Path, readonly: bool| {
        let place = File::open(path).unwrap();
        server.attach(index, path, place.as_fd(), readonly).unwrap();
    };
    attach(1, &shared, true);
    attach(2, &temporary.path().join("single"), false);
    attach(0, &shared, false);
    // A change on the host, seen in the guest.
    fs::write(shared.join("go"), "").unwrap();

    wait_for(&console, "test: volumes done");
    for user in [0, 1000, 70_000] {
        let made = fs::metadata(shared.join(format!("by-{user}"))).unwrap();
        assert_eq!((made.uid(), made.gid()), (user, user), "on the host");
        wait_for(&console, &format!("test: {user} {user}"));
        assert_eq!(fs::read_to_string(shared.join(format!("by-{user}"))).unwrap(), format!("of {user}\n"));
    }
    wait_for(&console, "test: read-only");
    wait_for(&console, "test: a file as a volume");
}
