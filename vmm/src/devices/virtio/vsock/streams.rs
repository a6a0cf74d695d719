//! All streams of a machine: who they are, whose turn it is, and what the guest's packets do to them.
//!
//! Knows sockets but no queues. Whatever the guest sends changes at most the stream that it names; what makes no sense
//! ends that stream with a reset.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::credit::Pool;
use super::packet::{Header, MAX_PAYLOAD, Op, Ports, TYPE_STREAM};
use super::stream::{Phase, ReadOutcome, Stream};
use super::{GUEST_PORT, HOST_CID, Service};

/// Most streams at a time.
pub(super) const MOST_STREAMS: usize = 1024;
/// Most of them that the guest may have opened.
pub(super) const MOST_OF_GUEST: usize = 512;
/// What waits for hosts that do not read, of all streams together, beyond [`super::credit::LEAST`] for each: 8 MiB.
const POOL: u32 = 8 << 20;
/// How long the guest may take to answer a request, and to forget a stream that has ended.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Resets for streams that do not exist, waiting to be sent. At this many, packets of the guest wait.
const MOST_RESETS: usize = 128;
/// What the kernel may hold of each stream for a host that does not read, in bytes (SO_SNDBUF; the kernel counts its
/// own overhead as much again).
const SEND_BUFFER: usize = 64 << 10;

/// The numbers of streams, which are also the host's ports of those that the host opened and their epoll tokens: far from
/// any port that means something, and never used again while others are left.
pub(super) const FIRST_ID: u32 = 1 << 30;
const LAST_ID: u32 = (1 << 31) - 1;

/// Whoever waits for sockets to become ready: the worker.
pub(super) trait Watch {
    /// Edge-triggered, both ways; an event comes at once if the socket is ready.
    fn watch(&mut self, socket: &OwnedFd, id: u32) -> io::Result<()>;
    fn forget(&mut self, socket: &OwnedFd);
}

/// What the guest is to get next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// A packet without data.
    Packet(Header),
    /// Data of this stream, at most so many bytes.
    Data(u32, u32),
}

/// Services of the host by port: what the guest may connect to.
pub(super) type Services = BTreeMap<u32, Arc<dyn Service>>;

/// Counts since birth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) opened: u64,
    pub(super) refused: u64,
    /// Streams that a packet ended which made no sense.
    pub(super) violations: u64,
    pub(super) to_guest: u64,
    pub(super) from_guest: u64,
}

pub(super) struct Streams {
    guest_cid: u64,
    services: Services,
    table: BTreeMap<u32, Box<Stream>>,
    /// Streams that the guest opened and still knows, by their ports.
    of_guest: BTreeMap<Ports, u32>,
    pool: Pool,
    /// Streams that have something for the guest, in the order of their turns; each at most once.
    round: VecDeque<u32>,
    resets: VecDeque<Ports>,
    next_id: u32,
    /// How many of the table the guest opened.
    opened_by_guest: usize,
    /// Some stream has a deadline.
    pub(super) has_deadline: bool,
    pub(super) counts: Counts,
}

