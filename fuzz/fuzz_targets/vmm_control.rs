//! What a VMM reads from whoever connects to its control socket.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;

use hull_vmm::control::{CallError, Machine, call};
use hull_vmm::protocol::messages::{Extent, Metrics, Status, error::Code, message::Body, response::Outcome};
use hull_vmm::protocol::{Descriptors, FrameReader, MAX_REQUEST, encode};
use libfuzzer_sys::fuzz_target;

/// Asserts what it is promised.
struct Sceptic;

fn answer(bad: bool) -> Result<(), CallError> {
    if bad { Err(CallError::not_found("there is none")) } else { Ok(()) }
}

impl Machine for Sceptic {
    fn status(&mut self) -> Status {
        Status::default()
    }
    fn add_extent(&mut self, key: &str, length: u64, file: OwnedFd) -> Result<Extent, CallError> {
        assert!(!key.is_empty() && key.len() <= 256 && length > 0);
        assert!(File::from(file).metadata().unwrap().is_file());
        Ok(Extent { offset: 0, length })
    }
    fn remove_extent(&mut self, key: &str) -> Result<(), CallError> {
        answer(key.is_empty())
    }
    fn open_scratch(&mut self, _: u64, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn close_scratch(&mut self, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn fill_slot(&mut self, slot: u32, _: bool, _: OwnedFd) -> Result<(), CallError> {
        answer(slot > 7)
    }
    fn clear_slot(&mut self, slot: u32) -> Result<(), CallError> {
        answer(slot > 7)
    }
    fn serve_volumes(&mut self, _: OwnedFd) -> Result<(), CallError> {
        answer(true)
    }
    fn set_log(&mut self, id: &str, file: OwnedFd) -> Result<(), CallError> {
        assert!(hull_agent::protocol::is_valid_id(id));
        assert!(File::from(file).metadata().unwrap().is_file());
        Ok(())
    }
    fn remove_log(&mut self, _: &str) -> Result<(), CallError> {
        Ok(())
    }
    fn resize_memory(&mut self, bytes: u64) -> Result<(), CallError> {
        answer(bytes == 0)
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
        Metrics::default()
    }
}

/// Descriptors of several types, in an order that the input decides.
fn descriptor(kind: u8) -> OwnedFd {
    match kind % 4 {
        0 => File::open("/proc/self/exe").unwrap().into(),
        1 => OpenOptions::new().append(true).open("/dev/null").unwrap().into(),
        2 => std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        _ => File::open("/").unwrap().into(),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    let mut reader = FrameReader::with_limit(MAX_REQUEST);
    let length = usize::from(first >> 2) + 1;
    for (number, piece) in bytes.chunks(length).enumerate() {
        let fds = (number < usize::from(first & 3)).then(|| descriptor(piece[0])).into_iter().collect();
        reader.push(piece, fds);
        loop {
            let Ok(next) = reader.next() else { return };
            let Some(frame) = next else { break };
            encode(&frame.message).expect("what was decoded can be encoded");
            let Some(Body::Request(request)) = frame.message.body else { return };
            let answer = call(&mut Sceptic, request.call, &mut Descriptors::new(frame.fds));
            if let Outcome::Error(error) = answer.outcome {
                assert!(!error.message.is_empty() && error.code() != Code::Internal);
            }
        }
    }
});
