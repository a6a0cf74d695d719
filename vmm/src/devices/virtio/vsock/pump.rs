use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::device::{Reset, Shared};
use super::packet::{HEADER, Header, MAX_PAYLOAD};
use super::stream::ReadOutcome;
use super::streams::{FIRST_ID, PATIENCE, Streams, Turn, Watch};
use crate::devices::virtio::vectored::{self, Direction};
use crate::devices::virtio::{
    Activation, ActiveQueue, Handler, Interrupt, Memory, QueueError, Registrar, SavedQueue,
};

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const LISTENER: u32 = 3;
const TIMER: u32 = 4;

/// Most pieces of guest memory in one packet.
const MOST_PIECES: usize = 64;
/// Most packets of one stream that one turn brings to the guest, and most turns' packets that share a round.
const MOST_PACKETS: usize = 16;
const ROUND: usize = 32;
/// Packets to the guest before other events have their turn.
const BUDGET: usize = 256;
/// Connections taken from the backlog at once.
const ACCEPTED: usize = 16;

/// How long connections wait when descriptors or memory for them are missing.
const DEAFNESS: Duration = Duration::from_secs(1);

/// virtio 1.2, 5.10.6.7: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The device at work: three queues, the listener, and the streams' sockets.
pub(super) struct Pump {
    memory: Memory,
    interrupt: Interrupt,
    rx: ActiveQueue,
    tx: ActiveQueue,
    event: ActiveQueue,
    listener: Arc<OwnedFd>,
    timer: Arc<OwnedFd>,
    is_timer_set: bool,
    is_listening: bool,
    /// There were no descriptors for a connection; they wait until the timer.
    is_deaf: bool,
    streams: Streams,
    reset: Reset,
    /// Chains of the guest wait until resets have been sent.
    is_tx_held: bool,
    /// The driver broke a queue.
    is_broken: bool,
    metrics: Arc<Shared>,
}

/// A raw descriptor for the worker.
struct Raw<'a>(&'a OwnedFd);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Watch for Registrar<'_> {
    fn watch(&mut self, socket: &OwnedFd, id: u32) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        Registrar::watch(self, &Raw(socket), id, events)
    }

    fn forget(&mut self, socket: &OwnedFd) {
        self.remove(&Raw(socket));
    }
}

/// A chain for a packet to the guest.
struct Place<'m> {
    head: u16,
    pieces: Vec<VolatileSlice<'m>>,
    /// Room for data, after the header.
    room: usize,
}

impl Pump {
    pub(super) fn new(
        activation: Activation,
        (listener, timer): (Arc<OwnedFd>, Arc<OwnedFd>),
        streams: Streams,
        reset: Reset,
        metrics: Arc<Shared>,
    ) -> io::Result<Self> {
        let three = <[ActiveQueue; 3]>::try_from(activation.queues);
        let [rx, tx, event] = three.map_err(|_| io::Error::other("a vsock device has three queues"))?;
        Ok(Self {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx,
            tx,
            event,
            listener,
            timer,
            is_timer_set: false,
            is_listening: false,
            is_deaf: false,
            streams,
            reset,
            is_tx_held: false,
            is_broken: false,
            metrics,
        })
    }

    pub(super) fn save_queues(&self) -> Vec<SavedQueue> {
        [&self.rx, &self.tx, &self.event].map(ActiveQueue::save).into()
    }

    /// Ends all streams and tells the driver; nothing else goes to it until it has taken that.
    pub(super) fn reset_transport(&mut self) -> Reset {
        self.streams.clear(&mut Unwatched);
        self.reset = Reset::Due;
        let result = self.send_reset();
        self.check(result);
        self.reset
    }

    fn send_reset(&mut self) -> Result<(), QueueError> {
        if self.reset != Reset::Due {
            return Ok(());
        }
        let memory = self.memory.clone();
        while let Some(chain) = self.event.pop(&memory)? {
            let head = chain.head_index();
            let mut pieces = Vec::new();
            let room = vectored::collect(&memory, chain, Direction::ToDriver, MOST_PIECES, &mut pieces);
            let fits = room.is_ok_and(|room| room >= TRANSPORT_RESET.len());
            let length = if fits { vectored::copy_in(&pieces, &TRANSPORT_RESET) } else { 0 };
            self.event.push(&memory, head, length as u32)?;
            self.event.signal(&memory, &self.interrupt);
            if fits {
                self.reset = Reset::Sent(self.event_buffers()?);
                break;
            }
        }
        Ok(())
    }

