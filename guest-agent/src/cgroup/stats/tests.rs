//! With files as they were recorded on a v2, a v1 and a hybrid machine, and once against this machine's kernel.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::super::control::{Control, Directories};
use super::super::hierarchies::Hierarchies;
use super::*;

const SOME_PRESSURE: &str = "some avg10=1.50 avg60=0.25 avg300=0.05 total=123456\n\
                             full avg10=0.50 avg60=0.10 avg300=0.01 total=23456\n";

/// A cgroup "pod/leaf" with these files: hierarchy ("unified" or v1 controllers joined by commas), file, text.
fn recorded(v2: bool, files: &[(&str, &str, &str)]) -> (tempfile::TempDir, Control) {
    let root = tempfile::tempdir().unwrap();
    let mut v1 = Vec::new();
    let mut unified = None;
    for (hierarchy, file, text) in files {
        let leaf = root.path().join(hierarchy).join("leaf");
        fs::create_dir_all(&leaf).unwrap();
        fs::write(leaf.join(file), text).unwrap();
        if *hierarchy == "unified" {
            unified = Some(hierarchy);
        } else if !v1.contains(hierarchy) {
            v1.push(*hierarchy);
        }
    }
    let open = |name: &str| fs::File::open(root.path().join(name)).unwrap();
    let hierarchies = Hierarchies::recorded(
        unified.map(|name| (open(name).into(), if v2 { &["cpu", "io", "memory", "pids"][..] } else { &[] })),
        v1.iter().map(|name| (open(name).into(), name.split(',').map(str::to_owned).collect())).collect(),
        v2,
    );
    let directories = Directories {
        hierarchies: Arc::new(hierarchies),
        path: "/pod".into(),
        v1: v1.iter().map(|name| Some(open(name).into())).collect(),
        unified: unified.map(|name| open(name).into()),
    };
    (root, Control { directories: Arc::new(directories), leaf: Some("leaf".into()), leaf_in_v1: true })
}

const V2: &[(&str, &str, &str)] = &[
    (
        "unified",
        "cpu.stat",
        "usage_usec 5000000\nuser_usec 3000000\nsystem_usec 2000000\nnice_usec 0\nnr_periods 40\nnr_throttled 4\n\
         throttled_usec 250000\nnr_bursts 0\nburst_usec 0\n",
    ),
    ("unified", "cpu.max", "20000 100000\n"),
    ("unified", "cpu.weight", "100\n"),
    ("unified", "memory.current", "50000000\n"),
    ("unified", "memory.peak", "60000000\n"),
    ("unified", "memory.max", "67108864\n"),
    ("unified", "memory.min", "0\n"),
    ("unified", "memory.swap.current", "4096\n"),
    ("unified", "memory.swap.max", "max\n"),
    (
        "unified",
        "memory.stat",
        "anon 10000000\nfile 30000000\nkernel 2000000\nkernel_stack 98304\nfile_mapped 5000000\nanon_thp 0\n\
         inactive_anon 1\nactive_anon 2\ninactive_file 20000000\nactive_file 10000000\npgfault 700\npgmajfault 7\n",
    ),
    ("unified", "memory.events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"),
    ("unified", "pids.current", "9\n"),
    ("unified", "pids.max", "max\n"),
    ("unified", "io.stat", "7:0 \n254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n"),
    ("unified", "cpu.pressure", SOME_PRESSURE),
    ("unified", "memory.pressure", SOME_PRESSURE),
    ("unified", "io.pressure", SOME_PRESSURE),
];

