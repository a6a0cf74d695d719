//! The VMM's and the guest's part: memory, queues, FUSE requests.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hull_vmm::protocol::BlockingConnection;
use hull_vmm::protocol::messages::{
    HaltQueues, MemoryRegion, Message, Queue, QueuePosition, ServeQueues, message::Body, request::Call,
    response::Outcome,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: u64 = 4 << 20;
const ENTRIES: u16 = 16;
const RING: u64 = 0x1_0000;
const AVAILABLE: u64 = RING + 0x1000;
const USED: u64 = RING + 0x2000;
const REQUEST: u64 = 0x2_0000;
const REPLY: u64 = 0x10_0000;
pub(crate) const REPLY_SIZE: u32 = 0x2_0000;

pub(crate) const ROOT: u64 = 1;
/// Opcodes of linux/fuse.h.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const CREATE: u32 = 35;
}

pub(crate) struct Guest {
    memory: GuestMemoryMmap<()>,
    file: File,
    kick: OwnedFd,
    call: OwnedFd,
    position: u16,
    unique: u64,
    connection: BlockingConnection,
    next_id: u64,
}

/// Numbers in the order and of the sizes of a C structure without holes.
#[derive(Default)]
pub(crate) struct Fields(pub(crate) Vec<u8>);

impl Fields {
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    pub(crate) fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(&[0])
    }
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

