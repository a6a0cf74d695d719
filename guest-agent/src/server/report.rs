//! Lines for the pod's agent.log (standard error).

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::stdio::{now, rfc3339};

/// Most lines in an agent's life; a fault that repeats must not fill the disk.
const MAX_LINES: u32 = 1000;

static WRITTEN: AtomicU32 = AtomicU32::new(0);

/// Writes one line, if it can be written.
pub(super) fn line(text: fmt::Arguments<'_>) {
    if WRITTEN.fetch_add(1, Ordering::Relaxed) >= MAX_LINES {
        return;
    }
    let time = rfc3339(now());
    let time = String::from_utf8_lossy(&time);
    // A full disk must not end the pod, so the result is not looked at.
    let _ = std::io::stderr().write_all(format!("{time} {text}\n").as_bytes());
}
