//! virtio-vsock (virtio 1.2, 5.10): streams between unix sockets of the host and ports of the guest.
//!
//! * Every connection that the listening socket gets becomes a stream to the guest's port [`GUEST_PORT`]. While the
//!   driver is not there, connections wait in the listener's backlog. A guest that does not answer for five seconds, or
//!   refuses, is a connection that closes.
//! * The guest may connect to the ports that have a [`Service`], and to nothing else.
//! * Ends travel both ways on their own: shutdown(2) of one direction, here or there, is the same on the other side.
//! * Each stream has credit both ways, and streams take turns: one that is not read holds up nobody but its writer.
//!
//! Bounds: 1024 streams, of which the guest may open 512. What the guest has sent and the host does not take: 4 KiB for
//! each stream and 8 MiB for all together, allocated only while something waits. What the host has sent stays in its
//! socket. A quiet stream costs about 500 bytes of this process (a test holds that), one socket and one epoll entry.
//!
//! A saved machine loses its streams: before the save the driver is sent a transport reset (5.10.6.7), and nothing else
//! until it has taken that.

mod credit;
/// The device.
mod device;
mod packet;
/// The queues, on the worker's thread.
mod pump;
mod stream;
mod streams;
#[cfg(test)]
mod tests;
mod waiting;

use std::os::fd::OwnedFd;

pub use device::{Vsock, VsockHandle, VsockMetrics};

/// The host's address (VMADDR_CID_HOST).
pub const HOST_CID: u64 = 2;
/// The guest's address.
pub const GUEST_CID: u64 = 3;
/// Where the agent listens in the guest.
pub const GUEST_PORT: u32 = 1024;

/// What answers at a port of the host.
pub trait Service: Send + Sync {
    /// Takes the host's end of a stream that the guest opened. Must not wait; dropping it closes the stream.
    fn accept(&self, stream: OwnedFd);
}
