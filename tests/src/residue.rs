use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// In the names of cgroups of a measurement that somebody runs at the same time, without the tests' lock.
const BENCHMARK: &str = "hull-bench";
/// In the paths and cgroups of what a test starts.
const OF_A_TEST: &str = "hull-e2e";
/// Most agents that wait for a pod with one hulld (cri/src/sandbox/prepared.rs, `COUNT`).
const PREPARED: usize = 4;

/// What a container runtime could leave behind on a machine, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residue {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    network_namespaces: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    links: BTreeSet<String>,
    nftables: BTreeSet<String>,
    loops: BTreeSet<String>,
}

impl Residue {
    /// As it is now. Looks only at what belongs to this test: processes and cgroups that were not there before show up
    /// in the difference.
    pub fn look() -> Residue {
        Residue {
            processes: processes(),
            mounts: lines("/proc/self/mountinfo")
                .iter()
                .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
                // A file system for a daemon's root is mounted before the daemon has its turn, by another test.
                .filter(|path| !path.contains("/hull-e2e-tmpfs-"))
                .collect(),
            network_namespaces: names("/run/netns"),
            cgroups: cgroups(),
            links: names("/sys/class/net"),
            nftables: nftables(),
            loops: names("/sys/block").into_iter().filter(|name| backed(name)).collect(),
        }
    }

    /// What is there now and was not there before; empty if nothing was left.
    pub fn since(before: &Residue) -> Vec<String> {
        let now = Residue::look();
        let mut left = Vec::new();
        let mut compare = |what: &str, before: &BTreeSet<String>, now: &BTreeSet<String>| {
            left.extend(now.difference(before).map(|name| format!("{what} {name}")));
        };
        compare("process", &before.processes, &now.processes);
        compare("mount", &before.mounts, &now.mounts);
        compare("network namespace", &before.network_namespaces, &now.network_namespaces);
        compare("cgroup", &before.cgroups, &now.cgroups);
        compare("link", &before.links, &now.links);
        compare("nft", &before.nftables, &now.nftables);
        compare("loop device", &before.loops, &now.loops);
        left
    }

    /// Waits up to two seconds (links are deleted in batches within one) and panics with what is left.
    pub async fn assert_none_since(before: &Residue) {
        let mut left = Vec::new();
        for _ in 0..100 {
            left = Residue::since(before);
            if left.is_empty() {
                return;
            }
            tokio::time::sleep(crate::patience(2) / 100).await;
        }
        panic!("left behind: {left:#?}");
    }
}

/// Removes what a failed test of a daemon with this bridge left of its network: the pins of namespaces that appeared
/// since `before` and are its own, its links and its nftables table.
pub fn clear_network_since(before: &Residue, bridge: &str, is_own_pod: impl Fn(&str) -> bool) {
    let quietly = |program: &str, arguments: &[&str]| {
        let _ = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    };
    for pin in names("/run/netns").difference(&before.network_namespaces) {
        if pin.strip_prefix("hull-").is_some_and(&is_own_pod) {
            let path = format!("/run/netns/{pin}");
            quietly("umount", &["-l", &path]);
            let _ = fs::remove_file(path);
        }
    }
    for link in names("/sys/class/net").difference(&before.links) {
        let master = fs::read_link(format!("/sys/class/net/{link}/master")).unwrap_or_default();
        if link == bridge || master.ends_with(bridge) {
            quietly("ip", &["link", "delete", link]);
        }
    }
    for family in ["inet", "ip", "ip6"] {
        quietly("nft", &["delete", "table", family, bridge]);
    }
}

/// Kills what runs in the cgroups below the one called `name`, and removes them.
pub fn end_cgroups(name: &str) {
    let groups = cgroups_named(name);
    for group in &groups {
        let _ = fs::write(group.join("cgroup.kill"), "1");
    }
    for group in groups.iter().rev() {
        for pid in lines(&group.join("cgroup.procs").display().to_string()) {
            if let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
    // What dies needs a moment to be gone.
    for _ in 0..50 {
        for group in groups.iter().rev() {
            let _ = fs::remove_dir(group);
        }
        if !groups.iter().any(|group| group.exists()) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Every cgroup below the one called `name`, in all hierarchies, parents first.
fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    if let Ok(entries) = fs::read_dir("/sys/fs/cgroup") {
        roots.extend(entries.flatten().map(|entry| entry.path()));
    }
    for root in roots {
        walk(&root.join(name), &mut found);
    }
    found
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    if !directory.is_dir() {
        return;
    }
    found.push(directory.to_owned());
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

/// Unmounts whatever is mounted below `directory`, the innermost first.
pub fn unmount_below(directory: &Path) {
    let table = lines("/proc/self/mountinfo");
    let points = table.iter().rev().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| Path::new(point).starts_with(directory)) {
        let _ = Command::new("umount").args(["-l", point]).stderr(Stdio::null()).status();
    }
}

/// Descendants of the test and everything that was reparented away from it: hull's programs, and whatever runs in a
/// cgroup whose name says that a test made it. Not what is dead and waits for the machine's own init: orphans of a
/// killed agent do, and some inits look after them only every few seconds.
fn processes() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut prepared = BTreeMap::new();
    for pid in names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let program = command.split(' ').next().unwrap_or("").rsplit('/').next().unwrap_or("");
        let is_others = group.contains(BENCHMARK) || program == "hulld" && !command.contains(OF_A_TEST);
        if is_others || is_dead_child_of_init(&pid) {
            continue;
        }
        let is_pods = group.contains(OF_A_TEST);
        if program == "hull-agent"
            && !is_pods
            && let Some(hulld) = Hulld::of_child(&pid)
        {
            // One that waits for a pod belongs to its hulld as a thread does, and ends with it.
            let count = prepared.entry(hulld.pid).or_insert(0);
            *count += 1;
            if *count <= PREPARED || !hulld.is_tests {
                continue;
            }
        }
        if matches!(program, "hull-agent" | "hulld" | "hull-vmm" | "hull-virtiofsd") || is_pods {
            found.insert(format!("{pid} {command}"));
        }
    }
    found
}

/// A hulld that runs.
struct Hulld {
    pid: String,
    is_tests: bool,
}

impl Hulld {
    /// The one that started this process. When a hulld ends, what it started has another parent.
    fn of_child(pid: &str) -> Option<Hulld> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned();
        let is_hulld = fs::read_to_string(format!("/proc/{parent}/comm")).ok()? == "hulld\n";
        let command = fs::read(format!("/proc/{parent}/cmdline")).ok()?;
        let is_tests = String::from_utf8_lossy(&command).contains(OF_A_TEST);
        is_hulld.then_some(Hulld { pid: parent, is_tests })
    }
}

/// proc(5), /proc/PID/stat: state and parent follow the name in parentheses.
fn is_dead_child_of_init(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with("Z 1 "))
}

fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    collect_cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
    found
}

fn collect_cgroups(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            let text = path.display().to_string();
            if text.contains("hull") && !text.contains(BENCHMARK) {
                found.insert(text);
            }
            if depth < 8 {
                collect_cgroups(&path, depth + 1, found);
            }
        }
    }
}

fn nftables() -> BTreeSet<String> {
    let Ok(output) = Command::new("nft").args(["list", "ruleset"]).output() else {
        return BTreeSet::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

fn backed(block_device: &str) -> bool {
    Path::new("/sys/block").join(block_device).join("loop/backing_file").exists()
}

fn lines(path: &str) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn names(directory: &str) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(directory) else { return BTreeSet::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
