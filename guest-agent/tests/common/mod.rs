//! A pod for tests: the real agent, driven through the protocol as hulld drives it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hull_agent::cgroup::{self, Hierarchies, PodCgroup};
use hull_agent::protocol::BlockingConnection;
use hull_agent::protocol::messages::{
    CreateSandbox, Error, Event, Exec, ExecEnded, ExitRecord, Message, PidMode, Prepare, Process, Request,
    Response, Rootfs, Slot, StartContainer, State, StateReport, StopSandbox, User, event, message::Body,
    request::Call, response::Outcome, slot, user,
};
use hull_sys::mount::{OpenTreeFlags, open_tree};

/// How long a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(20);
const AGENT_LEAF: &str = "agent";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A client's end of a control connection.
pub struct Client {
    connection: BlockingConnection,
    next_id: u64,
    events: VecDeque<Event>,
    responses: VecDeque<(u64, Outcome)>,
}

impl Client {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            connection: BlockingConnection::new(socket.into()),
            next_id: 1,
            events: VecDeque::new(),
            responses: VecDeque::new(),
        }
    }

    /// Sends a request whose slots are these descriptors, in order; its number.
    pub fn send(&mut self, call: Option<Call>, fds: &[BorrowedFd<'_>]) -> u64 {
        let slots = (0..fds.len())
            .map(|n| Slot { kind: Some(slot::Kind::Descriptor(n.try_into().unwrap())) })
            .collect();
        let id = self.next_id;
        self.next_id += 1;
        self.connection
            .send(&Message { id, body: Some(Body::Request(Request { slots, call })) }, fds)
            .unwrap();
        id
    }

    fn receive(&mut self) -> io::Result<bool> {
        let Some(frame) = self.connection.recv()? else { return Ok(false) };
        match frame.message.body {
            Some(Body::Response(Response { outcome: Some(outcome) })) => {
                self.responses.push_back((frame.message.id, outcome));
            }
            Some(Body::Event(event)) => self.events.push_back(event),
            other => panic!("unexpected {other:?}"),
        }
        Ok(true)
    }

    pub fn response(&mut self, id: u64) -> Outcome {
        loop {
            if let Some(at) = self.responses.iter().position(|(number, _)| *number == id) {
                return self.responses.remove(at).unwrap().1;
            }
            assert!(self.receive().expect("no answer came"), "the agent closed the connection");
        }
    }

    pub fn call(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Outcome {
        let id = self.send(Some(call), fds);
        self.response(id)
    }

    pub fn done(&mut self, call: Call, fds: &[BorrowedFd<'_>]) {
        match self.call(call, fds) {
            Outcome::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub fn error(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Error {
        match self.call(call, fds) {
            Outcome::Error(error) => error,
            other => panic!("{other:?}"),
        }
    }

    pub fn state(&mut self) -> StateReport {
        match self.call(Call::State(State {}), &[]) {
            Outcome::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    pub fn event(&mut self) -> event::Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event.event.unwrap();
            }
            assert!(self.receive().expect("no event came"), "the agent closed the connection");
        }
    }

    /// Waits for the end of this container; other events on the way are dropped.
    pub fn exited(&mut self, id: &str) -> ExitRecord {
        loop {
            if let event::Event::Exited(record) = self.event()
                && record.container_id == id
            {
                return record;
            }
        }
    }

    /// True if the agent closes this connection.
    pub fn is_closed(&mut self) -> bool {
        loop {
            match self.receive() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}

/// A pod with its agent. Leaves nothing behind.
pub struct Pod {
    pub client: Client,
    pub directory: tempfile::TempDir,
    pub agent_pid: i32,
    pub reaper_pid: i32,
    pub cgroup_parent: String,
    hierarchies: Arc<Hierarchies>,
    created_levels: u32,
    child: Child,
    stopped: bool,
}

/// The agent under test: the one in HULL_AGENT (the static one that is shipped), else the one that cargo built.
pub fn agent_program() -> PathBuf {
    std::env::var_os("HULL_AGENT").map_or_else(|| env!("CARGO_BIN_EXE_hull-agent").into(), PathBuf::from)
}

/// A root filesystem of busybox.
fn make_tree(at: &Path) {
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(at.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", at.join("bin/busybox")).expect("the package busybox-static is needed");
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        std::os::unix::fs::symlink("busybox", at.join("bin").join(applet)).unwrap();
    }
    fs::write(at.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n").unwrap();
    fs::write(at.join("etc/group"), "root:x:0:\nweb:x:1000:\n").unwrap();
}

pub fn clone_tree(path: &Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, path, flags).unwrap()
}

impl Pod {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut CreateSandbox)) -> Self {
        let (mut pod, outcome) = Self::born(change);
        let Outcome::SandboxCreated(created) = outcome else { panic!("{outcome:?}") };
        pod.agent_pid = created.agent_pid;
        pod.reaper_pid = created.reaper_pid;
        pod.created_levels = created.cgroup_created_levels;
        pod
    }

    /// One whose agent was told to prepare before it was told what for; `meanwhile` sees it when it waits.
    pub fn of_prepared_agent(meanwhile: impl FnOnce(i32), change: impl FnOnce(&mut CreateSandbox)) -> Self {
        let (mut pod, outcome) = Self::born_after(Some(meanwhile), change);
        let Outcome::SandboxCreated(created) = outcome else { panic!("{outcome:?}") };
        pod.agent_pid = created.agent_pid;
        pod.created_levels = created.cgroup_created_levels;
        pod
    }

    /// An agent and its answer to CreateSandbox.
    fn born(change: impl FnOnce(&mut CreateSandbox)) -> (Self, Outcome) {
        Self::born_after(None::<fn(i32)>, change)
    }

    fn born_after(
        prepared: Option<impl FnOnce(i32)>,
        change: impl FnOnce(&mut CreateSandbox),
    ) -> (Self, Outcome) {
        let directory = tempfile::tempdir().unwrap();
        make_tree(&directory.path().join("rootfs"));
        fs::create_dir(directory.path().join("state")).unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let state = File::open(directory.path().join("state")).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(agent_program())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("agent.log")).unwrap())
            .spawn()
            .unwrap();
        let layout = cgroup::discover().unwrap();
        let hierarchies = Arc::new(Hierarchies::open(&layout).unwrap());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup_parent = format!("/hull-agent-test-{}-{number}", std::process::id());
        let mut spec = CreateSandbox {
            id: format!("pod{number}"),
            listener: 0,
            state_directory: 1,
            new_ipc_namespace: true,
            new_uts_namespace: true,
            hostname: "test".into(),
            cgroups: Some(layout),
            cgroup_parent: cgroup_parent.clone(),
            cgroup_leaf: AGENT_LEAF.into(),
            ..CreateSandbox::default()
        };
        change(&mut spec);
        let mut client = Client::new(ours);
        if let Some(meanwhile) = prepared {
            let prepare = Prepare { cgroups: spec.cgroups.clone() };
            client.send(Some(Call::Prepare(prepare)), &[]);
            meanwhile(child.id().try_into().unwrap());
        }
        let outcome = client.call(Call::CreateSandbox(spec), &[listener.as_fd(), state.as_fd()]);
        let agent_pid = child.id().try_into().unwrap();
        let pod = Self {
            client,
            directory,
            agent_pid,
            reaper_pid: 0,
            cgroup_parent,
            hierarchies,
            created_levels: 1,
            child,
            stopped: false,
        };
        (pod, outcome)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A second control connection.
    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.path("socket")).unwrap())
    }

    /// A request for a container that runs this shell script, and what its slots need.
    pub fn container(&self, id: &str, script: &str) -> StartContainer {
        StartContainer {
            id: id.into(),
            process: Some(shell(script)),
            rootfs: Some(Rootfs { layers: vec![0], writable: 1, ..Rootfs::default() }),
            pid_mode: PidMode::PidContainer.into(),
            private_cgroup_namespace: true,
            cgroup_leaf: id.into(),
            log: Some(2),
            ..StartContainer::default()
        }
    }

    pub fn try_start(&mut self, spec: StartContainer) -> Outcome {
        let number = self.send_spec(spec);
        self.client.response(number)
    }

    /// Asks for a container and does not wait for the answer; the request's number.
    pub fn send_start(&mut self, id: &str, script: &str) -> u64 {
        let spec = self.container(id, script);
        self.send_spec(spec)
    }

    /// The same with a whole request.
    pub fn send_spec(&mut self, spec: StartContainer) -> u64 {
        let writable = self.path(&format!("{}-writable", spec.id));
        fs::create_dir_all(&writable).unwrap();
        let writable = clone_tree(&writable);
        let log = self.open_log(&format!("{}.log", spec.id));
        // A launch uses its trees up.
        let tree = clone_tree(&self.path("rootfs"));
        self.client.send(Some(Call::StartContainer(spec)), &[tree.as_fd(), writable.as_fd(), log.as_fd()])
    }

    pub fn start(&mut self, spec: StartContainer) -> i32 {
        match self.try_start(spec) {
            Outcome::ContainerStarted(started) => started.pid,
            other => panic!("{other:?}"),
        }
    }

    pub fn run(&mut self, id: &str, script: &str) -> i32 {
        let spec = self.container(id, script);
        self.start(spec)
    }

    pub fn open_log(&self, name: &str) -> File {
        fs::OpenOptions::new().create(true).append(true).open(self.path(name)).unwrap()
    }

    /// The log's entries: stream, tag, content.
    pub fn log(&self, name: &str) -> Vec<(String, String, String)> {
        let text = fs::read_to_string(self.path(name)).unwrap();
        let entry = |line: &str| {
            let mut parts = line.splitn(4, ' ').map(str::to_owned);
            let time = parts.next().unwrap();
            assert_eq!((time.len(), &time[29..]), (30, "Z"), "{line}");
            (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap())
        };
        text.lines().map(entry).collect()
    }

    /// Contents of the log's entries.
    pub fn lines(&self, id: &str) -> Vec<String> {
        self.log(&format!("{id}.log")).into_iter().map(|(_, _, content)| content).collect()
    }

    /// Runs a process in a container to its end: how it ended and what it wrote to stdout.
    pub fn exec(&mut self, id: &str, script: &str, timeout_ms: u64) -> (ExecEnded, String) {
        let (mut reader, writer) = io::pipe().unwrap();
        let call = Exec {
            container_id: id.into(),
            process: Some(shell(script)),
            stdout: Some(0),
            timeout_ms,
            inherit: true,
            ..Exec::default()
        };
        let number = self.client.send(Some(Call::Exec(call)), &[writer.as_fd()]);
        drop(writer);
        let outcome = self.client.response(number);
        let mut text = String::new();
        io::Read::read_to_string(&mut reader, &mut text).unwrap();
        match outcome {
            Outcome::ExecEnded(ended) => (ended, text),
            other => panic!("{other:?}"),
        }
    }

    pub fn leaf(&self, name: &str) -> cgroup::Leaf {
        let pod =
            PodCgroup::open_existing(self.hierarchies.clone(), &self.cgroup_parent, self.created_levels);
        pod.unwrap().leaf(name).unwrap()
    }

    /// Stops the pod as hulld does, and checks that nothing of it is left.
    pub fn stop(mut self) {
        self.client.done(Call::StopSandbox(StopSandbox {}), &[]);
        assert!(self.client.is_closed());
        self.clean_up();
        assert!(!is_alive(self.agent_pid));
    }

    fn clean_up(&mut self) {
        self.stopped = true;
        self.child.wait().unwrap();
        until("the agent is gone", || !is_alive(self.agent_pid));
        let pod =
            PodCgroup::open_existing(self.hierarchies.clone(), &self.cgroup_parent, self.created_levels)
                .unwrap();
        pod.leaf(AGENT_LEAF).unwrap().remove().unwrap();
        pod.remove_created().unwrap();
        for mount in cgroup::discover().unwrap().v1.iter().map(|v1| v1.mount_point.clone()) {
            assert!(
                !Path::new(&format!("{mount}{}", self.cgroup_parent)).exists(),
                "{mount} keeps the pod's cgroup"
            );
        }
    }

    /// For pods whose agent has ended by itself.
    pub fn forget(mut self) {
        self.clean_up();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        // A test failed: as much as can be done.
        eprintln!("agent.log: {}", fs::read_to_string(self.path("agent.log")).unwrap_or_default());
        self.stopped = true;
        if let Ok(pod) =
            PodCgroup::open_existing(self.hierarchies.clone(), &self.cgroup_parent, self.created_levels)
        {
            for entry in cgroups_below(&self.cgroup_parent) {
                if let Ok(leaf) = pod.leaf(&entry) {
                    let _ = leaf.kill();
                    let _ = leaf.remove();
                }
            }
            let _ = pod.remove_created();
        }
        let _ = self.child.wait();
    }
}

