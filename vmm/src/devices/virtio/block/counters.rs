use std::sync::atomic::{AtomicU64, Ordering};

/// What a block device has done since its birth. Counts only: no two of them need agree at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BlockStats {
    /// READ requests that succeeded, and their bytes.
    pub reads: u64,
    /// Bytes read by them.
    pub read_bytes: u64,
    /// WRITE requests that succeeded.
    pub writes: u64,
    /// Bytes written by them.
    pub written_bytes: u64,
    /// FLUSH requests that succeeded.
    pub flushes: u64,
    /// DISCARD and WRITE_ZEROES requests that succeeded.
    pub discards: u64,
    /// Reads that had to wait for the host's disk, because the host's cache did not have all of them.
    pub waited: u64,
    /// Requests that were refused or failed, with an answer.
    pub errors: u64,
    /// Of these, writes that failed because the host's file system is full.
    pub out_of_space: u64,
    /// Chains that had no place for an answer.
    pub malformed: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: Counter,
    pub(super) read_bytes: Counter,
    pub(super) writes: Counter,
    pub(super) written_bytes: Counter,
    pub(super) flushes: Counter,
    pub(super) discards: Counter,
    pub(super) waited: Counter,
    pub(super) errors: Counter,
    pub(super) out_of_space: Counter,
    pub(super) malformed: Counter,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn read(&self) -> BlockStats {
        BlockStats {
            reads: self.reads.get(),
            read_bytes: self.read_bytes.get(),
            writes: self.writes.get(),
            written_bytes: self.written_bytes.get(),
            flushes: self.flushes.get(),
            discards: self.discards.get(),
            waited: self.waited.get(),
            errors: self.errors.get(),
            out_of_space: self.out_of_space.get(),
            malformed: self.malformed.get(),
        }
    }
}
