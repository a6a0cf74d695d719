use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::messages::{Message, Request, Slot, State, StopSandbox, message::Body, request::Call, slot};
use super::*;

fn slot(number: u32) -> Slot {
    Slot { kind: Some(slot::Kind::Descriptor(number)) }
}

fn request(id: u64, slots: u32) -> Message {
    let slots = (0..slots).map(slot).collect();
    Message { id, body: Some(Body::Request(Request { slots, call: Some(Call::State(State {})) })) }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

#[test]
fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
    let mut wire = Vec::new();
    for id in 0..50 {
        wire.extend(encode(&request(id, 0)).unwrap());
    }
    for size in [1, 2, 3, 5, 7, 64, 10_000] {
        let (mut reader, mut ids) = (FrameReader::new(), Vec::new());
        for piece in wire.chunks(size) {
            reader.push(piece, Vec::new());
            while let Some(frame) = reader.next().unwrap() {
                ids.push(frame.message.id);
            }
        }
        assert_eq!(ids, (0..50).collect::<Vec<_>>());
        assert!(!reader.is_within_frame());
    }
}

#[test]
fn a_length_above_the_limit_is_refused_before_its_bytes_come() {
    for (limit, length) in [(MAX_FRAME, MAX_FRAME + 1), (100, 101), (usize::MAX, u32::MAX as usize)] {
        let mut reader = FrameReader::with_limit(limit);
        reader.push(&(length as u32).to_le_bytes(), Vec::new());
        assert!(matches!(reader.next(), Err(FrameError::TooLong { .. })));
    }
    let long = Message {
        id: 1,
        body: Some(Body::Request(Request {
            slots: Vec::new(),
            call: Some(Call::Forget(messages::Forget { container_id: "x".repeat(MAX_FRAME) })),
        })),
    };
    assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
}

#[test]
fn each_frame_gets_the_descriptors_that_its_slots_name() {
    let mut reader = FrameReader::new();
    let mut wire = encode(&request(1, 2)).unwrap();
    wire.extend(encode(&request(2, 0)).unwrap());
    wire.extend(encode(&request(3, 1)).unwrap());
    reader.push(&wire, vec![null(), null(), null()]);
    let counts: Vec<usize> =
        std::iter::from_fn(|| reader.next().unwrap()).map(|frame| frame.fds.len()).collect();
    assert_eq!(counts, [2, 0, 1]);
}

#[test]
fn missing_and_stray_descriptors_are_errors() {
    let mut reader = FrameReader::new();
    reader.push(&encode(&request(1, 2)).unwrap(), vec![null()]);
    assert!(matches!(reader.next(), Err(FrameError::MissingDescriptors { named: 2, arrived: 1 })));

    let mut reader = FrameReader::new();
    reader.push(&encode(&request(1, 0)).unwrap(), vec![null()]);
    assert!(matches!(reader.next(), Err(FrameError::StrayDescriptors(1))));

    let mut reader = FrameReader::new();
    let far = Message {
        id: 1,
        body: Some(Body::Request(Request {
            slots: vec![slot(u32::MAX)],
            call: Some(Call::StopSandbox(StopSandbox {})),
        })),
    };
    reader.push(&encode(&far).unwrap(), vec![null()]);
    assert!(matches!(reader.next(), Err(FrameError::MissingDescriptors { .. })));
}

#[test]
fn a_thousand_descriptors_cross_a_socket_on_one_frame_in_order() {
    let (left, right) = UnixStream::pair().unwrap();
    let files: Vec<File> = (0..4).map(|_| tempfile::tempfile().unwrap()).collect();
    let sender = std::thread::spawn({
        let fds: Vec<OwnedFd> =
            (0..MAX_FRAME_DESCRIPTORS).map(|n| files[n % 4].try_clone().unwrap().into()).collect();
        move || {
            let mut writer = FrameWriter::new();
            writer.push(&request(7, 0), Vec::new()).unwrap();
            writer.push(&request(8, fds.len() as u32), fds).unwrap();
            writer.push(&request(9, 1), vec![null()]).unwrap();
            assert!(writer.write_to(left.as_fd()).unwrap());
            assert_eq!(writer.queued(), 0);
        }
    });
    let mut connection = BlockingConnection::new(right.into());
    assert_eq!(connection.recv().unwrap().unwrap().message.id, 7);
    let frame = connection.recv().unwrap().unwrap();
    assert_eq!((frame.message.id, frame.fds.len()), (8, MAX_FRAME_DESCRIPTORS));
    for (number, fd) in frame.fds.into_iter().enumerate() {
        let wanted = files[number % 4].metadata().unwrap().ino();
        assert_eq!(File::from(fd).metadata().unwrap().ino(), wanted, "{number}");
    }
    assert_eq!(connection.recv().unwrap().unwrap().fds.len(), 1);
    sender.join().unwrap();
    assert!(connection.recv().unwrap().is_none());
}

