//! FUSE requests of a hostile guest, carried out on a directory in memory.
//!
//! The requests run on a thread whose root is that directory, as the server's own root holds only volumes: what a name
//! with `..` reaches is the same directory.
#![no_main]

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

use hull_fuzz::volumes::{enter_root, own_descriptors, prepare};
use hull_vmm::volumes::Alone;
use libfuzzer_sys::fuzz_target;

type Guest = (Sender<Vec<u8>>, std::sync::Mutex<Receiver<()>>);

/// The thread, which gets inputs and tells when it is done with one.
fn guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| {
        let (sender, inputs) = channel::<Vec<u8>>();
        let (done, finished) = channel();
        std::thread::spawn(move || {
            let own = own_descriptors();
            enter_root();
            let served = Alone::new("/volumes", own).unwrap();
            for input in inputs {
                prepare();
                play(&served, &input);
                let _ = done.send(());
            }
        });
        (sender, std::sync::Mutex::new(finished))
    })
}

/// Requests one after the other: opcode, node, room for the reply in units of 16 bytes, length and bytes of the body.
fn play(served: &Alone, input: &[u8]) {
    request(served, 26, 0, 255, &[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 16, 0, 255, 255, 255, 63]);
    let mut rest = input;
    let mut unique = 1;
    while let [opcode, node, room, length, after @ ..] = rest {
        let body = &after[..usize::from(*length).min(after.len())];
        rest = &after[body.len()..];
        unique += 1;
        request(served, *opcode % 60, u64::from(*node), *room, body);
        if unique > 64 {
            break;
        }
    }
    // And bytes as they are.
    let _ = served.request(input, 4096);
}

fn request(served: &Alone, opcode: u8, node: u64, room: u8, body: &[u8]) {
    let mut bytes = Vec::new();
    bytes.extend((40 + body.len() as u32).to_le_bytes());
    bytes.extend(u32::from(opcode).to_le_bytes());
    bytes.extend(4711_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    // A request that says INIT has 64 bytes.
    if opcode == 26 {
        bytes.resize(40 + 64, 0);
        bytes[..4].copy_from_slice(&104_u32.to_le_bytes());
    }
    let room = u32::from(room) * 16;
    let reply = served.request(&bytes, room).unwrap();
    assert!(reply.len() <= room as usize);
    if let Some(header) = reply.get(..16) {
        assert_eq!(header[8..16], 4711_u64.to_le_bytes(), "an answer to what was asked");
    }
}

fuzz_target!(|data: &[u8]| {
    let (inputs, finished) = guest();
    inputs.send(data.to_vec()).unwrap();
    // It ends early if the thread has panicked.
    finished.lock().unwrap().recv().expect("the request was carried out");
});
