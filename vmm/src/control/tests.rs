use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use super::connection::Connection;
use super::machine::Machine;
use super::server::Server;
use super::{CallError, End, Events};
use crate::protocol::messages::{
    self, AddExtent, Boot, Event, Extent, FillSlot, GetMetrics, GetStatus, HaltQueues, Message, Metrics,
    Request, Response, Save, ServeVolumes, SetLog, Status, Stop, error::Code, event::Kind, message::Body,
    request::Call, response::Outcome,
};
use crate::protocol::{BlockingConnection, FrameReader};

/// A machine that remembers what it was asked.
#[derive(Default)]
struct Recorder {
    asked: Vec<String>,
}

impl Machine for Recorder {
    fn status(&mut self) -> Status {
        Status { logs: self.asked.clone(), ..Status::default() }
    }
    fn add_extent(&mut self, key: &str, length: u64, _: OwnedFd) -> Result<Extent, CallError> {
        self.asked.push(format!("add {key}"));
        Ok(Extent { offset: 2 << 20, length })
    }
    fn remove_extent(&mut self, key: &str) -> Result<(), CallError> {
        self.asked.push(format!("remove {key}"));
        Ok(())
    }
    fn open_scratch(&mut self, _: u64, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn close_scratch(&mut self, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn fill_slot(&mut self, slot: u32, _: bool, _: OwnedFd) -> Result<(), CallError> {
        Err(CallError::not_found(format!("there is no slot {slot}")))
    }
    fn clear_slot(&mut self, _: u32) -> Result<(), CallError> {
        Ok(())
    }
    fn serve_volumes(&mut self, _: OwnedFd) -> Result<(), CallError> {
        Ok(())
    }
    fn set_log(&mut self, id: &str, _: OwnedFd) -> Result<(), CallError> {
        self.asked.push(format!("log {id}"));
        Ok(())
    }
    fn remove_log(&mut self, _: &str) -> Result<(), CallError> {
        Ok(())
    }
    fn resize_memory(&mut self, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn pause(&mut self) -> Result<(), CallError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), CallError> {
        Ok(())
    }
    fn save(&mut self, _: OwnedFd) -> Result<(), CallError> {
        Ok(())
    }
    fn metrics(&mut self) -> Metrics {
        Metrics { values: [("x".to_owned(), 1)].into() }
    }
}

/// A server on a thread of its own, with one connection as at birth.
struct Served {
    _directory: tempfile::TempDir,
    path: PathBuf,
    events: Events,
    thread: JoinHandle<End>,
    first: BlockingConnection,
    next_id: u64,
}

impl Served {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let (events, receiver) = Events::channel().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut machine = Recorder::default();
            let mut server = Server::new(&mut machine, listener.into(), receiver).unwrap();
            let serial = server.next_serial();
            server.add(Connection::new(serial, theirs.into(), FrameReader::new())).unwrap();
            server.run().unwrap()
        });
        let first = BlockingConnection::new(ours.into());
        Self { _directory: directory, path, events, thread, first, next_id: 1 }
    }

    fn connect(&self) -> BlockingConnection {
        BlockingConnection::new(UnixStream::connect(&self.path).unwrap().into())
    }

    fn ask(&mut self, call: Call, fds: &[OwnedFd]) -> Outcome {
        self.next_id += 1;
        ask(&mut self.first, self.next_id, call, fds)
    }
}

fn ask(connection: &mut BlockingConnection, id: u64, call: Call, fds: &[OwnedFd]) -> Outcome {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    connection.send(&Message::request(id, call, fds.len()), &borrowed).unwrap();
    let message = connection.recv().unwrap().unwrap().message;
    assert_eq!(message.id, id);
    match message.body {
        Some(Body::Response(Response { outcome: Some(outcome) })) => outcome,
        other => panic!("{other:?}"),
    }
}

fn code(outcome: Outcome) -> Code {
    match outcome {
        Outcome::Error(error) => error.code(),
        other => panic!("not an error: {other:?}"),
    }
}

