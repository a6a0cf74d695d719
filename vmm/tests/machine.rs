//! hull-vmm itself, started as hulld starts it: all devices, the jail, the control connection. Where /dev/kvm cannot run a
//! kernel, it says so and does nothing; `hack/node` has one that can.
#![cfg(feature = "machine")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod busybox;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hull_vmm::protocol::messages::{
    Boot, GetMetrics, GetStatus, Jail, Message, Pause, ResizeMemory, Response, Resume, Save, Status, Stop,
    event, message::Body, request::Call, response::Outcome,
};
use hull_vmm::protocol::{BlockingConnection, messages};

/// A guest may be emulated as a whole.
const PATIENCE: Duration = Duration::from_secs(120);
const IDS: u32 = 1_879_048_192 + 99 * 65_536;

/// HULL_VMM, the program that is shipped, or that of this build.
fn program() -> PathBuf {
    std::env::var_os("HULL_VMM").map_or_else(|| env!("CARGO_BIN_EXE_hull-vmm").into(), Into::into)
}

struct Vmm {
    first: Child,
    connection: BlockingConnection,
    pid: i32,
    id: u64,
    events: VecDeque<event::Kind>,
    directory: tempfile::TempDir,
}

impl Vmm {
    fn start(cpus: u32, memory: u64, cmdline: &str) -> Option<Self> {
        let kvm = busybox::kvm()?;
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let scratch = File::options().read(true).write(true).create_new(true).open(path("scratch")).unwrap();
        let console = File::options().append(true).create_new(true).open(path("console")).unwrap();
        fs::write(path("initramfs"), {
            use std::io::{Read, Seek};
            let mut bytes = Vec::new();
            let mut archive = busybox::initramfs();
            archive.rewind().unwrap();
            archive.read_to_end(&mut bytes).unwrap();
            bytes
        })
        .unwrap();
        let fds: Vec<OwnedFd> = vec![
            kvm,
            File::open(busybox::kernel()).unwrap().into(),
            File::open(path("initramfs")).unwrap().into(),
            scratch.into(),
            UnixListener::bind(path("vsock")).unwrap().into(),
            UnixListener::bind(path("control")).unwrap().into(),
            console.into(),
        ];
        let machine = messages::Machine {
            id: "test".into(),
            cpus,
            memory,
            memory_max: memory + (1 << 30),
            scratch_capacity: 1 << 30,
            block_slots: 8,
            cmdline_extra: cmdline.into(),
            ..messages::Machine::default()
        };
        let jail = Jail { uid_base: IDS, gid_base: IDS, ids: 65_536, ..Jail::default() };
        let boot = Boot::in_order(machine, jail);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let first = Command::new(program())
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let connection = BlockingConnection::new(ours.into());
        let mut vmm = Self { first, connection, pid: 0, id: 0, events: VecDeque::new(), directory };
        let start = Instant::now();
        match vmm.call_with(Call::Boot(boot), &fds) {
            Outcome::Booted(booted) => vmm.pid = booted.pid,
            other => panic!("{other:?}"),
        }
        eprintln!("booted after {:?}", start.elapsed());
        assert!(vmm.first.wait().unwrap().success());
        Some(vmm)
    }

    fn call_with(&mut self, call: Call, fds: &[OwnedFd]) -> Outcome {
        self.id += 1;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send(&Message::request(self.id, call, fds.len()), &fds).unwrap();
        loop {
            match self.receive() {
                Some(Body::Response(Response { outcome: Some(outcome) })) => return outcome,
                Some(Body::Event(event)) => self.events.extend(event.kind),
                other => panic!("{other:?}; the console:\n{}", self.console()),
            }
        }
    }

    fn call(&mut self, call: Call) -> Outcome {
        self.call_with(call, &[])
    }

    fn receive(&mut self) -> Option<Body> {
        self.connection
            .recv()
            .unwrap_or_else(|e| panic!("{e}; the console:\n{}", self.console()))?
            .message
            .body
    }

    fn event(&mut self) -> Option<event::Kind> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        match self.receive()? {
            Body::Event(event) => event.kind,
            other => panic!("{other:?}"),
        }
    }

    fn status(&mut self) -> Status {
        match self.call(Call::Status(GetStatus {})) {
            Outcome::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join("console")).unwrap()).into_owned()
    }

    fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.console().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} on the console:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Processor time that its virtual processors have had, and that all its other threads have had.
    fn processor_time(&self) -> (Duration, Duration) {
        let (mut guest, mut devices) = Default::default();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap() {
            let read = |name| fs::read_to_string(task.as_ref().unwrap().path().join(name)).unwrap();
            let ran = read("schedstat").split_whitespace().next().unwrap().parse().unwrap();
            *(if read("comm").starts_with("vcpu") { &mut guest } else { &mut devices }) +=
                Duration::from_nanos(ran);
        }
        (guest, devices)
    }

    /// Bytes of its memory that no other process has and that are not the guest's.
    fn private_memory(&self) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.pid)).unwrap();
        let (mut guest, mut sum) = (false, 0);
        for line in smaps.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            if !first.ends_with(':') {
                guest = line.contains("memfd:hull-guest");
            } else if !guest && (first == "Private_Dirty:" || first == "Private_Clean:") {
                sum += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
            }
        }
        sum
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.pid > 0 {
            let _ = hull_sys::process::kill(self.pid, libc::SIGKILL);
        }
    }
}

