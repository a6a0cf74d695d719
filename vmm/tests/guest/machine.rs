//! A machine of hull-vmm, with the disks that a test needs.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use hull_agent::protocol::messages::{Hello, Range, hello};
use hull_vmm::attach::Server;
use hull_vmm::probe;
use hull_vmm::protocol::messages::{
    AddExtent, Boot, BootVolumes, Event, FillSlot, Jail, Message, Response, ServeVolumes, SetLog, event,
    message::Body, request::Call, response::Outcome,
};
use hull_vmm::protocol::{BlockingConnection, messages};
use prost::Message as _;
use tempfile::TempDir;

use crate::PATIENCE;
use crate::agent::Agent;
use crate::disk;

const SCRATCH_CAPACITY: u64 = 4 << 30;
const SCRATCH_SIZE: u64 = 64 << 20;

/// A running machine; dropped, it is killed.
pub(crate) struct Machine {
    child: Child,
    control: BlockingConnection,
    next_id: u64,
    events: VecDeque<event::Kind>,
    scratch: File,
    scratches: u64,
    streams: u64,
    /// The jailed process.
    pid: i32,
    servers: Vec<Child>,
    /// The last jailed hull-virtiofsd.
    pub(crate) server_pid: i32,
    pub(crate) directory: TempDir,
}