fn status(connection: &mut BlockingConnection) -> Vec<String> {
    match ask(connection, 99, Call::Status(GetStatus {}), &[]) {
        Outcome::Status(status) => status.logs,
        other => panic!("{other:?}"),
    }
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

fn read_only() -> OwnedFd {
    File::open("/proc/self/exe").unwrap().into()
}

#[test]
fn requests_are_answered_by_number_on_every_connection() {
    let mut served = Served::new();
    let extent = Call::AddExtent(AddExtent { key: "layer".into(), length: 4096, file: 0 });
    let answer = served.ask(extent, &[read_only()]);
    assert_eq!(answer, Outcome::Extent(Extent { offset: 2 << 20, length: 4096 }));
    let mut second = served.connect();
    assert_eq!(status(&mut second), ["add layer"]);
    assert_eq!(status(&mut served.first), ["add layer"]);
    assert_eq!(served.ask(Call::Stop(Stop {}), &[]), Outcome::Done(messages::Empty {}));
    assert_eq!(served.thread.join().unwrap(), End::Stopped);
}

#[test]
fn a_descriptor_of_the_wrong_type_or_access_is_refused_and_the_machine_not_asked() {
    let mut served = Served::new();
    let extent = || Call::AddExtent(AddExtent { key: "k".into(), length: 1, file: 0 });
    let slot = |readonly| Call::FillSlot(FillSlot { slot: 0, readonly, file: 0 });
    let log = || Call::SetLog(SetLog { container_id: "c".into(), file: 0 });
    let null = || OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/null").unwrap());
    let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
    for (call, fd) in [
        // A layer that could be written to.
        (extent(), file()),
        (extent(), socket()),
        (extent(), File::open("/").unwrap().into()),
        (slot(false), read_only()),
        (slot(true), file()),
        (slot(false), null()),
        (log(), file()),
        (log(), null()),
        (Call::ServeVolumes(ServeVolumes { server: 0 }), file()),
        (Call::Save(Save { file: 0 }), read_only()),
    ] {
        let name = format!("{call:?}");
        assert_eq!(code(served.ask(call, &[fd])), Code::Invalid, "{name}");
    }
    assert_eq!(code(served.ask(extent(), &[])), Code::Invalid, "no descriptor at all");
    assert!(status(&mut served.first).is_empty());
}

#[test]
fn names_and_numbers_out_of_range_are_errors() {
    let mut served = Served::new();
    let extent = |key: &str, length| Call::AddExtent(AddExtent { key: key.into(), length, file: 0 });
    assert_eq!(code(served.ask(extent("", 1), &[read_only()])), Code::Invalid);
    assert_eq!(code(served.ask(extent(&"x".repeat(257), 1), &[read_only()])), Code::Invalid);
    assert_eq!(code(served.ask(extent("x", 0), &[read_only()])), Code::Invalid);
    let log = Call::SetLog(SetLog { container_id: "../c".into(), file: 0 });
    assert_eq!(code(served.ask(log, &[file()])), Code::Invalid);
    let slot = Call::FillSlot(FillSlot { slot: 7, readonly: false, file: 0 });
    assert_eq!(code(served.ask(slot, &[file()])), Code::NotFound);
    assert_eq!(code(served.ask(Call::Boot(Boot::default()), &[])), Code::FailedPrecondition);
    assert_eq!(code(served.ask(Call::HaltQueues(HaltQueues {}), &[])), Code::UnknownCall);
}

#[test]
fn a_request_of_a_later_hulld_is_answered_as_unknown() {
    let mut served = Served::new();
    let message = Message { id: 5, descriptors: 0, body: Some(Body::Request(Request { call: None })) };
    served.first.send(&message, &[]).unwrap();
    let answer = served.first.recv().unwrap().unwrap().message;
    let Some(Body::Response(Response { outcome: Some(outcome) })) = answer.body else { panic!() };
    assert_eq!((answer.id, code(outcome)), (5, Code::UnknownCall));
}

#[test]
fn nonsense_costs_its_sender_the_connection_and_nobody_else_anything() {
    use std::io::{Read, Write};
    let mut served = Served::new();
    let response = crate::protocol::encode(&Message::response(1, Outcome::Done(messages::Empty {}))).unwrap();
    let long = (1_u32 << 20).to_le_bytes().to_vec();
    for bytes in [vec![0xff; 64], vec![4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], response, long] {
        let mut peer = UnixStream::connect(&served.path).unwrap();
        peer.write_all(&bytes).unwrap();
        assert_eq!(peer.read(&mut [0; 16]).unwrap(), 0, "closed");
    }
    assert!(status(&mut served.first).is_empty());
}

#[test]
fn events_go_to_the_newest_connection_and_the_end_of_the_machine_is_the_last_one() {
    let mut served = Served::new();
    served.events.fault("net", "gone");
    let event = served.first.recv().unwrap().unwrap().message;
    assert!(matches!(event.body, Some(Body::Event(Event { kind: Some(Kind::Fault(_)) }))));
    let mut second = served.connect();
    status(&mut second);
    served.events.end("the guest powered off");
    let event = second.recv().unwrap().unwrap().message;
    let Some(Body::Event(Event { kind: Some(Kind::ShutDown(end)) })) = event.body else { panic!() };
    assert_eq!(end.reason, "the guest powered off");
    assert!(second.recv().unwrap().is_none());
    assert_eq!(served.thread.join().unwrap(), End::Ended("the guest powered off".into()));
}

#[test]
fn more_connections_than_allowed_push_the_oldest_out() {
    let mut served = Served::new();
    let mut others: Vec<_> = (0..16).map(|_| served.connect()).collect();
    for other in &mut others {
        status(other);
    }
    assert!(served.first.recv().unwrap().is_none(), "the first connection is closed");
    status(&mut others[0]);
}

#[test]
fn a_peer_that_does_not_read_is_dropped_before_it_fills_memory() {
    let served = Served::new();
    let peer = UnixStream::connect(&served.path).unwrap();
    peer.set_nonblocking(true).unwrap();
    let request = crate::protocol::encode(&Message::request(1, Call::Metrics(GetMetrics {}), 0)).unwrap();
    let mut sent = 0_usize;
    loop {
        match std::io::Write::write(&mut &peer, &request) {
            Ok(written) => sent += written,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(_) => break,
        }
        assert!(sent < 64 << 20, "it still takes requests");
    }
    status(&mut served.connect());
}