impl Streams {
    pub(super) fn new(guest_cid: u64, services: Services) -> Self {
        Self {
            guest_cid,
            services,
            table: BTreeMap::new(),
            of_guest: BTreeMap::new(),
            pool: Pool::new(POOL),
            round: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: FIRST_ID,
            opened_by_guest: 0,
            has_deadline: false,
            counts: Counts::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.table.len() >= MOST_STREAMS
    }

    /// Bytes of this process that wait for hosts.
    pub(super) fn waiting(&self) -> usize {
        self.pool.waiting
    }

    /// Whether packets of the guest must wait until resets have been sent.
    pub(super) fn must_send_first(&self) -> bool {
        self.resets.len() >= MOST_RESETS
    }

    /// A host has connected.
    pub(super) fn connect(&mut self, socket: OwnedFd, now: Instant, watch: &mut dyn Watch) -> io::Result<()> {
        let id = self.free_id();
        let ports = Ports { host: id, guest: GUEST_PORT };
        let stream = self.add(id, ports, Phase::Connecting, socket, watch)?;
        stream.due.request = true;
        stream.deadline = Some(now + PATIENCE);
        self.has_deadline = true;
        self.enqueue(id);
        Ok(())
    }

    /// Puts all sockets under watch (again).
    pub(super) fn watch_all(&mut self, now: Instant, watch: &mut dyn Watch) -> io::Result<()> {
        for (id, stream) in &mut self.table {
            watch.watch(stream.socket(), *id)?;
            stream.deadline = stream.deadline.map(|_| now + PATIENCE);
        }
        Ok(())
    }

    /// Closes everything; the guest is told by other means.
    pub(super) fn clear(&mut self, watch: &mut dyn Watch) {
        let ids: Vec<u32> = self.table.keys().copied().collect();
        ids.into_iter().for_each(|id| self.remove(id, watch));
        self.resets.clear();
    }

    /// A packet of the guest, with the pieces of its chain that follow the header.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        payload: &mut Vec<VolatileSlice<'_>>,
        now: Instant,
        watch: &mut dyn Watch,
    ) {
        // Of somebody else, or to somebody else: there is nobody to answer (virtio 1.2, 5.10.6.4).
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            return;
        }
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let op = Op::from_number(header.op);
        let id = self.find(ports);
        if header.kind != TYPE_STREAM {
            // Answered, unless that could go on for ever.
            if op != Some(Op::Reset) {
                self.resets.push_back(ports);
            }
            return;
        }
        match (id, op) {
            (Some(id), Some(op)) => self.receive_known(id, op, header, payload, now, watch),
            (Some(id), None) => self.violation(id, watch),
            (None, Some(Op::Request)) => self.receive_request(ports, header, watch),
            // News of a stream that ended a moment ago.
            (None, Some(Op::Reset | Op::CreditUpdate)) => {}
            (None, _) => self.resets.push_back(ports),
        }
    }

    fn find(&self, ports: Ports) -> Option<u32> {
        let id = match self.of_guest.get(&ports) {
            Some(id) => *id,
            None => ports.host,
        };
        let stream = self.table.get(&id)?;
        (stream.ports == ports && stream.is_known_to_guest()).then_some(id)
    }

    fn receive_request(&mut self, ports: Ports, header: &Header, watch: &mut dyn Watch) {
        let allowed = self.opened_by_guest < MOST_OF_GUEST && !self.is_full();
        let service = self.services.get(&ports.host).filter(|_| allowed).cloned();
        let opened = service.and_then(|service| {
            let (ours, theirs) = pair().ok()?;
            let id = self.free_id();
            let stream = self.add(id, ports, Phase::Open, ours, watch).ok()?;
            stream.take_credit(header.buffer, header.forwarded);
            stream.due.response = true;
            service.accept(theirs);
            Some(id)
        });
        match opened {
            Some(id) => {
                self.of_guest.insert(ports, id);
                self.enqueue(id);
            }
            None => {
                self.counts.refused += 1;
                self.resets.push_back(ports);
            }
        }
    }

    fn receive_known(
        &mut self,
        id: u32,
        op: Op,
        header: &Header,
        payload: &mut Vec<VolatileSlice<'_>>,
        now: Instant,
        watch: &mut dyn Watch,
    ) {
        let Some(stream) = self.table.get_mut(&id) else { return };
        if op != Op::Reset {
            stream.take_credit(header.buffer, header.forwarded);
        }
        let makes_sense = match (stream.phase, op) {
            (Phase::Connecting, Op::Response) => {
                stream.phase = Phase::Open;
                stream.deadline = None;
                true
            }
            (Phase::Connecting | Phase::Closing, Op::Reset) => return self.remove(id, watch),
            (_, Op::Reset) => {
                stream.guest_is_gone();
                self.of_guest.remove(&stream.ports);
                true
            }
            (Phase::Open, Op::Data) => self.receive_data(id, header.length, payload),
            (Phase::Open | Phase::Closing, Op::Shutdown) => {
                self.receive_shutdown(id, header.flags);
                true
            }
            (Phase::Open, Op::CreditRequest) => {
                stream.due.credit = true;
                true
            }
            (Phase::Open, Op::CreditUpdate) => true,
            // What was under way when it learned that the host has gone.
            (Phase::Closing, Op::Data | Op::CreditRequest | Op::CreditUpdate) => true,
            _ => false,
        };
        if !makes_sense {
            return self.violation(id, watch);
        }
        self.settle(id, now, watch);
    }

    fn receive_data(&mut self, id: u32, length: u32, payload: &mut Vec<VolatileSlice<'_>>) -> bool {
        let Some(stream) = self.table.get_mut(&id) else { return true };
        let there: usize = payload.iter().map(VolatileSlice::len).sum();
        let is_whole = length as usize <= there.min(MAX_PAYLOAD);
        if !is_whole || !stream.may_send() || !stream.incoming.receive(length) {
            return false;
        }
        if length > 0 {
            crate::devices::virtio::vectored::limit(payload, length as usize);
            stream.write(payload, length, &mut self.pool);
            self.counts.from_guest += u64::from(length);
        }
        true
    }

    fn receive_shutdown(&mut self, id: u32, flags: u32) {
        let Some(stream) = self.table.get_mut(&id) else { return };
        if stream.has_guest_gone(flags) {
            // It waits for this reset; what it has sent still goes to the host.
            self.resets.push_back(stream.ports);
            self.of_guest.remove(&stream.ports);
            stream.guest_is_gone();
        } else {
            stream.guest_ends(flags);
        }
    }

    /// Something happened to a stream's socket.
    pub(super) fn wake(
        &mut self,
        id: u32,
        can_read: bool,
        can_write: bool,
        hung_up: bool,
        now: Instant,
        watch: &mut dyn Watch,
    ) {
        if let Some(stream) = self.table.get_mut(&id) {
            stream.wake(can_read, can_write, hung_up, &mut self.pool);
            self.settle(id, now, watch);
        }
    }

    /// Whether the guest is to get something.
    pub(super) fn has_turn(&self) -> bool {
        !self.resets.is_empty() || !self.round.is_empty()
    }

    /// How many streams wait for their turn.
    pub(super) fn round(&self) -> usize {
        self.round.len()
    }

    /// Takes the next turn. For data, [`Streams::read`] must follow.
    pub(super) fn take_turn(&mut self, now: Instant, watch: &mut dyn Watch) -> Option<Turn> {
        if let Some(ports) = self.resets.pop_front() {
            let header = Header { op: Op::Reset.number(), ..self.header(ports) };
            return Some(Turn::Packet(header));
        }
        while let Some(id) = self.round.pop_front() {
            let Some(stream) = self.table.get_mut(&id) else { continue };
            stream.queued = false;
            if let Some(op) = stream.due.take() {
                let header = self.header_of(id, op, 0);
                self.settle(id, now, watch);
                return Some(Turn::Packet(header));
            }
            let credit = stream.readable();
            if credit > 0 {
                return Some(Turn::Data(id, credit));
            }
        }
        None
    }

    /// Reads what the stream has for the guest into the pieces, which are no longer than the credit.
    pub(super) fn read(
        &mut self,
        id: u32,
        pieces: &[VolatileSlice<'_>],
        now: Instant,
        watch: &mut dyn Watch,
    ) -> ReadOutcome {
        let Some(stream) = self.table.get_mut(&id) else { return ReadOutcome::Nothing };
        let outcome = stream.read(pieces, &mut self.pool);
        if let ReadOutcome::Bytes(count) = outcome {
            self.counts.to_guest += u64::from(count);
        }
        self.settle(id, now, watch);
        outcome
    }

    /// The header of a packet with so many bytes of the stream's data.
    pub(super) fn data_header(&self, id: u32, length: u32) -> Header {
        self.header_of(id, Op::Data, length)
    }

    fn header_of(&self, id: u32, op: Op, length: u32) -> Header {
        let Some(stream) = self.table.get(&id) else { return Header::default() };
        Header {
            length,
            op: op.number(),
            flags: if op == Op::Shutdown { stream.told } else { 0 },
            buffer: stream.incoming.buffer(),
            forwarded: stream.incoming.forwarded(),
            ..self.header(stream.ports)
        }
    }

    fn header(&self, ports: Ports) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }

    /// Ends what the guest has kept waiting for too long. Returns when to look again.
    pub(super) fn expire(&mut self, now: Instant, watch: &mut dyn Watch) -> Option<Instant> {
        let late: Vec<(u32, Ports)> = self
            .table
            .iter()
            .filter(|(_, stream)| stream.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(id, stream)| (*id, stream.ports))
            .collect();
        for (id, ports) in late {
            self.remove(id, watch);
            self.resets.push_back(ports);
        }
        let next = self.table.values().filter_map(|stream| stream.deadline).min();
        self.has_deadline = next.is_some();
        next
    }

    /// The stream goes on, waits for its turn, or ends, by what it is now.
    fn settle(&mut self, id: u32, now: Instant, watch: &mut dyn Watch) {
        let Some(stream) = self.table.get_mut(&id) else { return };
        if stream.is_over() {
            return self.remove(id, watch);
        }
        if stream.has_host_gone() && !stream.due.shutdown {
            stream.phase = Phase::Closing;
            stream.deadline = Some(now + PATIENCE);
            stream.due = super::stream::Due::default();
            self.has_deadline = true;
        }
        stream.ask_if_stuck();
        if stream.due.any() || stream.readable() > 0 {
            self.enqueue(id);
        }
    }

    fn enqueue(&mut self, id: u32) {
        if let Some(stream) = self.table.get_mut(&id)
            && !stream.queued
        {
            stream.queued = true;
            self.round.push_back(id);
        }
    }

    /// The guest did what it must not do to a stream.
    fn violation(&mut self, id: u32, watch: &mut dyn Watch) {
        self.counts.violations += 1;
        if let Some(stream) = self.table.get(&id) {
            self.resets.push_back(stream.ports);
        }
        self.remove(id, watch);
    }

    fn add(
        &mut self,
        id: u32,
        ports: Ports,
        phase: Phase,
        socket: OwnedFd,
        watch: &mut dyn Watch,
    ) -> io::Result<&mut Stream> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
        watch.watch(&socket, id)?;
        self.counts.opened += 1;
        self.opened_by_guest += usize::from(ports.host < FIRST_ID);
        let stream = Box::new(Stream::new(ports, phase, socket, &mut self.pool));
        Ok(self.table.entry(id).or_insert(stream))
    }

    fn remove(&mut self, id: u32, watch: &mut dyn Watch) {
        let Some(mut stream) = self.table.remove(&id) else { return };
        watch.forget(stream.socket());
        stream.close(&mut self.pool);
        self.opened_by_guest -= usize::from(stream.ports.host < FIRST_ID);
        if self.of_guest.get(&stream.ports) == Some(&id) {
            self.of_guest.remove(&stream.ports);
        }
        if stream.queued {
            self.round.retain(|queued| *queued != id);
        }
    }

    fn free_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            self.next_id = if id == LAST_ID { FIRST_ID } else { id + 1 };
            if !self.table.contains_key(&id) {
                return id;
            }
        }
    }
}

fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}