    /// Buffers that the driver has in the event queue.
    fn event_buffers(&mut self) -> Result<u16, QueueError> {
        let mut count = 0;
        while count < self.event.size() && self.event.pop(&self.memory)?.is_some() {
            count += 1;
        }
        (0..count).for_each(|_| self.event.unpop());
        Ok(count)
    }

    /// The driver has kicked the event queue.
    fn receive_event(&mut self) -> Result<(), QueueError> {
        self.event.enable_notification(&self.memory)?;
        self.send_reset()?;
        if let Reset::Sent(buffers) = self.reset
            && self.event_buffers()? > buffers
        {
            self.reset = Reset::None;
        }
        Ok(())
    }

    fn accept(&mut self, now: Instant, watch: &mut dyn Watch) {
        for _ in 0..ACCEPTED {
            if self.streams.is_full() {
                return;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&*self.listener, flags) {
                // What cannot be watched is closed.
                Ok(socket) => drop(self.streams.connect(socket, now, watch)),
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    self.is_deaf = error != Errno::AGAIN;
                    return;
                }
            }
        }
    }

    /// Takes the guest's packets, as many as the queue has room for; what comes on top has its turn later.
    fn receive(&mut self, now: Instant, watch: &mut dyn Watch) -> Result<(), QueueError> {
        self.is_tx_held = false;
        let memory = self.memory.clone();
        let mut taken = 0;
        let result = self.receive_some(&memory, &mut taken, now, watch);
        if taken > 0 {
            self.tx.signal(&memory, &self.interrupt);
        }
        result
    }

    fn receive_some(
        &mut self,
        memory: &Memory,
        taken: &mut u16,
        now: Instant,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        let mut pieces = Vec::new();
        self.tx.disable_notification(memory)?;
        while *taken < self.tx.size() {
            if self.streams.must_send_first() {
                self.is_tx_held = true;
                return Ok(());
            }
            let Some(chain) = self.tx.pop(memory)? else {
                if self.tx.enable_notification(memory)? {
                    self.tx.kick_self();
                    return self.not_stuck(memory);
                }
                return Ok(());
            };
            let head = chain.head_index();
            pieces.clear();
            // A chain that is none is given back; there is nobody to tell.
            if vectored::collect(memory, chain, Direction::FromDriver, MOST_PIECES, &mut pieces).is_ok()
                && let Some(header) = Header::read(&pieces)
            {
                vectored::skip(&mut pieces, HEADER);
                self.streams.receive(&header, &mut pieces, now, watch);
            }
            self.tx.push(memory, head, 0)?;
            *taken += 1;
        }
        self.tx.kick_self();
        Ok(())
    }

    /// Chains came between the last look and the enabling of notifications. If there is nothing still, the ring lies, and
    /// looking again would never end.
    fn not_stuck(&mut self, memory: &Memory) -> Result<(), QueueError> {
        if self.tx.pop(memory)?.is_none() {
            let reason = "chains are announced that are not there".to_owned();
            return Err(QueueError { index: self.tx.index, reason });
        }
        self.tx.unpop();
        Ok(())
    }

    /// Fills the guest's buffers, stream by stream.
    fn send(&mut self, now: Instant, watch: &mut dyn Watch) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let mut sent = 0;
        let result = self.send_some(&memory, &mut sent, now, watch);
        if sent > 0 {
            self.rx.signal(&memory, &self.interrupt);
        }
        result
    }

    fn send_some(
        &mut self,
        memory: &Memory,
        sent: &mut usize,
        now: Instant,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        self.rx.disable_notification(memory)?;
        while self.reset == Reset::None && self.streams.has_turn() {
            if *sent >= BUDGET {
                self.rx.kick_self();
                return Ok(());
            }
            let Some(place) = self.place(memory, sent)? else {
                // The driver gives more, and tells.
                if !self.rx.enable_notification(memory)? {
                    return Ok(());
                }
                let Some(place) = self.place(memory, sent)? else {
                    let reason = "buffers are announced that are not there".to_owned();
                    return Err(QueueError { index: self.rx.index, reason });
                };
                self.fill(memory, place, sent, now, watch)?;
                continue;
            };
            self.fill(memory, place, sent, now, watch)?;
        }
        Ok(())
    }

    /// The next usable chain for a packet. Chains that are of no use are given back.
    fn place<'m>(&mut self, memory: &'m Memory, sent: &mut usize) -> Result<Option<Place<'m>>, QueueError> {
        for _ in 0..self.rx.size() {
            let Some(chain) = self.rx.pop(memory)? else { return Ok(None) };
            let head = chain.head_index();
            let mut pieces = Vec::with_capacity(2);
            match vectored::collect(memory, chain, Direction::ToDriver, MOST_PIECES, &mut pieces) {
                Ok(room) if room > HEADER => {
                    let room = (room - HEADER).min(MAX_PAYLOAD);
                    return Ok(Some(Place { head, pieces, room }));
                }
                _ => {
                    self.rx.push(memory, head, 0)?;
                    *sent += 1;
                }
            }
        }
        Ok(None)
    }

    /// One turn: a packet without data, or data into this chain and, if there is more, into the following ones.
    fn fill<'m>(
        &mut self,
        memory: &'m Memory,
        first: Place<'m>,
        sent: &mut usize,
        now: Instant,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        match self.streams.take_turn(now, watch) {
            None => self.rx.unpop(),
            Some(Turn::Packet(header)) => {
                header.write(&first.pieces);
                self.rx.push(memory, first.head, HEADER as u32)?;
                *sent += 1;
            }
            Some(Turn::Data(id, credit)) => self.fill_data(memory, first, (id, credit), sent, now, watch)?,
        }
        Ok(())
    }

    fn fill_data<'m>(
        &mut self,
        memory: &'m Memory,
        first: Place<'m>,
        (id, credit): (u32, u32),
        sent: &mut usize,
        now: Instant,
        watch: &mut dyn Watch,
    ) -> Result<(), QueueError> {
        let most = (ROUND / (self.streams.round() + 1)).clamp(1, MOST_PACKETS);
        let mut room = first.room;
        let mut places = vec![first];
        while places.len() < most && room < credit as usize {
            // What is of no use stays for the next time it comes first: chains go back in order here.
            let Some(place) = self.next_place(memory)? else { break };
            room += place.room;
            places.push(place);
        }
        let mut body = Vec::with_capacity(places.len() * 2);
        for place in &places {
            let start = body.len();
            let mut pieces = place.pieces.clone();
            vectored::skip(&mut pieces, HEADER);
            vectored::limit(&mut pieces, place.room);
            body.extend(pieces);
            debug_assert!(body.len() > start);
        }
        vectored::limit(&mut body, credit as usize);
        let mut left = match self.streams.read(id, &body, now, watch) {
            ReadOutcome::Bytes(count) => count as usize,
            ReadOutcome::Nothing => 0,
        };
        for place in places {
            if left == 0 {
                self.rx.unpop();
                continue;
            }
            let count = left.min(place.room);
            self.streams.data_header(id, count as u32).write(&place.pieces);
            self.rx.push(memory, place.head, (HEADER + count) as u32)?;
            left -= count;
            *sent += 1;
        }
        Ok(())
    }

    /// The next chain, if it is usable; otherwise it stays where it is.
    fn next_place<'m>(&mut self, memory: &'m Memory) -> Result<Option<Place<'m>>, QueueError> {
        let Some(chain) = self.rx.pop(memory)? else { return Ok(None) };
        let head = chain.head_index();
        let mut pieces = Vec::with_capacity(2);
        match vectored::collect(memory, chain, Direction::ToDriver, MOST_PIECES, &mut pieces) {
            Ok(room) if room > HEADER => {
                let room = (room - HEADER).min(MAX_PAYLOAD);
                Ok(Some(Place { head, pieces, room }))
            }
            _ => {
                self.rx.unpop();
                Ok(None)
            }
        }
    }

    /// After each event: what has become possible, and what must be waited for.
    fn go_on(&mut self, now: Instant, registrar: &mut Registrar<'_>) {
        let was_held = self.is_tx_held;
        if !self.is_broken {
            let result = self.send(now, registrar);
            self.check(result);
        }
        if was_held && !self.streams.must_send_first() && !self.is_broken {
            // On its own turn, so that other events are not held up.
            self.is_tx_held = false;
            self.tx.kick_self();
        }
        if self.is_broken {
            self.give_up(registrar);
        }
        let can_listen = !self.is_broken && !self.is_deaf && !self.streams.is_full();
        let _ = self.set_listening(can_listen, registrar);
        if self.is_deaf && !self.is_timer_set {
            self.set_timer(DEAFNESS);
        }
        if self.streams.has_deadline && !self.is_timer_set {
            self.set_timer(PATIENCE);
        }
        self.metrics.store(&self.streams);
    }

    fn set_listening(&mut self, wanted: bool, registrar: &mut Registrar<'_>) -> io::Result<()> {
        if wanted && !self.is_listening {
            registrar.watch(&Raw(&self.listener), LISTENER, EventSet::IN)?;
        } else if !wanted && self.is_listening {
            registrar.remove(&Raw(&self.listener));
        }
        self.is_listening = wanted;
        Ok(())
    }

    fn set_timer(&mut self, after: Duration) {
        let after = after.max(Duration::from_millis(1));
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(after.subsec_nanos()),
            },
        };
        let set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        self.is_timer_set = set.is_ok();
    }

    fn check(&mut self, result: Result<(), QueueError>) {
        if result.is_err() && !self.is_broken {
            self.is_broken = true;
            self.interrupt.needs_reset();
        }
    }

    /// The queues are of no use: everybody is let go, and nothing is looked at until the driver resets the device.
    fn give_up(&mut self, registrar: &mut Registrar<'_>) {
        self.streams.clear(registrar);
        for queue in [&self.rx, &self.tx, &self.event] {
            registrar.remove(queue);
        }
        registrar.remove(&Raw(&self.timer));
    }
}