const V1: &[(&str, &str, &str)] = &[
    ("cpu", "cpu.stat", "nr_periods 40\nnr_throttled 4\nthrottled_time 250000000\n"),
    ("cpu", "cpu.shares", "1024\n"),
    ("cpu", "cpu.cfs_quota_us", "-1\n"),
    ("cpu", "cpu.cfs_period_us", "100000\n"),
    ("cpuacct", "cpuacct.usage", "5000000000\n"),
    ("cpuacct", "cpuacct.stat", "user 300\nsystem 200\n"),
    ("memory", "memory.usage_in_bytes", "50000000\n"),
    ("memory", "memory.max_usage_in_bytes", "60000000\n"),
    ("memory", "memory.limit_in_bytes", "67108864\n"),
    ("memory", "memory.memsw.limit_in_bytes", "134217728\n"),
    ("memory", "memory.soft_limit_in_bytes", "9223372036854771712\n"),
    ("memory", "memory.kmem.usage_in_bytes", "2000000\n"),
    ("memory", "memory.failcnt", "12\n"),
    ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
    (
        "memory",
        "memory.stat",
        "cache 1\nrss 2\nmapped_file 3\nswap 0\npgfault 600\npgmajfault 6\ninactive_file 4\n\
         hierarchical_memory_limit 67108864\ntotal_cache 30000000\ntotal_rss 10000000\ntotal_mapped_file 5000000\n\
         total_swap 4096\ntotal_pgfault 700\ntotal_pgmajfault 7\ntotal_inactive_file 20000000\n",
    ),
    ("pids", "pids.current", "9\n"),
    ("pids", "pids.max", "100\n"),
    (
        "blkio",
        "blkio.throttle.io_service_bytes_recursive",
        "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 0\n254:0 Total 12288\nTotal 12288\n",
    ),
    ("blkio", "blkio.throttle.io_serviced_recursive", "254:0 Read 1\n254:0 Write 2\nTotal 3\n"),
];

fn expected_memory() -> Memory {
    Memory {
        usage: 50_000_000,
        max_usage: Some(60_000_000),
        working_set: 30_000_000,
        rss: 10_000_000,
        cache: 30_000_000,
        mapped_file: 5_000_000,
        kernel: 2_000_000,
        swap: Some(4096),
        faults: 700,
        major_faults: 7,
        own_faults: 700,
        own_major_faults: 7,
        limit_hits: 12,
        oom_kills: 1,
    }
}

fn expected_cpu() -> Cpu {
    Cpu {
        usage: 5_000_000_000,
        user: 3_000_000_000,
        system: 2_000_000_000,
        periods: 40,
        throttled_periods: 4,
        throttled: 250_000_000,
    }
}

fn expected_io() -> DeviceIo {
    DeviceIo { major: 254, minor: 0, read_bytes: 4096, written_bytes: 8192, reads: 1, writes: 2 }
}

#[test]
fn a_v2_cgroup_tells_its_numbers() {
    let (_root, control) = recorded(true, V2);
    let usage = Reader(&control).usage().unwrap();
    assert_eq!(usage.cpu, Some(expected_cpu()));
    assert_eq!(usage.memory, Some(expected_memory()));
    assert_eq!(usage.io.last(), Some(&expected_io()));
    assert_eq!((usage.tasks, usage.tasks_limit), (Some(9), None));
    let pressure = usage.pressure.io.unwrap();
    assert_eq!((pressure.some.total, pressure.full.average_10), (123_456, 0.5));
    let limits = Reader(&control).limits().unwrap();
    assert_eq!(limits.cpu, CpuLimits { shares: Some(1024), quota: Some(20_000), period: Some(100_000) });
    assert_eq!(limits.memory, MemoryLimits { memory: Some(64 << 20), ..Default::default() });
}

#[test]
fn a_v1_cgroup_tells_the_same_numbers() {
    let (_root, control) = recorded(false, V1);
    let usage = Reader(&control).usage().unwrap();
    assert_eq!(usage.cpu, Some(expected_cpu()));
    let own = Memory { own_faults: 600, own_major_faults: 6, ..expected_memory() };
    assert_eq!(usage.memory, Some(own));
    assert_eq!(usage.io, [expected_io()]);
    assert_eq!((usage.tasks, usage.tasks_limit), (Some(9), Some(100)));
    assert_eq!(usage.pressure, Pressure::default());
    let limits = Reader(&control).limits().unwrap();
    assert_eq!(limits.cpu, CpuLimits { shares: Some(1024), quota: None, period: Some(100_000) });
    assert_eq!((limits.memory.swap, limits.memory.swap_as_written), (Some(64 << 20), Some(128 << 20)));
    assert_eq!(limits.memory.reservation, None);
}