#[test]
fn a_guest_finds_every_device_and_its_machine_does_as_it_is_told() {
    let Some(mut vmm) = Vmm::start(2, 256 << 20, "test.count") else { return };
    vmm.wait_for("test: count 1");

    let status = vmm.status();
    let slots = (0..8).map(|slot| format!("slot{slot}"));
    for device in ["vsock", "net", "images", "scratch", "volumes", "rng", "balloon", "mem"]
        .map(str::to_owned)
        .into_iter()
        .chain(slots)
    {
        assert!(status.activated.contains(&device), "{device}: {:?}\n{}", status.activated, vmm.console());
    }
    assert_eq!((status.memory_requested, status.memory_plugged), (256 << 20, 256 << 20));
    let private = vmm.private_memory();
    eprintln!("the VMM has {} KiB of its own", private >> 10);

    assert!(matches!(vmm.call(Call::ResizeMemory(ResizeMemory { memory: 512 << 20 })), Outcome::Done(_)));
    let start = Instant::now();
    while vmm.status().memory_plugged < 512 << 20 {
        assert!(start.elapsed() < PATIENCE, "{:?}", vmm.status());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(matches!(vmm.call(Call::Pause(Pause {})), Outcome::Done(_)));
    assert!(vmm.status().paused);
    let before = vmm.console();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(vmm.console(), before);
    let state = File::create(vmm.directory.path().join("state")).unwrap();
    let saved = vmm.call_with(Call::Save(Save { file: 0 }), &[state.into()]);
    assert!(matches!(saved, Outcome::Done(_)), "{saved:?}");
    let saved: serde_json::Value =
        serde_json::from_slice(&fs::read(vmm.directory.path().join("state")).unwrap()).unwrap();
    assert_eq!(saved["devices"].as_array().unwrap().len(), status.activated.len());
    assert!(matches!(vmm.call(Call::Resume(Resume {})), Outcome::Done(_)));
    let next = before.lines().filter(|line| line.starts_with("test: count")).count() + 3;
    vmm.wait_for(&format!("test: count {next}"));
    let Outcome::Metrics(metrics) = vmm.call(Call::Metrics(GetMetrics {})) else { panic!("no metrics") };
    assert!(metrics.values["images_reads"] > 0, "the first process reads every disk: {metrics:?}");

    assert!(matches!(vmm.call(Call::Stop(Stop {})), Outcome::Done(_)));
    assert!(private < 4 << 20, "{private}");
}

#[test]
fn a_machine_that_has_nothing_to_do_costs_nothing() {
    let Some(mut vmm) = Vmm::start(2, 256 << 20, "test.idle") else { return };
    vmm.wait_for("test: idle");

    let spent: Vec<_> = (0..6)
        .map(|_| {
            let before = vmm.processor_time();
            std::thread::sleep(Duration::from_secs(2));
            let after = vmm.processor_time();
            (after.0 - before.0, after.1 - before.1)
        })
        .collect();

    eprintln!("idle, its processors and its other threads in 2 s: {spent:?}");
    assert!(spent.iter().map(|spent| spent.0).min().unwrap() < busybox::idle_cost(), "{spent:?}");
    assert!(spent.iter().map(|spent| spent.1).min().unwrap() < Duration::from_millis(2), "{spent:?}");
}

#[test]
fn a_panic_is_told_and_is_the_end() {
    let Some(mut vmm) = Vmm::start(1, 128 << 20, "test.panic") else { return };

    let mut told = Vec::new();
    while let Some(event) = vmm.event() {
        let last = matches!(event, event::Kind::ShutDown(_));
        told.push(event);
        if last {
            break;
        }
    }

    match told.as_slice() {
        [event::Kind::Panicked(panicked), event::Kind::ShutDown(end)] => {
            assert!(panicked.message.contains("Attempted to kill init"), "{panicked:?}");
            assert_eq!(end.reason, "the guest's kernel panicked");
        }
        other => panic!("{other:?}\n{}", vmm.console()),
    }
    assert!(vmm.receive().is_none(), "the process is gone");
}
