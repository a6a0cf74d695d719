use std::io::{self, Read, Write};
use std::sync::Arc;

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
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
    const TABLE: u64 = 0;
    const AVAILABLE: u64 = 0x100;
    const USED: u64 = 0x200;
    const BUFFER: u64 = 0x1000;
    let failed = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let size = BUFFER as usize + SPARE as usize;
    let memory = Memory::from_ranges(&[(GuestAddress(0), size)]).map_err(|error| failed(&error))?;
    let mut descriptor = [0; 16];
    descriptor[..8].copy_from_slice(&BUFFER.to_le_bytes());
    descriptor[8..12].copy_from_slice(&SPARE.to_le_bytes());
    descriptor[12..14].copy_from_slice(&(VRING_DESC_F_WRITE as u16).to_le_bytes());
    memory.write_slice(&descriptor, GuestAddress(TABLE)).map_err(|error| failed(&error))?;
    // Flags 0, index 1; its one entry is descriptor 0.
    memory.write_slice(&[0, 0, 1, 0, 0, 0], GuestAddress(AVAILABLE)).map_err(|error| failed(&error))?;
    let mut queue = Queue::new(1).map_err(|error| failed(&error))?;
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let memory = Arc::new(memory);
    let chain = queue.iter(Arc::clone(&memory)).map_err(|error| failed(&error))?.next();
    Ok((memory, chain.ok_or_else(|| failed(&"the spare queue is empty"))?))
}