impl Handler for Pump {
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
        if self.is_broken {
            return Ok(());
        }
        let now = Instant::now();
        registrar.watch(&self.rx, RX, EventSet::IN)?;
        registrar.watch(&self.tx, TX, EventSet::IN)?;
        registrar.watch(&self.event, EVENT, EventSet::IN)?;
        registrar.watch(&Raw(&self.timer), TIMER, EventSet::IN)?;
        self.is_listening = false;
        self.is_timer_set = false;
        self.streams.watch_all(now, registrar)?;
        // What is in the queues already, and what nobody was asked to tell of.
        for queue in [&self.tx, &self.event] {
            queue.kick_self();
        }
        self.go_on(now, registrar);
        Ok(())
    }

    fn ready(&mut self, token: u32, events: EventSet, registrar: &mut Registrar<'_>) {
        if self.is_broken {
            return;
        }
        let now = Instant::now();
        match token {
            RX => {
                self.rx.take_kick();
            }
            TX => {
                self.tx.take_kick();
                let result = self.receive(now, registrar);
                self.check(result);
            }
            EVENT => {
                self.event.take_kick();
                let result = self.receive_event();
                self.check(result);
            }
            LISTENER => self.accept(now, registrar),
            TIMER => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.is_timer_set = false;
                self.is_deaf = false;
                if let Some(next) = self.streams.expire(now, registrar) {
                    self.set_timer(next.saturating_duration_since(now));
                }
            }
            FIRST_ID.. => {
                let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let can_read = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
                self.streams.wake(token, can_read, events.contains(EventSet::OUT), hung_up, now, registrar);
            }
            _ => {}
        }
        self.go_on(now, registrar);
    }
}

/// For streams of a device that rests: nobody watches them.
struct Unwatched;

impl Watch for Unwatched {
    fn watch(&mut self, _: &OwnedFd, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self, _: &OwnedFd) {}
}
