//! How much memory an idle agent holds. Needs root. The promise is about the program that is shipped: run with
//! HULL_AGENT=target-agent/x86_64-unknown-linux-gnu/agent/hull-agent; without it there is only a coarse bound.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::fs;
use std::path::Path;

use common::{Pod, until};

/// docs/SPECIFICATION.md: private memory of an idle pod's agent.
const PROMISED_KIB: u64 = 128;
/// docs/SPECIFICATION.md: what an idle pod's agent costs in its memory cgroup.
const PROMISED_CHARGE_KIB: u64 = 600;
const UNOPTIMISED_KIB: u64 = 4096;

fn private_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| -> u64 {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    field("Private_Clean:") + field("Private_Dirty:")
}

/// What the memory controller counts for the agent, in its cgroup or, on v1, in the pod's without the container's: its own pages and the kernel's for it (namespaces, mounts,
/// stacks), without the page cache of program and logs. Not the usage file: that is up to 512 KiB ahead of the truth,
/// because each processor charges in batches.
fn charged_kib(pod: &Pod) -> u64 {
    let v1 = Path::new("/sys/fs/cgroup/memory").exists();
    let root = if v1 { "/sys/fs/cgroup/memory" } else { "/sys/fs/cgroup" };
    let own = if v1 { "" } else { "agent/" };
    let read = |name: &str| fs::read_to_string(format!("{root}{}/{name}", pod.cgroup_parent)).unwrap();
    let stat = read(&format!("{own}memory.stat"));
    let field = |name: &str| -> u64 {
        stat.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap()
    };
    let kernel = || -> u64 {
        let of = |name: &str| read(name).trim().parse::<u64>().unwrap();
        of("memory.kmem.usage_in_bytes").saturating_sub(of("one/memory.kmem.usage_in_bytes"))
    };
    let bytes = if v1 { field("rss ") + kernel() } else { field("anon ") + field("kernel ") };
    bytes / 1024
}

#[test]
fn an_idle_agent_is_small_even_after_work() {
    let promised = if std::env::var_os("HULL_AGENT").is_some() { PROMISED_KIB } else { UNOPTIMISED_KIB };
    // The program's text belongs to all agents of a node together: with one agent alone it would count as private.
    let (mut neighbour, mut pod) = (Pod::new(), Pod::new());
    let born = private_kib(pod.agent_pid);
    for pod in [&mut neighbour, &mut pod] {
        pod.run("one", "seq 1 50000; sleep 1000");
        for _ in 0..20 {
            pod.exec("one", "seq 1 1000", 0);
        }
    }
    until("its output is logged", || pod.lines("one").len() == 50_000);
    let busy = private_kib(pod.agent_pid);
    // The buffers go two seconds after the last output.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    let idle = private_kib(pod.agent_pid);
    let charged = charged_kib(&pod);
    // Without optimisation, and relocated, the program has several times as much of its own: no number to go by.
    let which = if promised == PROMISED_KIB { "shipped" } else { "unoptimised, HULL_AGENT is not set" };
    println!(
        "private KiB ({which}): {born} at birth, {busy} busy, {idle} idle with one container; charged {charged} KiB"
    );
    assert!(
        born <= promised && idle <= promised,
        "{born} KiB at birth, {idle} KiB idle; promised are {promised}"
    );
    assert!(charged <= promised.max(PROMISED_CHARGE_KIB), "{charged} KiB charged");
    neighbour.stop();
    pod.stop();
}