/// The error of an agent that could not make its sandbox; it has ended and nothing is left.
pub fn failed_birth(change: impl FnOnce(&mut CreateSandbox)) -> Error {
    failed(Pod::born(change))
}

/// The same of an agent that was told to prepare.
pub fn failed_birth_after_preparing(change: impl FnOnce(&mut CreateSandbox)) -> Error {
    failed(Pod::born_after(Some(|_| ()), change))
}

fn failed((mut pod, outcome): (Pod, Outcome)) -> Error {
    let Outcome::Error(error) = outcome else { panic!("{outcome:?}") };
    assert!(pod.client.is_closed());
    pod.clean_up();
    error
}

fn cgroups_below(parent: &str) -> Vec<String> {
    let layout = cgroup::discover().unwrap();
    let mounts = layout.v1.iter().map(|v1| v1.mount_point.clone()).chain([layout.unified.clone()]);
    let entries =
        mounts.filter_map(|mount| fs::read_dir(format!("{mount}{parent}")).ok()).flatten().flatten();
    entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// A process that runs this script as root without limits on its rights.
pub fn shell(script: &str) -> Process {
    Process {
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".into(), "GREETING=hello".into()],
        user: Some(User { user: Some(user::User::Uid(0)), ..User::default() }),
        ..Process::default()
    }
}

/// True while there is such a process that is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

/// Waits until this is so.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
