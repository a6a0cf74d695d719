use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hull_sys::tun;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::device::Shared;
use super::stock::Stock;
use super::{HEADER, MAX_FRAME};
use crate::devices::virtio::vectored::{self, Direction};
use crate::devices::virtio::{
    Activation, ActiveQueue, Chain, Handler, Interrupt, Memory, QueueError, Registrar, SavedQueue,
};

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;

/// Frames to the guest before other events have their turn.
const BUDGET: usize = 256;
/// Most pieces of guest memory in a frame from the guest.
const MOST_PIECES: usize = 256;
/// Destination, source, type.
const ETHERNET: usize = 14;
/// Where the source address lies, behind the virtio-net header.
const SOURCE: std::ops::Range<usize> = HEADER + 6..HEADER + 12;
/// Room for a VLAN tag, which may come on top of the MTU.
const VLAN: usize = 4;
/// Where `num_buffers` lies in the header.
const NUM_BUFFERS: usize = 10;

/// The device at work.
pub(super) struct Pump {
    memory: Memory,
    interrupt: Interrupt,
    rx: ActiveQueue,
    tx: ActiveQueue,
    tap: Option<Arc<OwnedFd>>,
    shared: Arc<Shared>,
    /// Frames to the guest may be spread over chains.
    merging: bool,
    /// What the guest lets the tap leave to it.
    offload: u32,
    /// Longest frame that can come from the tap, with its header.
    longest: usize,
    stock: Stock,
    /// The tap may have frames.
    is_readable: bool,
    is_broken: bool,
}

struct Raw<'a>(&'a OwnedFd);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What became of a frame for the guest.
enum Received {
    /// It is in the guest's memory, or could not be.
    Frame,
    /// The tap has none now.
    Nothing,
}

impl Pump {
    pub(super) fn new(
        activation: Activation,
        tap: Option<Arc<OwnedFd>>,
        mtu: u16,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let offload = offload(|bit| activation.has(bit));
        let merging = activation.has(VIRTIO_NET_F_MRG_RXBUF);
        let two = <[ActiveQueue; 2]>::try_from(activation.queues);
        let [rx, tx] = two.map_err(|_| io::Error::other("a NIC has two queues"))?;
        let cut = usize::from(mtu) + ETHERNET + VLAN;
        let is_cut = offload & (tun::OFFLOAD_TSO4 | tun::OFFLOAD_TSO6) == 0;
        Ok(Self {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx,
            tx,
            tap,
            shared,
            merging,
            offload,
            longest: HEADER + if is_cut { cut } else { MAX_FRAME.max(cut) },
            stock: Stock::default(),
            is_readable: true,
            is_broken: false,
        })
    }

    pub(super) fn save_queues(&self) -> Vec<SavedQueue> {
        [&self.rx, &self.tx].map(ActiveQueue::save).into()
    }

    /// Frames of the tap into the guest's buffers.
    fn receive(&mut self) -> Result<(), QueueError> {
        let Some(tap) = self.tap.clone() else { return Ok(()) };
        let memory = self.memory.clone();
        let mut used = Vec::new();
        let mut frames = 0;
        self.rx.disable_notification(&memory)?;
        while self.is_readable && frames < BUDGET {
            if !self.has_room(&memory)? {
                break;
            }
            match self.receive_one(&tap, &memory, &mut used)? {
                Received::Frame => frames += 1,
                Received::Nothing => self.is_readable = false,
            }
        }
        if frames > 0 {
            self.rx.signal(&memory, &self.interrupt);
        }
        if frames == BUDGET {
            self.rx.kick_self();
        }
        Ok(())
    }

    /// Whether the longest frame would fit. If not, the driver notifies when it has more buffers.
    fn has_room(&mut self, memory: &Memory) -> Result<bool, QueueError> {
        let (longest, merging) = (self.longest, self.merging);
        if self.stock.fill(&mut self.rx, memory, &self.interrupt, longest, merging)? {
            return Ok(true);
        }
        if !self.rx.enable_notification(memory)? {
            return Ok(false);
        }
        self.stock.fill(&mut self.rx, memory, &self.interrupt, longest, merging)
    }

