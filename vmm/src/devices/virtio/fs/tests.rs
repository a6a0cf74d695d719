use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::virtio::driver::Ring;
use crate::devices::virtio::{Interrupt, Memory};
use crate::protocol::BlockingConnection;
use crate::protocol::messages::response::Outcome;
use crate::protocol::messages::{self, Message, QueuePosition, QueuePositions, message::Body, request::Call};

const SIZE: usize = 1 << 20;

fn memory() -> Memory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE as u64).unwrap();
    let ranges = [(GuestAddress(0), SIZE, Some(FileOffset::new(file, 0)))];
    Arc::new(vm_memory::GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

fn activation(memory: &Memory) -> Activation {
    let queues = QUEUES
        .iter()
        .zip(0..)
        .map(|(size, index)| Ring::new(memory, index, *size, 0x1_0000 + u64::from(index) * 0x1_0000).queue());
    Activation {
        memory: memory.clone(),
        features: 7,
        queues: queues.collect(),
        interrupt: Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
    }
}

fn device() -> (Volumes, Receiver<String>) {
    let (sender, faults) = channel();
    let sender = Mutex::new(sender);
    let on_fault: OnFault =
        Arc::new(move |_, message| sender.lock().unwrap().send(message.to_owned()).unwrap());
    let worker = Worker::start("test", || Ok(())).unwrap();
    (Volumes::new(&worker, on_fault).unwrap(), faults)
}

/// A server that answers so many requests with `answer`, and what it was asked.
fn server(count: usize, answer: fn(&Call) -> Outcome) -> (OwnedFd, JoinHandle<Vec<(Call, usize)>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut connection = BlockingConnection::new(ours.into());
        let mut asked = Vec::new();
        for _ in 0..count {
            let Some(frame) = connection.recv().unwrap() else { break };
            let Some(Body::Request(request)) = frame.message.body else { panic!() };
            let call = request.call.unwrap();
            connection.send(&Message::response(frame.message.id, answer(&call)), &[]).unwrap();
            asked.push((call, frame.fds.len()));
        }
        asked
    });
    (theirs.into(), thread)
}

fn good(call: &Call) -> Outcome {
    match call {
        Call::ServeQueues(_) => Outcome::Done(messages::Empty {}),
        _ => {
            let position = QueuePosition { next_available: 7, next_used: 7 };
            Outcome::Halted(QueuePositions { positions: vec![position; 2] })
        }
    }
}

#[test]
fn the_configuration_space_names_the_tag_and_one_request_queue() {
    let (device, _faults) = device();
    let mut config = [0xff; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"volumes\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    for offset in [39, 40, 1 << 40, u64::MAX] {
        device.read_config(offset, &mut config);
    }
}

#[test]
fn a_server_that_comes_later_gets_the_queues_memory_and_eventfds() {
    let (mut device, _faults) = device();
    let memory = memory();
    device.activate(activation(&memory)).unwrap();
    let (socket, thread) = server(2, good);
    device.handle().serve(socket).unwrap();
    assert!(device.handle().is_served());
    device.pause().unwrap();
    let asked = thread.join().unwrap();
    let (Call::ServeQueues(call), fds) = &asked[0] else { panic!("{asked:?}") };
    assert_eq!((call.regions.len(), call.queues.len(), *fds), (1, 2, 1 + 2 * 2));
    assert_eq!((call.features, call.queues[0].size, call.queues[1].size), (7, 64, 512));
    assert!(matches!(asked[1].0, Call::HaltQueues(_)));
    assert!(device.save().is_err(), "the guest's open files are the server's");
}

#[test]
fn a_server_that_is_there_before_the_driver_serves_as_soon_as_it_can() {
    let (mut device, _faults) = device();
    let (socket, thread) = server(1, good);
    device.handle().serve(socket).unwrap();
    let (other, _thread) = server(0, good);
    assert!(matches!(device.handle().serve(other), Err(ServeError::Occupied)));
    device.activate(activation(&memory())).unwrap();
    assert_eq!(thread.join().unwrap().len(), 1);
}

#[test]
fn a_server_that_goes_is_a_fault_and_another_may_come() {
    let (mut device, faults) = device();
    device.activate(activation(&memory())).unwrap();
    let (socket, thread) = server(1, good);
    device.handle().serve(socket).unwrap();
    thread.join().unwrap();
    assert!(faults.recv().unwrap().contains("has gone"));
    assert!(!device.handle().is_served());
    let (socket, _thread) = server(1, good);
    device.handle().serve(socket).unwrap();
}

#[test]
fn a_server_that_refuses_or_answers_nonsense_does_not_serve() {
    for answer in [
        |_: &Call| Outcome::Error(messages::Error { message: "no".into(), ..messages::Error::default() }),
        |_: &Call| Outcome::Metrics(messages::Metrics::default()),
    ] {
        let (mut device, _faults) = device();
        device.activate(activation(&memory())).unwrap();
        let (socket, _thread) = server(1, answer);
        assert!(device.handle().serve(socket).is_err());
        assert!(!device.handle().is_served());
    }
}

#[test]
fn positions_that_cannot_be_end_the_service_and_not_the_machine() {
    let (mut device, faults) = device();
    device.activate(activation(&memory())).unwrap();
    let (socket, _thread) = server(2, |call| match call {
        Call::ServeQueues(_) => good(call),
        _ => Outcome::Halted(QueuePositions {
            positions: vec![QueuePosition { next_available: 70_000, next_used: 0 }; 2],
        }),
    });
    device.handle().serve(socket).unwrap();
    device.reset();
    assert!(faults.recv().is_ok());
}

#[test]
fn a_device_that_was_never_served_is_saved_and_restored() {
    let (mut device, _faults) = device();
    assert!(device.save().unwrap().queues.is_empty());
    device.activate(activation(&memory())).unwrap();
    assert!(device.save().is_err(), "not paused");
    device.pause().unwrap();
    let state = device.save().unwrap();
    assert_eq!(state.queues.len(), 2);
    device.restore(state.inner).unwrap();
    assert!(device.restore(serde_json::Value::Bool(true)).is_err());
}
