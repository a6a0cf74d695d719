//! How much each side may send (virtio 1.2, 5.10.6.3).
//!
//! What the guest may send is memory of ours that it may claim: a promise once made is kept, so all promises together
//! stay under one bound. Every stream always has [`LEAST`]; what goes beyond comes from the [`Pool`], and a stream asks for
//! more only as it proves that its reader takes what comes.

/// What every stream may have in flight and waiting, whatever the others do, in bytes.
pub(super) const LEAST: u32 = 4 << 10;
/// What a new stream may have, if the pool has it.
const FIRST: u32 = 16 << 10;
/// The most that one stream may have.
const MOST: u32 = 256 << 10;

/// What all streams together may have beyond [`LEAST`] each.
#[derive(Debug)]
pub(super) struct Pool {
    spare: u32,
    /// Bytes that came and could not be handed on yet.
    pub(super) waiting: usize,
}

impl Pool {
    pub(super) const fn new(bytes: u32) -> Self {
        Self { spare: bytes, waiting: 0 }
    }

    /// A window of `wanted` bytes, or what is fair when little is left.
    fn window(&self, wanted: u32) -> u32 {
        wanted.min(LEAST + self.spare / 4)
    }

    #[cfg(test)]
    pub(super) fn spare(&self) -> u32 {
        self.spare
    }
}

/// Credit for data from the guest. All counts are modulo 2^32, as in the packets.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Bytes that came.
    received: u32,
    /// Bytes that were handed on.
    forwarded: u32,
    /// Where the guest must stop. Never goes back.
    limit: u32,
    /// The window that this stream is worth.
    target: u32,
}

impl Incoming {
    pub(super) fn open(pool: &mut Pool) -> Self {
        let target = pool.window(FIRST);
        pool.spare -= target.saturating_sub(LEAST);
        Self { received: 0, forwarded: 0, limit: target, target }
    }

    /// What the guest may still send.
    fn open_credit(&self) -> u32 {
        self.limit.wrapping_sub(self.received)
    }

    /// Bytes from the pool that this stream holds.
    fn extra(&self) -> u32 {
        self.limit.wrapping_sub(self.forwarded).saturating_sub(LEAST)
    }

    /// Data came; false if the guest had no credit for it.
    pub(super) fn receive(&mut self, length: u32) -> bool {
        if length > self.open_credit() {
            return false;
        }
        self.received = self.received.wrapping_add(length);
        true
    }

    /// Data was handed on; true if the guest should hear of it before it stops for lack of credit.
    pub(super) fn forward(&mut self, length: u32, pool: &mut Pool) -> bool {
        let before = self.extra();
        self.forwarded = self.forwarded.wrapping_add(length);
        pool.spare += before - self.extra();
        if self.open_credit() > self.target / 2 {
            return false;
        }
        self.target = pool.window(self.target.saturating_mul(2).min(MOST)).max(LEAST);
        let held = self.limit.wrapping_sub(self.forwarded);
        if self.target > held {
            let before = self.extra();
            self.limit = self.forwarded.wrapping_add(self.target);
            pool.spare -= self.extra() - before;
        }
        true
    }

    /// The stream has ended.
    pub(super) fn close(&mut self, pool: &mut Pool) {
        pool.spare += self.extra();
        self.forwarded = self.limit;
    }

    /// For headers: all the room there is, used or not.
    pub(super) fn buffer(&self) -> u32 {
        self.limit.wrapping_sub(self.forwarded)
    }

    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded
    }
}

/// Credit for data to the guest, as it says: it only harms itself with nonsense, the data lies in buffers of its own.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    sent: u32,
    buffer: u32,
    forwarded: u32,
}

impl Outgoing {
    /// Takes what a header of the guest says.
    pub(super) fn update(&mut self, buffer: u32, forwarded: u32) {
        self.buffer = buffer;
        self.forwarded = forwarded;
    }

    /// What may be sent now.
    pub(super) fn available(&self) -> u32 {
        self.buffer.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    pub(super) fn send(&mut self, length: u32) {
        self.sent = self.sent.wrapping_add(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_whose_reader_keeps_up_gets_a_larger_window() {
        let mut pool = Pool::new(8 << 20);
        let mut credit = Incoming::open(&mut pool);
        assert_eq!(credit.buffer(), FIRST);
        for _ in 0..1000 {
            let length = credit.open_credit().min(4096);
            assert!(length > 0 && credit.receive(length));
            credit.forward(length, &mut pool);
        }
        assert!(credit.buffer() > MOST / 2 && credit.buffer() <= MOST, "{}", credit.buffer());
        credit.close(&mut pool);
        assert_eq!(pool.spare(), 8 << 20);
    }

    #[test]
    fn a_reader_that_stalls_is_told_of_no_new_room_and_excess_is_refused() {
        let mut pool = Pool::new(8 << 20);
        let mut credit = Incoming::open(&mut pool);
        assert!(credit.receive(FIRST));
        assert!(!credit.receive(1));
        assert_eq!((credit.buffer(), credit.forwarded()), (FIRST, 0));
        assert!(credit.forward(1, &mut pool));
        assert!(credit.receive(1));
    }

    #[test]
    fn promises_never_exceed_the_bound_however_many_streams_there_are() {
        let bound = 1 << 20;
        let mut pool = Pool::new(bound);
        let mut streams: Vec<Incoming> = Vec::new();
        for round in 0..2000_u32 {
            if streams.len() < 500 {
                streams.push(Incoming::open(&mut pool));
            }
            let number = (round as usize * 7919) % streams.len();
            let stream = &mut streams[number];
            let length = stream.open_credit().min(round % 5000);
            assert!(stream.receive(length));
            if round % 3 != 0 {
                stream.forward(length, &mut pool);
            }
            if round % 11 == 0 {
                streams.swap_remove(number).close(&mut pool);
            }
            let promised: u64 = streams.iter().map(|stream| u64::from(stream.extra())).sum();
            assert_eq!(promised + u64::from(pool.spare()), u64::from(bound));
            assert!(streams.iter().all(|stream| stream.target >= LEAST));
        }
        streams.iter_mut().for_each(|stream| stream.close(&mut pool));
        assert_eq!(pool.spare(), bound);
    }

    #[test]
    fn counts_wrap_around() {
        let mut pool = Pool::new(8 << 20);
        let mut credit =
            Incoming { received: u32::MAX - 10, forwarded: u32::MAX - 10, limit: 16373, target: FIRST };
        pool.spare -= credit.extra();
        for _ in 0..10 {
            assert!(credit.receive(4096));
            credit.forward(4096, &mut pool);
        }
        let mut outgoing = Outgoing { sent: u32::MAX - 1, buffer: 100, forwarded: u32::MAX - 1 };
        outgoing.send(50);
        assert_eq!(outgoing.available(), 50);
        outgoing.update(100, 20);
        assert_eq!(outgoing.available(), 72);
    }

    #[test]
    fn nonsense_credit_of_the_guest_is_none() {
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.available(), 0);
        outgoing.send(10);
        // More taken than was sent.
        outgoing.update(1000, 5000);
        assert_eq!(outgoing.available(), 0);
        outgoing.update(5, 0);
        assert_eq!(outgoing.available(), 0);
    }
}