impl Guest {
    /// The VMM's end of a connection to hull-virtiofsd, and the other end.
    pub(crate) fn new() -> (Self, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let shared = file.try_clone().unwrap();
        let ranges = [(GuestAddress(0), SIZE as usize, Some(FileOffset::new(shared, 0)))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let connection = BlockingConnection::new(ours.into());
        let guest = Self {
            memory,
            file,
            kick: event(),
            call: event(),
            position: 0,
            unique: 0,
            connection,
            next_id: 0,
        };
        (guest, theirs.into())
    }

    pub(crate) fn ask(&mut self, call: Call, fds: &[&OwnedFd]) -> Outcome {
        self.next_id += 1;
        let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.connection.send(&Message::request(self.next_id, call, fds.len()), &borrowed).unwrap();
        match self.connection.recv().unwrap().unwrap().message.body {
            Some(Body::Response(response)) => response.outcome.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn hand_over(&self) -> ServeQueues {
        let position =
            QueuePosition { next_available: self.position.into(), next_used: self.position.into() };
        ServeQueues {
            regions: vec![MemoryRegion { address: 0, size: SIZE, offset: 0, file: 0 }],
            features: 0,
            queues: vec![
                // The driver has not set up the one for forgets.
                Queue { kick: 3, call: 4, ..Queue::default() },
                Queue {
                    size: ENTRIES.into(),
                    descriptor_table: RING,
                    available_ring: AVAILABLE,
                    used_ring: USED,
                    position: Some(position),
                    kick: 1,
                    call: 2,
                },
            ],
        }
    }

    pub(crate) fn serve_with(&mut self, call: ServeQueues) -> Outcome {
        let file: OwnedFd = self.file.try_clone().unwrap().into();
        let (kick, line) = (self.kick.try_clone().unwrap(), self.call.try_clone().unwrap());
        let (spare, spare_line) = (kick.try_clone().unwrap(), line.try_clone().unwrap());
        self.ask(Call::ServeQueues(call), &[&file, &kick, &line, &spare, &spare_line])
    }

    pub(crate) fn serve(&mut self) {
        let call = self.hand_over();
        let outcome = self.serve_with(call);
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }

    pub(crate) fn halt(&mut self) -> Vec<QueuePosition> {
        match self.ask(Call::HaltQueues(HaltQueues {}), &[]) {
            Outcome::Halted(halted) => halted.positions,
            other => panic!("{other:?}"),
        }
    }

    /// Puts a chain into the queue and tells the device: the bytes, and room for a reply.
    fn put(&mut self, request: &[u8], room: u32) {
        self.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let slot = self.position % ENTRIES;
        let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
            let mut bytes = Fields::default().u64(address).u32(length).0;
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        let next = u16::from(room > 0);
        let first = descriptor(REQUEST, request.len() as u32, next, 1);
        self.memory.write_slice(&first, GuestAddress(RING)).unwrap();
        self.memory.write_slice(&descriptor(REPLY, room, 2, 0), GuestAddress(RING + 16)).unwrap();
        let entry = GuestAddress(AVAILABLE + 4 + 2 * u64::from(slot));
        self.memory.write_obj(0_u16, entry).unwrap();
        self.position = self.position.wrapping_add(1);
        self.memory.write_obj(self.position, GuestAddress(AVAILABLE + 2)).unwrap();
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// Waits until the device has given the chain back; how many bytes it wrote.
    fn take(&self) -> Option<u32> {
        let used = || self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
        while used() != self.position {
            let mut ready = [PollFd::new(&self.call, PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            if poll(&mut ready, Some(&limit)).unwrap() == 0 {
                return None;
            }
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
        let slot = u64::from(self.position.wrapping_sub(1) % ENTRIES);
        Some(self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap())
    }

    /// The bytes of the reply to arbitrary bytes; `None` if nothing comes back.
    pub(crate) fn raw(&mut self, request: &[u8], room: u32) -> Option<Vec<u8>> {
        self.put(request, room);
        let length = self.take()?;
        let mut reply = vec![0; length as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        Some(reply)
    }

    pub(crate) fn header(&mut self, opcode: u32, node: u64, user: u32, length: usize) -> Fields {
        self.unique += 1;
        let header = Fields::default().u32(40 + length as u32).u32(opcode).u64(self.unique).u64(node);
        header.u32(user).u32(user).u32(1).u32(0)
    }

    /// A request of this user; the reply without its header, or the errno.
    pub(crate) fn call_as(
        &mut self,
        user: u32,
        opcode: u32,
        node: u64,
        body: Fields,
    ) -> Result<Vec<u8>, i32> {
        let request = self.header(opcode, node, user, body.0.len()).bytes(&body.0);
        let reply = self.raw(&request.0, REPLY_SIZE).expect("an answer");
        assert_eq!(u32_at(&reply, 0) as usize, reply.len());
        assert_eq!(u64_at(&reply, 8), self.unique);
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    pub(crate) fn call(&mut self, opcode: u32, node: u64, body: Fields) -> Result<Vec<u8>, i32> {
        self.call_as(0, opcode, node, body)
    }

    pub(crate) fn init(&mut self) {
        // FUSE_SUBMOUNTS, FUSE_HANDLE_KILLPRIV_V2.
        let flags = 1 << 27 | 1 << 28;
        let body = Fields::default().u32(7).u32(38).u32(1 << 20).u32(flags).bytes(&[0; 48]);
        self.call(op::INIT, 0, body).unwrap();
    }

    /// fuse_entry_out of the name.
    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Vec<u8>, i32> {
        self.call(op::LOOKUP, parent, Fields::default().name(name))
    }

    pub(crate) fn node(&mut self, parent: u64, name: &str) -> u64 {
        u64_at(&self.lookup(parent, name).unwrap_or_else(|errno| panic!("{name}: {errno}")), 0)
    }

    /// Creates a file as this user; its node and an open handle.
    pub(crate) fn create(&mut self, user: u32, parent: u64, name: &str) -> Result<(u64, u64), i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        let body = Fields::default().u32(flags).u32(0o100_644).u32(0).u32(0).name(name);
        let reply = self.call_as(user, op::CREATE, parent, body)?;
        Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
    }

    /// chmod or chown by the guest's root; `valid` are FATTR_* bits.
    pub(crate) fn set(&mut self, node: u64, valid: u32, mode: u32, owner: (u32, u32)) -> Result<(), i32> {
        let body =
            Fields::default().u32(valid).bytes(&[0; 64]).u32(mode).u32(0).u32(owner.0).u32(owner.1).u32(0);
        self.call(op::SETATTR, node, body).map(drop)
    }

    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.call(op::OPEN, node, Fields::default().u32(flags as u32).u32(0))?;
        Ok(u64_at(&reply, 0))
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let body = Fields::default().u64(handle).u64(0).u32(4096).u32(0).u64(0).u32(0).u32(0);
        self.call(op::READ, node, body)
    }

    pub(crate) fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Result<u32, i32> {
        let body = Fields::default().u64(handle).u64(0).u32(data.len() as u32).u32(0).u64(0).u32(0).u32(0);
        Ok(u32_at(&self.call(op::WRITE, node, body.bytes(data))?, 0))
    }

    /// The whole of a small file.
    pub(crate) fn content(&mut self, parent: u64, name: &str) -> Vec<u8> {
        let node = self.node(parent, name);
        let handle = self.open(node, libc::O_RDONLY).unwrap();
        self.read(node, handle).unwrap()
    }
}
