//! Files of procfs and sysfs that tell of the host or change it. Absent ones are skipped by whoever hides them.

use std::path::Path;
use std::sync::OnceLock;

/// Hidden from containers that are not privileged: runtime-spec's example and what containerd and moby have added.
pub const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    // Counts of interrupts tell keystrokes and other tenants' activity (moby GHSA-6fw5-f8r9-fgfm).
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    // Power readings, from which other tenants' secrets have been derived (CVE-2020-8694).
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Read-only for containers that are not privileged.
pub const READONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// [`MASKED`] and, for each processor of this machine, its thermal_throttle directory, a side channel of the same
/// kind.
pub fn masked() -> Vec<String> {
    static THERMAL: OnceLock<Vec<String>> = OnceLock::new();
    let thermal = THERMAL.get_or_init(|| thermal_throttle_below(Path::new("/sys/devices/system/cpu")));
    MASKED.iter().map(|path| (*path).to_owned()).chain(thermal.iter().cloned()).collect()
}

fn thermal_throttle_below(directory: &Path) -> Vec<String> {
    // Without sysfs there is nothing to hide.
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let is_processor = |name: &str| {
        name.strip_prefix("cpu")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let mut found: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(is_processor))
        .map(|entry| entry.path().join("thermal_throttle"))
        .filter(|path| path.exists())
        .filter_map(|path| path.to_str().map(str::to_owned))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processors_throttling_is_hidden() {
        let machine = tempfile::tempdir().unwrap();
        for path in ["cpu0/thermal_throttle", "cpu12/thermal_throttle", "cpu1", "cpuidle/thermal_throttle"] {
            std::fs::create_dir_all(machine.path().join(path)).unwrap();
        }
        let found = thermal_throttle_below(machine.path());
        let expected = ["cpu0/thermal_throttle", "cpu12/thermal_throttle"];
        assert_eq!(found, expected.map(|path| machine.path().join(path).to_str().unwrap().to_owned()));
    }

    #[test]
    fn the_usual_paths_are_hidden_everywhere() {
        let masked = masked();
        assert!(MASKED.iter().all(|path| masked.iter().any(|have| have == path)));
        assert!(masked.iter().all(|path| path.starts_with("/proc/") || path.starts_with("/sys/")));
    }
}