#[test]
fn a_hybrid_machine_has_pressure_too() {
    let mut files = V1.to_vec();
    files.push(("unified", "cpu.pressure", SOME_PRESSURE));
    files.push(("unified", "memory.current", "1\n"));
    let (_root, control) = recorded(false, &files);
    let usage = Reader(&control).usage().unwrap();
    assert_eq!(usage.pressure.cpu.unwrap().some.average_60, 0.25);
    assert_eq!(usage.pressure.memory, None);
    assert_eq!(usage.memory.unwrap().usage, 50_000_000, "the memory controller is a v1 one");
}

#[test]
fn a_cgroup_that_is_gone_has_no_numbers() {
    let (root, control) = recorded(true, V2);
    fs::remove_dir_all(root.path().join("unified/leaf")).unwrap();
    assert_eq!(Reader(&control).usage().unwrap(), Usage::default());
    assert_eq!(Reader(&control).limits().unwrap(), Limits::default());
}

#[test]
fn garbage_in_a_file_is_no_number_and_no_failure() {
    let files = [
        ("unified", "cpu.stat", "usage_usec\nuser_usec x\n\n \n"),
        ("unified", "memory.current", "99999999999999999999999\n"),
        ("unified", "io.stat", "8:0 rbytes\n:\n8 rbytes=1\n"),
        ("unified", "cpu.pressure", "some\nfull avg10\nnone total=1\n"),
    ];
    let (_root, control) = recorded(true, &files);
    let usage = Reader(&control).usage().unwrap();
    assert_eq!(usage.cpu, Some(Cpu::default()));
    assert_eq!(usage.memory, None);
    assert_eq!(usage.io, [DeviceIo { major: 8, ..Default::default() }]);
    assert_eq!(usage.pressure.cpu, Some(Stalls::default()));
}

#[test]
fn this_machine_s_kernel_tells_what_a_process_used() {
    let hierarchies = Arc::new(Hierarchies::open(&super::super::discover().unwrap()).unwrap());
    let parent = format!("/hull-test-{}-stats", std::process::id());
    let pod = PodCgroup::open(hierarchies, &parent).unwrap();
    let leaf = pod.leaf("leaf").unwrap();
    leaf.create().unwrap();
    // A shell that waits until it is placed, so that what it uses is charged there.
    let mut child = std::process::Command::new("/bin/sh")
        .args(["-c", "read line; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; read line"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    leaf.enter(child.id().cast_signed()).unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    let (usage, of_pod, limits) = (leaf.usage().unwrap(), pod.usage().unwrap(), leaf.limits().unwrap());
    drop(stdin);
    child.wait().unwrap();
    leaf.remove().unwrap();
    pod.remove_created().unwrap();
    assert!(usage.cpu.unwrap().usage > 1_000_000, "{usage:?}");
    assert!(of_pod.cpu.unwrap().usage >= usage.cpu.unwrap().usage, "{of_pod:?}");
    let memory = usage.memory.unwrap();
    // What memory.stat adds comes up to two seconds late.
    assert!(memory.usage > 0 && memory.working_set <= memory.usage, "{memory:?}");
    assert_eq!(usage.tasks, Some(1));
    assert_eq!((limits.cpu.shares, limits.memory.memory), (Some(1024), None));
    let accounted = Path::new("/proc/pressure/cpu").exists();
    assert_eq!(usage.pressure.cpu.is_some(), accounted, "{usage:?}");
}