    fn receive_one(
        &mut self,
        tap: &OwnedFd,
        memory: &Memory,
        used: &mut Vec<(u16, u32)>,
    ) -> Result<Received, QueueError> {
        let pieces = self.stock.pieces(memory, self.merging);
        // The tap cuts what does not fit and does not say so: a byte beyond the room tells.
        let length = match vectored::read(tap.as_fd(), &pieces, &mut [0]) {
            Ok(length) if length > HEADER => length,
            Ok(_) => return Ok(Received::Frame),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Received::Frame),
            // Nothing now; or the tap is gone with its namespace, and nothing ever again.
            Err(_) => return Ok(Received::Nothing),
        };
        if length > self.stock.room(self.merging) {
            self.shared.dropped_to_guest.fetch_add(1, Ordering::Relaxed);
            return Ok(Received::Frame);
        }
        used.clear();
        self.stock.take(length, used);
        let mut header = pieces;
        vectored::skip(&mut header, NUM_BUFFERS);
        // At most as many as the queue has descriptors.
        vectored::copy_in(&header, &(used.len() as u16).to_le_bytes());
        self.rx.push_together(memory, used)?;
        self.shared.to_guest.add(length - HEADER);
        Ok(Received::Frame)
    }

    /// Frames of the guest to the tap, as many as the queue has room for.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let interrupt = self.interrupt.clone();
        let (tap, shared) = (self.tap.clone(), self.shared.clone());
        let mac = shared.mac();
        let mut pieces = Vec::new();
        self.tx.serve(&memory, &interrupt, |chain| {
            pieces.clear();
            match transmit_one(&memory, chain, mac, tap.as_deref(), &mut pieces) {
                Ok(length) => shared.from_guest.add(length),
                Err(Dropped::Spoofed) => drop(shared.spoofed.fetch_add(1, Ordering::Relaxed)),
                Err(Dropped::Other) => drop(shared.dropped_from_guest.fetch_add(1, Ordering::Relaxed)),
            }
            0
        })
    }

    fn check(&mut self, result: Result<(), QueueError>, registrar: &mut Registrar<'_>) {
        if result.is_err() && !self.is_broken {
            self.is_broken = true;
            self.interrupt.needs_reset();
            self.forget(registrar);
        }
    }

    fn forget(&self, registrar: &mut Registrar<'_>) {
        registrar.remove(&self.rx);
        registrar.remove(&self.tx);
        if let Some(tap) = &self.tap {
            registrar.remove(&Raw(tap));
        }
    }
}

impl Handler for Pump {
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
        if self.is_broken {
            return Ok(());
        }
        if let Some(tap) = &self.tap {
            tun::set_header_length(tap.as_fd(), HEADER as u32)?;
            tun::set_offload(tap.as_fd(), self.offload)?;
            // Edge-triggered: a guest without buffers leaves frames there.
            registrar.watch(&Raw(tap), TAP, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        registrar.watch(&self.rx, RX, EventSet::IN)?;
        registrar.watch(&self.tx, TX, EventSet::IN)?;
        self.is_readable = true;
        // What is in them already.
        self.rx.kick_self();
        self.tx.kick_self();
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, registrar: &mut Registrar<'_>) {
        if self.is_broken {
            return;
        }
        let result = match token {
            TX => {
                self.tx.take_kick();
                self.transmit()
            }
            _ => {
                if token == RX {
                    self.rx.take_kick();
                } else {
                    self.is_readable = true;
                }
                self.receive()
            }
        };
        self.check(result, registrar);
    }

    fn stop(&mut self) {
        self.stock.give_back(&mut self.rx);
    }
}

/// Why a frame of the guest does not leave.
enum Dropped {
    Spoofed,
    Other,
}

fn transmit_one<'m>(
    memory: &'m Memory,
    chain: Chain,
    mac: super::Mac,
    tap: Option<&OwnedFd>,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<usize, Dropped> {
    let total = vectored::collect(memory, chain, Direction::FromDriver, MOST_PIECES, pieces)
        .map_err(|_| Dropped::Other)?;
    if total > HEADER + MAX_FRAME {
        return Err(Dropped::Other);
    }
    // Copied, so that what was looked at is what is sent.
    let mut head = [0; HEADER + ETHERNET];
    if vectored::copy_out(pieces, &mut head) < head.len() {
        return Err(Dropped::Other);
    }
    if head.get(SOURCE) != Some(&mac[..]) {
        return Err(Dropped::Spoofed);
    }
    vectored::skip(pieces, head.len());
    let tap = tap.ok_or(Dropped::Other)?;
    // A full or refusing tap loses frames as a wire does.
    vectored::write(tap.as_fd(), &head, pieces).map(|_| total - HEADER).map_err(|_| Dropped::Other)
}

/// What the tap may leave to a guest that takes these features.
fn offload(has: impl Fn(u32) -> bool) -> u32 {
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let parts = [
        (VIRTIO_NET_F_GUEST_TSO4, tun::OFFLOAD_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, tun::OFFLOAD_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, tun::OFFLOAD_TSO_ECN),
    ];
    let mut sum =
        parts.iter().filter(|(bit, _)| has(*bit)).fold(tun::OFFLOAD_CHECKSUM, |sum, part| sum | part.1);
    if sum & (tun::OFFLOAD_TSO4 | tun::OFFLOAD_TSO6) == 0 {
        sum &= !tun::OFFLOAD_TSO_ECN;
    }
    sum
}
