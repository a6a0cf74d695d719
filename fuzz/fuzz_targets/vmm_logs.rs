//! What a guest sends to the port of logs: greetings that are none, in pieces, and output for files that come and go.
#![no_main]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use hull_fuzz::ring::Input;
use hull_vmm::devices::virtio::Worker;
use hull_vmm::devices::virtio::vsock::Service;
use hull_vmm::logs::Logs;
use libfuzzer_sys::fuzz_target;

const CONTAINERS: [&str; 3] = ["a", "b", "c"];

fn worker() -> &'static Worker {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    WORKER.get_or_init(|| Worker::start("logs", || Ok(())).unwrap())
}

/// A LogHello as the agent writes it.
fn greeting(container: &str, stream: u8) -> Vec<u8> {
    let mut body = vec![0x0a, container.len() as u8];
    body.extend(container.as_bytes());
    if stream > 0 {
        body.extend([0x10, stream]);
    }
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

fuzz_target!(|data: &[u8]| {
    let logs = Logs::start(worker()).unwrap();
    let handle = logs.handle();
    let mut input = Input(data);
    let mut files: BTreeMap<&str, File> = BTreeMap::new();
    let mut streams: Vec<UnixStream> = Vec::new();
    while !input.is_empty() {
        let container = CONTAINERS[usize::from(input.u8()) % CONTAINERS.len()];
        match input.u8() % 8 {
            0 | 1 if streams.len() < 16 => {
                let (mut ours, theirs) = UnixStream::pair().unwrap();
                theirs.set_nonblocking(true).unwrap();
                ours.set_nonblocking(true).unwrap();
                handle.accept(theirs.into());
                if input.u8() < 200 {
                    let _ = ours.write(&greeting(container, input.u8() % 3));
                }
                streams.push(ours);
            }
            2 => {
                let file = tempfile::tempfile_in("/dev/shm").unwrap();
                handle.set(container, Some(file.try_clone().unwrap().into()));
                files.insert(container, file);
            }
            3 => handle.set(container, None),
            4 => {
                handle.remove(container);
                files.remove(container);
            }
            5 => drop(streams.pop()),
            6 => std::thread::yield_now(),
            _ => {
                let length = usize::from(input.u8() % 32);
                let bytes = &input.bytes::<32>()[..length];
                if let Some(stream) = streams.last_mut() {
                    let _ = stream.write(bytes);
                }
            }
        }
        let _ = (handle.list(), handle.state(container), handle.dropped());
    }
});
