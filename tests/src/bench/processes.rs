use std::collections::BTreeSet;
use std::fs;

/// Programs that containers of the benchmark run. Every other process that came with a pod is the runtime's.
const WORK: [&str; 8] = ["sleep", "sh", "yes", "head", "seq", "usleep", "busybox", "cat"];

/// What the kernel counts processor time in on x86-64, for programs: time(7).
const USER_HZ: f64 = 100.0;

/// One process, memory in KiB.
pub struct Process {
    pub command: String,
    pub private: u64,
    pub proportional: u64,
    pub resident: u64,
}

impl Process {
    /// It belongs to the runtime, not to what the containers do.
    pub fn is_overhead(&self) -> bool {
        !WORK.contains(&self.command.as_str())
    }
}

/// Every process in this program's network namespace: hack/bench gives it one of its own, so that the machine's other
/// processes are not counted. Pods are on the host's network for that.
pub fn all() -> BTreeSet<u32> {
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = network("self");
    let entries = fs::read_dir("/proc").expect("/proc");
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let ours = names.filter(|name| network(name) == own);
    ours.filter_map(|name| name.parse().ok()).collect()
}

/// None for a kernel thread and for what has ended.
pub fn of(pid: u32) -> Option<Process> {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
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

/// Processor seconds of a process with all its threads, and those of its children that it has waited for.
pub fn cpu_seconds(pid: u32) -> f64 {
    // proc_pid_stat(5): fields 14 to 17, counted from after the name, which may hold anything.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let ticks: u64 = fields.skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / USER_HZ
}

/// Lets the kernel measure the peak of resident memory from now on.
pub fn forget_peak(pid: u32) {
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The most resident memory since [`forget_peak`], in MiB.
pub fn peak_mib(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
