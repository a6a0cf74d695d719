//! Damaged and random requests against the real agent. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::Pod;
use hull_agent::protocol::messages::{Message, Request, message::Body, request::Call};
use hull_agent::protocol::{FrameReader, encode};

/// A small generator (xorshift), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Whether the agent would be right to end the pod.
fn is_a_stop(bytes: &[u8]) -> bool {
    let mut reader = FrameReader::new();
    reader.push(bytes, Vec::new());
    std::iter::from_fn(|| reader.next().ok().flatten()).any(|frame| {
        matches!(frame.message.body, Some(Body::Request(Request { call: Some(Call::StopSandbox(_)), .. })))
    })
}

#[test]
fn damaged_requests_never_harm_the_agent_or_its_containers() {
    let mut pod = Pod::new();
    let victim = pod.run("victim", "sleep 1000");
    let mut spec = pod.container("damaged", "exit 0");
    // Without descriptors it cannot succeed; what is tested is how it fails.
    spec.log = None;
    let request = Request { slots: Vec::new(), call: Some(Call::StartContainer(spec)) };
    let whole = encode(&Message { id: 1, body: Some(Body::Request(request)) }).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(6) {
            let position = 4 + random.below(bytes.len() - 4);
            bytes[position] ^= 1 << random.below(8);
        }
        if is_a_stop(&bytes) {
            continue;
        }
        let mut socket = UnixStream::connect(pod.path("socket")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(&bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        // An answer or a closed connection; never silence.
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
    }
    pod.client = pod.connect();
    let state = pod.client.state();
    assert_eq!(state.containers.len(), 1, "{state:?}");
    assert_eq!((state.containers[0].pid, &state.containers[0].exit), (victim, &None));
    pod.stop();
}
