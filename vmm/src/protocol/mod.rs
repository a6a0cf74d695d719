//! The control protocol of hull-vmm and hull-virtiofsd: messages and frames. See proto/vmm.proto.

mod descriptors;
#[cfg(test)]
mod tests;

use hull_agent::protocol::{BlockingConnectionOf, FrameMessage, FrameOf, FrameReaderOf};

pub use descriptors::{Access, DescriptorError, Descriptors};
pub use hull_agent::protocol::{FrameError, FrameWriter, encode};

/// Messages, generated from proto/vmm.proto.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/hull.vmm.v1.rs"));
}

/// Most descriptors on one frame.
pub const MAX_DESCRIPTORS: u32 = 64;
/// Longest message in bytes that a VMM accepts: requests are small, and decoded a hostile one needs many times its size.
pub const MAX_REQUEST: usize = 64 << 10;
/// The agent's vsock port in the guest.
pub const AGENT_PORT: u32 = 1024;
/// Host's ids for the shared high range of a pod's user namespace, unless the jail says otherwise.
pub const HIGH_BASE: u32 = 1 << 31;

/// A frame of the control protocol.
pub type Frame = FrameOf<messages::Message>;
/// Reads frames of the control protocol.
pub type FrameReader = FrameReaderOf<messages::Message>;
/// A connection of the control protocol, for code that may wait.
pub type BlockingConnection = BlockingConnectionOf<messages::Message>;

impl FrameMessage for messages::Message {
    fn named_descriptors(&self) -> usize {
        // More than any frame may have makes the codec refuse it.
        if self.descriptors > MAX_DESCRIPTORS { usize::MAX } else { self.descriptors as usize }
    }
}

impl messages::Boot {
    /// A machine whose first descriptors are, in this order: /dev/kvm, kernel, initramfs, scratch disk, the listeners for
    /// streams and for control connections, console. The tap and those of the jail come after them.
    pub fn in_order(machine: messages::Machine, jail: messages::Jail) -> Self {
        Self {
            machine: Some(machine),
            jail: Some(jail),
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            scratch: 3,
            vsock_listener: 4,
            control_listener: 5,
            console: 6,
            tap: None,
            agent_port: 0,
        }
    }
}

impl messages::Message {
    /// A request with the number by which its response is known, and with so many descriptors.
    pub fn request(id: u64, call: messages::request::Call, descriptors: usize) -> Self {
        let body = messages::message::Body::Request(messages::Request { call: Some(call) });
        Self { id, descriptors: u32::try_from(descriptors).unwrap_or(u32::MAX), body: Some(body) }
    }

    /// The response to the request `id`.
    pub fn response(id: u64, outcome: messages::response::Outcome) -> Self {
        let body = messages::message::Body::Response(messages::Response { outcome: Some(outcome) });
        Self { id, descriptors: 0, body: Some(body) }
    }

    /// An event.
    pub fn event(kind: messages::event::Kind) -> Self {
        let body = messages::message::Body::Event(messages::Event { kind: Some(kind) });
        Self { id: 0, descriptors: 0, body: Some(body) }
    }
}
