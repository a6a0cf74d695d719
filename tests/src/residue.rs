use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

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

/// Descendants of the test and everything that was reparented away from it: hull's programs, and whatever runs in a
/// cgroup whose name says that a test made it.
fn processes() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for pid in names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let program = command.split(' ').next().unwrap_or("").rsplit('/').next().unwrap_or("");
        if program == "hull-agent" || program == "hulld" || group.contains("hull-e2e") {
            found.insert(format!("{pid} {command}"));
        }
    }
    found
}

fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in ["/sys/fs/cgroup"] {
        collect_cgroups(Path::new(root), 0, &mut found);
    }
    found
}

fn collect_cgroups(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            let text = path.display().to_string();
            if text.contains("hull") {
                found.insert(text);
            }
            if depth < 8 {
                collect_cgroups(&path, depth + 1, found);
            }
        }
    }
}

fn nftables() -> BTreeSet<String> {
    let Ok(output) = std::process::Command::new("nft").args(["list", "ruleset"]).output() else {
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
