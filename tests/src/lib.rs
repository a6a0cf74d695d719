//! The parts that the whole-system tests in tests/ share: a hulld of one's own, a real registry, images made on the
//! spot, an independent CRI client, and a look at what is left behind.
//!
//! A test panics when something it needs is missing: nothing is skipped silently.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

/// Measuring runtimes side by side.
pub mod bench;
/// The programs under test and where they are.
pub mod binaries;
/// A hulld with directories of its own.
pub mod daemon;
/// Images made from busybox-static, layer by layer.
pub mod image;
/// A registry that says whatever a test wants it to say.
pub mod liar;
/// MicroVM pods: whether this machine can run them, and tests of all kinds under that handler.
pub mod microvm;
/// Calls that the independent client does not know yet.
pub mod newer;
/// Requests as a kubelet would write them.
pub mod pod;
/// A docker-registry on loopback.
pub mod registry;
/// What is on the machine before and after.
pub mod residue;
/// System calls, counted.
pub mod strace;

use std::time::{Duration, Instant};

/// Asks until `probe` answers or `limit` has passed; panics with `what` then.
pub async fn eventually<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(started.elapsed() < limit, "did not happen within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The emulated machine is some twenty times slower: deadlines that only guard against hanging stretch there.
pub fn patience(seconds: u64) -> Duration {
    let factor = if std::env::var_os("HULL_IN_NODE").is_some() { 10 } else { 1 };
    Duration::from_secs(seconds * factor)
}

/// Where the unified hierarchy is mounted; None: nowhere.
pub fn unified_cgroups() -> Option<&'static str> {
    let is_unified = |path: &&str| std::path::Path::new(path).join("cgroup.controllers").exists();
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().find(is_unified)
}
