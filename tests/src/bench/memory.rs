use std::collections::BTreeSet;

/// One process, memory in KiB.
pub struct Process {
    pub command: String,
    pub private: u64,
    pub proportional: u64,
    pub resident: u64,
}

/// Every process id there is.
pub fn processes() -> BTreeSet<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc");
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// None for a kernel thread and for what has ended.
pub fn of(pid: u32) -> Option<Process> {
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let sum = |names: &[&str]| {
        let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        rollup.lines().filter(|line| names.iter().any(|name| line.starts_with(name))).filter_map(value).sum()
    };
    Some(Process {
        command,
        private: sum(&["Private_Clean:", "Private_Dirty:"]),
        proportional: sum(&["Pss:"]),
        resident: sum(&["Rss:"]),
    })
}