/// /dev/kvm, if it can, and if there is something to boot.
fn kvm() -> Option<OwnedFd> {
    if !guest("vmlinux").exists() || !guest("initramfs.cpio").exists() {
        eprintln!("skipped: target-guest is not built");
        return None;
    }
    match probe::open().and_then(|kvm| probe::probe(kvm.as_fd(), probe::LIMIT).map(|()| kvm)) {
        Ok(kvm) => Some(kvm),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// What `hack/build guest` makes.
pub(crate) fn guest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target-guest").join(name)
}

impl Machine {
    /// Boots one; `None` where that cannot be.
    pub(crate) fn boot(cpus: u32, memory: u64) -> Option<Self> {
        let kvm = kvm()?;
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let scratch = File::options().read(true).write(true).create_new(true).open(path("scratch")).unwrap();
        scratch.set_len(SCRATCH_CAPACITY).unwrap();
        let console = File::options().append(true).create_new(true).open(path("console")).unwrap();
        let files: Vec<OwnedFd> = vec![
            kvm,
            File::open(guest("vmlinux")).unwrap().into(),
            File::open(guest("initramfs.cpio")).unwrap().into(),
            scratch.try_clone().unwrap().into(),
            UnixListener::bind(path("vsock.sock")).unwrap().into(),
            UnixListener::bind(path("control.sock")).unwrap().into(),
            console.into(),
        ];
        let (ours, theirs) = UnixStream::pair().unwrap();
        let program = std::env::var_os("HULL_VMM").unwrap_or_else(|| env!("CARGO_BIN_EXE_hull-vmm").into());
        let child = Command::new(program)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(File::create(path("vmm.log")).unwrap())
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut machine = Self {
            child,
            control: BlockingConnection::new(ours.into()),
            next_id: 1,
            events: VecDeque::new(),
            scratch,
            scratches: 0,
            streams: 0,
            pid: 0,
            servers: Vec::new(),
            server_pid: 0,
            directory,
        };
        let born = messages::Machine {
            id: "test".into(),
            cpus,
            memory,
            memory_max: memory,
            scratch_capacity: SCRATCH_CAPACITY,
            block_slots: 2,
            cmdline_extra: std::env::var("HULL_BENCH_CMDLINE").unwrap_or_default(),
            ..messages::Machine::default()
        };
        let jail = Jail { uid_base: 1_879_048_192, gid_base: 1_879_048_192, ids: 65_536, ..Jail::default() };
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        match machine.call(Call::Boot(Boot::in_order(born, jail)), &fds) {
            Outcome::Booted(booted) => {
                machine.pid = booted.pid;
                Some(machine)
            }
            other => panic!("{other:?}\n{}", machine.told()),
        }
    }

    /// The jailed process.
    pub(crate) const fn pid(&self) -> i32 {
        self.pid
    }

    /// A request with these descriptors, and its answer.
    pub(crate) fn call(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Outcome {
        let id = self.next_id;
        self.next_id += 1;
        self.control.send(&Message::request(id, call, fds.len()), fds).unwrap();
        loop {
            match self.receive() {
                Some((number, outcome)) if number == id => return outcome,
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }
    }

    fn receive(&mut self) -> Option<(u64, Outcome)> {
        let frame = match self.control.recv() {
            Ok(Some(frame)) => frame,
            other => panic!("{other:?}\n{}", self.told()),
        };
        match frame.message.body {
            Some(Body::Response(Response { outcome: Some(outcome) })) => Some((frame.message.id, outcome)),
            Some(Body::Event(Event { kind: Some(kind) })) => {
                self.events.push_back(kind);
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> event::Kind {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            assert!(self.receive().is_none(), "an answer that nobody asked for");
        }
    }

    /// When the agent started and when it listened, in microseconds since the VMM's first process.
    pub(crate) fn started(&mut self) -> (u64, u64) {
        let (mut first, mut second) = (None, None);
        while second.is_none() {
            match self.event() {
                event::Kind::AgentStarted(event) => first = Some(event.micros),
                event::Kind::AgentListening(event) => second = Some(event.micros),
                other => panic!("{other:?}\n{}", self.told()),
            }
        }
        (first.unwrap(), second.unwrap())
    }

    /// A control connection to the agent, once it listens.
    pub(crate) fn agent(&mut self) -> Agent {
        let start = Instant::now();
        loop {
            let mut agent = Agent::new(self.connect(hello::Kind::Control(hello::Control {})));
            if agent.answers() {
                return agent;
            }
            assert!(start.elapsed() < PATIENCE, "the agent does not answer");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// A new stream and its number.
    pub(crate) fn stream(&mut self) -> (u64, UnixStream) {
        self.streams += 1;
        let number = self.streams << 32 | 7;
        (number, self.connect(hello::Kind::Stream(number)))
    }

    /// A stream with this number.
    pub(crate) fn stream_called(&mut self, number: u64) -> UnixStream {
        self.connect(hello::Kind::Stream(number))
    }

    fn connect(&self, kind: hello::Kind) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = Hello { kind: Some(kind) }.encode_to_vec();
        // Nobody listens yet: whoever uses the stream finds out.
        let _ = stream.write_all(&[&(body.len() as u32).to_le_bytes(), &*body].concat());
        stream
    }

    /// The image of a directory tree, on the images disk.
    pub(crate) fn image(&mut self, tree: &Path) -> Range {
        let name = format!("image-{}", tree.file_name().unwrap().to_string_lossy());
        let file = disk::erofs(tree, &self.directory.path().join(&name));
        let length = file.metadata().unwrap().len();
        let extent = self.call(Call::AddExtent(AddExtent { key: name, length, file: 0 }), &[file.as_fd()]);
        let Outcome::Extent(extent) = extent else { panic!("{extent:?}") };
        Range { offset: extent.offset, length: extent.length }
    }

    /// A new filesystem on the scratch disk.
    pub(crate) fn scratch(&mut self) -> Range {
        let range = Range { offset: self.scratches * SCRATCH_SIZE, length: SCRATCH_SIZE };
        self.scratches += 1;
        disk::ext4(&self.scratch, &range);
        let open = messages::OpenScratch { offset: range.offset, length: range.length };
        let answer = self.call(Call::OpenScratch(open), &[]);
        assert!(matches!(answer, Outcome::Done(_)), "{answer:?}");
        range
    }

    /// Bytes of the scratch disk that are used on the host.
    pub(crate) fn scratch_used(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.scratch.metadata().unwrap().blocks() * 512
    }

    /// Where the log of a container goes from now on.
    pub(crate) fn log(&mut self, container: &str) -> PathBuf {
        let path = self.directory.path().join(format!("log-{container}"));
        let file = File::options().append(true).create(true).open(&path).unwrap();
        let call = Call::SetLog(SetLog { container_id: container.into(), file: 0 });
        let answer = self.call(call, &[file.as_fd()]);
        assert!(matches!(answer, Outcome::Done(_)), "{answer:?}");
        path
    }

    /// Puts a file behind a block slot.
    pub(crate) fn fill_slot(&mut self, slot: u32, content: &[u8]) {
        let path = self.directory.path().join(format!("slot-{slot}"));
        fs::write(&path, content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let call = Call::FillSlot(FillSlot { slot, readonly: false, file: 0 });
        let answer = self.call(call, &[file.as_fd()]);
        assert!(matches!(answer, Outcome::Done(_)), "{answer:?}");
    }

    /// Starts a hull-virtiofsd for the machine.
    pub(crate) fn serve_volumes(&mut self) -> Server {
        let program =
            std::env::var_os("HULL_VIRTIOFSD").unwrap_or_else(|| env!("CARGO_BIN_EXE_hull-virtiofsd").into());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (for_machine, for_server) = UnixStream::pair().unwrap();
        let log = File::create(self.directory.path().join("virtiofsd.log")).unwrap();
        let child = Command::new(program).stdin(OwnedFd::from(theirs)).stderr(log).spawn().unwrap();
        self.servers.push(child);
        let namespace = File::open(format!("/proc/{}/ns/user", self.pid)).unwrap();
        let boot = BootVolumes {
            jail: Some(Jail { nofile: 8192, ..Jail::default() }),
            user_namespace: 0,
            vmm: 1,
            ..BootVolumes::default()
        };
        let mut control = BlockingConnection::new(ours.into());
        let fds = [namespace.as_fd(), for_server.as_fd()];
        control.send(&Message::request(1, Call::BootVolumes(boot), fds.len()), &fds).unwrap();
        let answer = control.recv().unwrap().unwrap().message.body;
        let Some(Body::Response(Response { outcome: Some(Outcome::Booted(booted)) })) = answer else {
            panic!("{answer:?}")
        };
        let served = self.call(Call::ServeVolumes(ServeVolumes { server: 0 }), &[for_machine.as_fd()]);
        assert!(matches!(served, Outcome::Done(_)), "{served:?}");
        self.server_pid = booted.pid;
        Server::of(booted.pid).unwrap()
    }

    /// What the VMM and the guest's console said.
    pub(crate) fn told(&self) -> String {
        let read = |name: &str| {
            let bytes = fs::read(self.directory.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        format!("events: {:?}\nvmm.log:\n{}\nconsole:\n{}", self.events, read("vmm.log"), read("console"))
    }

    /// Waits for the reason of the machine's end.
    pub(crate) fn ended(mut self) -> String {
        loop {
            if let event::Kind::ShutDown(end) = self.event() {
                return end.reason;
            }
        }
    }

    /// Waits for the first process, which ends when the machine has been born.
    pub(crate) fn first_process(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = rustix::net::sockopt::set_socket_timeout(
                &self.control,
                rustix::net::sockopt::Timeout::Recv,
                Some(std::time::Duration::from_millis(500)),
            );
            while let Ok(Some(frame)) = self.control.recv() {
                eprintln!("{:?}", frame.message);
            }
            eprintln!("{}", self.told());
        }
        let stop = Message::request(self.next_id, Call::Stop(messages::Stop {}), 0);
        let _ = self.control.send(&stop, &[]);
        let _ = self.child.wait();
        for server in &mut self.servers {
            // The server itself ends with the machine; this is the process that cloned it.
            let _ = server.wait();
        }
    }
}
