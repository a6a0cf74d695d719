//! A client of the agent in a guest.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;

use hull_agent::protocol::BlockingConnection;
use hull_agent::protocol::messages::{
    CreateSandbox, Error, Event, Exec, ExitRecord, Guest, Message, Ping, Process, Range, Request, Response,
    Rootfs, SandboxCreated, Slot, StartContainer, StateReport, User, event, message::Body, request::Call,
    response::Outcome, slot::Kind, user,
};

/// A client's end of a control connection.
pub(crate) struct Agent {
    connection: BlockingConnection,
    next_id: u64,
    events: VecDeque<Event>,
    responses: BTreeMap<u64, Outcome>,
}

impl Agent {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            connection: BlockingConnection::new(socket.into()),
            next_id: 1,
            events: VecDeque::new(),
            responses: BTreeMap::new(),
        }
    }

    /// Whether there is somebody at the other end.
    pub(crate) fn answers(&mut self) -> bool {
        let body = Some(Body::Request(Request { slots: vec![], call: Some(Call::Ping(Ping::default())) }));
        let sent = self.connection.send(&Message { id: 0, body }, &[]);
        sent.is_ok() && matches!(self.connection.recv(), Ok(Some(_)))
    }

    /// Sends a request with these slots; its number.
    pub(crate) fn send(&mut self, call: Call, slots: Vec<Kind>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let slots = slots.into_iter().map(|kind| Slot { kind: Some(kind) }).collect();
        let body = Some(Body::Request(Request { slots, call: Some(call) }));
        self.connection.send(&Message { id, body }, &[]).unwrap();
        id
    }

    fn receive(&mut self) {
        let frame = self.connection.recv().expect("the agent says nothing");
        let message = frame.expect("the agent closed the connection").message;
        match message.body {
            Some(Body::Response(Response { outcome: Some(outcome) })) => {
                self.responses.insert(message.id, outcome);
            }
            Some(Body::Event(event)) => self.events.push_back(event),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn response(&mut self, id: u64) -> Outcome {
        loop {
            if let Some(outcome) = self.responses.remove(&id) {
                return outcome;
            }
            self.receive();
        }
    }

    pub(crate) fn call(&mut self, call: Call, slots: Vec<Kind>) -> Outcome {
        let id = self.send(call, slots);
        self.response(id)
    }

    pub(crate) fn done(&mut self, call: Call, slots: Vec<Kind>) {
        match self.call(call, slots) {
            Outcome::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn error(&mut self, call: Call, slots: Vec<Kind>) -> Error {
        match self.call(call, slots) {
            Outcome::Error(error) => error,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn state(&mut self) -> StateReport {
        match self.call(Call::State(Default::default()), vec![]) {
            Outcome::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn event(&mut self) -> event::Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event.event.unwrap();
            }
            self.receive();
        }
    }

    /// Waits for the end of this container.
    pub(crate) fn exited(&mut self, id: &str) -> ExitRecord {
        loop {
            if let event::Event::Exited(record) = self.event()
                && record.container_id == id
            {
                return record;
            }
        }
    }

    /// Makes the machine a pod's.
    pub(crate) fn create(&mut self, change: impl FnOnce(&mut CreateSandbox)) -> SandboxCreated {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let mut spec = CreateSandbox {
            id: "pod".into(),
            new_ipc_namespace: true,
            new_uts_namespace: true,
            hostname: "guest".into(),
            guest: Some(Guest {
                entropy: (0..64).collect(),
                wall_clock_ns: now.as_nanos() as i64,
                cpus: 1,
                ..Guest::default()
            }),
            ..CreateSandbox::default()
        };
        change(&mut spec);
        match self.call(Call::CreateSandbox(spec), vec![]) {
            Outcome::SandboxCreated(created) => created,
            other => panic!("{other:?}"),
        }
    }

    /// Starts a container with a script.
    pub(crate) fn start(&mut self, container: Container) {
        let id = self.start_later(container);
        match self.response(id) {
            Outcome::ContainerStarted(_) => {}
            other => panic!("{other:?}"),
        }
    }

    /// The same, without waiting for the answer.
    pub(crate) fn start_later(&mut self, container: Container) -> u64 {
        let Container { spec, slots } = container;
        self.send(Call::StartContainer(spec), slots)
    }
}

/// What a test says of a container: slot 0 is the image, 1 the scratch range, 2 the log.
pub(crate) struct Container {
    pub(crate) spec: StartContainer,
    pub(crate) slots: Vec<Kind>,
}

impl Container {
    pub(crate) fn new(id: &str, image: Range, scratch: Range, script: &str) -> Self {
        let spec = StartContainer {
            id: id.into(),
            cgroup_leaf: id.into(),
            process: Some(script_process(script)),
            rootfs: Some(Rootfs { layers: vec![0], writable: 1, ..Rootfs::default() }),
            private_cgroup_namespace: true,
            log: Some(2),
            ..StartContainer::default()
        };
        Self { spec, slots: vec![Kind::Image(image), Kind::Scratch(scratch), Kind::Log(id.into())] }
    }

    /// One more slot; its number.
    pub(crate) fn slot(&mut self, kind: Kind) -> u32 {
        self.slots.push(kind);
        self.slots.len() as u32 - 1
    }

    /// Mounts one more slot.
    pub(crate) fn mount(&mut self, destination: &str, kind: Kind) {
        let slot = self.slot(kind);
        self.spec.mounts.push(hull_agent::protocol::messages::Mount {
            destination: destination.into(),
            source: Some(hull_agent::protocol::messages::mount::Source::Slot(slot)),
            ..Default::default()
        });
    }
}

fn script_process(script: &str) -> Process {
    let all = 0xa80425fb;
    Process {
        args: ["sh", "-c", script].map(String::from).to_vec(),
        env: vec!["PATH=/bin".into()],
        user: Some(User { user: Some(user::User::Uid(0)), ..User::default() }),
        cap_bounding: all,
        cap_effective: all,
        cap_permitted: all,
        ..Process::default()
    }
}

/// A script in a running container, with the slots of its streams.
pub(crate) fn exec(container: &str, script: &str) -> Exec {
    Exec {
        container_id: container.into(),
        process: Some(Process {
            args: ["sh", "-c", script].map(String::from).to_vec(),
            ..Process::default()
        }),
        inherit: true,
        ..Exec::default()
    }
}
