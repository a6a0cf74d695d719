use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddress};

use super::ring::Chain;
use super::session::Memory;

/// struct fuse_in_header and fuse_out_header of linux/fuse.h.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Where `unique` is in both.
const UNIQUE: std::ops::Range<usize> = 8..16;
/// Bytes of replies that the guest has no room for.
const SPARE: u32 = 4096;

/// Carries out FUSE requests. Whatever a request is, there is an answer to it, and nothing of it is believed.
pub(super) struct Requests {
    server: Server<PassthroughFs>,
    /// Memory of our own, for replies to requests that brought no room for one. Some (FORGET) have no reply; which those
    /// are is known only when the request is read, once, from memory that the guest may change meanwhile.
    spare: Arc<Memory>,
    spare_chain: Chain,
}

impl Requests {
    pub(super) fn new(files: PassthroughFs) -> io::Result<Self> {
        let (spare, spare_chain) = spare()?;
        Ok(Self { server: Server::new(files), spare, spare_chain })
    }

    /// Carries out the request; how many bytes were written to the guest.
    pub(super) fn handle(&self, memory: &Memory, chain: Chain) -> u32 {
        let Ok(reader) = Reader::new(memory, chain.clone()) else { return 0 };
        let Ok(writer) = Writer::new(memory, chain.clone()) else { return 0 };
        let mut header = [0; IN_HEADER];
        if reader.clone().read_exact(&mut header).is_err() {
            return 0;
        }
        if writer.available_bytes() < OUT_HEADER {
            if let Ok(spare) = Writer::new(&self.spare, self.spare_chain.clone()) {
                let _ = self.server.handle_message(reader, spare, None::<&mut ()>);
            }
            return 0;
        }
        match self.server.handle_message(reader, writer, None::<&mut ()>) {
            Ok(length) => u32::try_from(length).unwrap_or(0),
            // A request that makes no sense.
            Err(_) => fail(memory, chain, &header[UNIQUE]),
        }
    }
}

/// Answers EIO.
fn fail(memory: &Memory, chain: Chain, unique: &[u8]) -> u32 {
    let mut reply = [0; OUT_HEADER];
    reply[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
    reply[UNIQUE].copy_from_slice(unique);
    let written = Writer::new(memory, chain).is_ok_and(|mut writer| writer.write_all(&reply).is_ok());
    if written { OUT_HEADER as u32 } else { 0 }
}

/// A chain of one writable buffer, in memory that no guest has.
fn spare() -> io::Result<(Arc<Memory>, Chain)> {
    let memory = private(SPARE)?;
    let chain = chain(&memory, &[(BUFFERS, SPARE, true)])?;
    Ok((memory, chain))
}

/// Where buffers begin in memory of our own; the rings lie below.
const BUFFERS: u64 = 0x1000;

/// Memory for so many bytes of buffers.
fn private(bytes: u32) -> io::Result<Arc<Memory>> {
    let size = BUFFERS as usize + bytes as usize;
    let memory = Memory::from_ranges(&[(GuestAddress(0), size)]);
    memory.map(Arc::new).map_err(|error| io::Error::other(error.to_string()))
}

/// A chain of these buffers: address, length, whether it is for the reply.
fn chain(memory: &Arc<Memory>, buffers: &[(u64, u32, bool)]) -> io::Result<Chain> {
    const TABLE: u64 = 0;
    const AVAILABLE: u64 = 0x100;
    const USED: u64 = 0x200;
    let failed = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    for (index, (address, length, writable)) in buffers.iter().enumerate() {
        let next = if index + 1 < buffers.len() { VRING_DESC_F_NEXT } else { 0 };
        let flags = if *writable { VRING_DESC_F_WRITE | next } else { next };
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
        descriptor[14..].copy_from_slice(&(index as u16 + 1).to_le_bytes());
        let place = GuestAddress(TABLE + 16 * index as u64);
        memory.write_slice(&descriptor, place).map_err(|error| failed(&error))?;
    }
    // Flags 0, index 1; its one entry is descriptor 0.
    memory.write_slice(&[0, 0, 1, 0, 0, 0], GuestAddress(AVAILABLE)).map_err(|error| failed(&error))?;
    let mut queue = Queue::new(2).map_err(|error| failed(&error))?;
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let chain = queue.iter(Arc::clone(memory)).map_err(|error| failed(&error))?.next();
    chain.ok_or_else(|| failed(&"the queue is empty"))
}

/// Requests without a guest, for the fuzz target.
#[doc(hidden)]
pub struct Alone {
    requests: Requests,
    memory: Arc<Memory>,
}

impl Alone {
    /// Most bytes of a request and of a reply.
    pub const ROOM: u32 = 64 << 10;

    /// Serves the directory; `own_descriptors` is this process's /proc/self/fd.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(root: &str, own_descriptors: OwnedFd) -> io::Result<Self> {
        let files = PassthroughFs::new(super::config(root, 1000, own_descriptors))?;
        Ok(Self { requests: Requests::new(files)?, memory: private(2 * Self::ROOM)? })
    }

    /// Carries out the request, with so much room for its reply; the reply.
    ///
    /// # Errors
    /// It is longer than [`Self::ROOM`], or empty.
    pub fn request(&self, request: &[u8], room: u32) -> io::Result<Vec<u8>> {
        let (room, length) = (room.min(Self::ROOM), request.len() as u32);
        if length == 0 || length > Self::ROOM {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let failed = |error: vm_memory::GuestMemoryError| io::Error::other(error.to_string());
        let reply = BUFFERS + u64::from(Self::ROOM);
        self.memory.write_slice(request, GuestAddress(BUFFERS)).map_err(failed)?;
        let both = [(BUFFERS, length, false), (reply, room, true)];
        let buffers = if room == 0 { &both[..1] } else { &both };
        let written = self.requests.handle(&self.memory, chain(&self.memory, buffers)?);
        let mut bytes = vec![0; written as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(reply)).map_err(failed)?;
        Ok(bytes)
    }
}