#[test]
fn a_peer_that_does_not_read_fills_a_bounded_queue_and_loses_nothing_once_it_reads() {
    let (left, right) = UnixStream::pair().unwrap();
    left.set_nonblocking(true).unwrap();
    let mut writer = FrameWriter::new();
    let mut pushed = 0;
    while writer.push(&request(pushed, 100), (0..100).map(|_| null()).collect()).is_ok() {
        pushed += 1;
        writer.write_to(left.as_fd()).unwrap();
        if pushed == 50 {
            break;
        }
    }
    right.set_nonblocking(true).unwrap();
    let (mut reader, mut seen) = (FrameReader::new(), 0);
    while seen < pushed {
        let drained = writer.write_to(left.as_fd()).unwrap();
        match reader.receive_from(right.as_fd()) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => assert!(!drained),
            Err(error) => panic!("{error}"),
        }
        while let Some(frame) = reader.next().unwrap() {
            assert_eq!((frame.message.id, frame.fds.len()), (seen, 100));
            seen += 1;
        }
    }
    let big = Message {
        id: 0,
        body: Some(Body::Request(Request {
            slots: Vec::new(),
            call: Some(Call::Forget(messages::Forget { container_id: "x".repeat(MAX_FRAME - 100) })),
        })),
    };
    let results: Vec<bool> = (0..4).map(|_| writer.push(&big, Vec::new()).is_ok()).collect();
    assert_eq!(results, [true, true, false, false]);
}

#[test]
fn an_end_within_a_frame_is_an_error_and_between_frames_is_not() {
    let (left, right) = UnixStream::pair().unwrap();
    let bytes = encode(&request(1, 0)).unwrap();
    io::Write::write_all(&mut &left, &bytes).unwrap();
    io::Write::write_all(&mut &left, &bytes[..3]).unwrap();
    drop(left);
    let mut connection = BlockingConnection::new(right.into());
    assert!(connection.recv().unwrap().is_some());
    assert_eq!(connection.recv().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn ids_are_file_names_and_nothing_more() {
    assert!(is_valid_id("0123456789abcdef"));
    assert!(is_valid_id("web-1.2_x"));
    for id in ["", ".", "..", ".x", "a/b", "a b", "a\0", "é", &"x".repeat(129)] {
        assert!(!is_valid_id(id), "{id:?}");
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic_and_never_hold_more_than_came(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)
    ) {
        let mut reader = FrameReader::new();
        for piece in &pieces {
            reader.push(piece, Vec::new());
            loop {
                match reader.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }

    #[test]
    fn random_bodies_of_the_right_length_decode_or_fail_cleanly(body in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut reader = FrameReader::new();
        reader.push(&(body.len() as u32).to_le_bytes(), Vec::new());
        reader.push(&body, Vec::new());
        match reader.next() {
            Ok(frame) => prop_assert!(frame.is_some()),
            Err(FrameError::Malformed(_) | FrameError::MissingDescriptors { .. }) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn a_damaged_real_frame_decodes_or_fails_cleanly(position in 0_usize..200, bit in 0_u8..8) {
        let mut bytes = encode(&request(0x1234_5678, 20)).unwrap();
        let position = position % bytes.len();
        bytes[position] ^= 1 << bit;
        let mut reader = FrameReader::new();
        reader.push(&bytes, (0..20).map(|_| null()).collect());
        while let Ok(Some(_)) = reader.next() {}
    }
}
