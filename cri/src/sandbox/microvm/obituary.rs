//! Why a machine is gone.

use std::path::Path;

use super::logs::{CONSOLE, VMM as LOG, tail};
use crate::sandbox::Obituary;

/// From what is known: `oom_kills` of the pod's cgroup, what the VMM had told, and what it and the guest's kernel wrote.
/// That the kernel killed the VMM for memory decides: whatever else was seen followed from that.
pub(super) fn write(oom_kills: u64, told: Option<Obituary>, directory: &Path) -> Obituary {
    if oom_kills > 0 {
        let message = "the pod's machine was killed: its pod reached its memory limit".to_owned();
        return Obituary { reason: "OOMKilled", message, oom_killed: true };
    }
    if let Some(told) = told {
        return told;
    }
    let console = tail(&directory.join(CONSOLE), 16 << 10);
    if let Some(panic) = console.lines().find(|line| line.contains("Kernel panic")) {
        let text: String = panic.chars().filter(|c| !c.is_control()).take(512).collect();
        return Obituary::of("GuestPanic", format!("the guest's kernel panicked: {text}"));
    }
    let said = tail(&directory.join(LOG), 512);
    let message = match said.lines().last() {
        Some(last) => format!("the pod's machine ended unexpectedly; its VMM wrote: {last}"),
        None => "the pod's machine ended unexpectedly".to_owned(),
    };
    Obituary::of("VMMLost", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_decides_then_what_was_told_then_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let told = || Some(Obituary::of("GuestSilent", "x"));
        assert_eq!(write(1, told(), directory.path()).reason, "OOMKilled");
        assert!(write(1, None, directory.path()).oom_killed);
        assert_eq!(write(0, told(), directory.path()).reason, "GuestSilent");
        assert_eq!(write(0, None, directory.path()).reason, "VMMLost");
        std::fs::write(directory.path().join(LOG), "one\nthe last\n").unwrap();
        assert!(write(0, None, directory.path()).message.ends_with("the last"));
        let text = "[ 1.0] fine\n[ 2.0] Kernel panic - not syncing: sysrq triggered crash\u{1b}[0m\n";
        std::fs::write(directory.path().join(CONSOLE), text).unwrap();
        let obituary = write(0, None, directory.path());
        assert_eq!(obituary.reason, "GuestPanic");
        assert!(obituary.message.contains("sysrq triggered crash[0m"), "{}", obituary.message);
    }
}
