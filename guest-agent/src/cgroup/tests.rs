//! Against the kernel's real cgroups, of whichever version this machine has. Each test has a pod cgroup of its own,
//! `/hull-test-<pid>-<name>`, which is gone afterwards.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::devices::{Access, Kind, Rule};
use super::hierarchies::Version;
use super::*;
use crate::protocol::messages::{DeviceRule, HugepageLimit, Resources};

/// A pod's cgroup with one leaf.
struct Pod {
    parent: String,
    cgroup: PodCgroup,
    leaf: Leaf,
}

impl Pod {
    fn new(name: &str) -> Self {
        let parent = format!("/hull-test-{}-{name}/pod", std::process::id());
        let cgroup = PodCgroup::open(hierarchies(), &parent).unwrap();
        let leaf = cgroup.leaf("leaf").unwrap();
        leaf.create().unwrap();
        Self { parent, cgroup, leaf }
    }

    fn read(&self, controller: &str, file: &str) -> String {
        let control = self.leaf.control();
        let version = control.version_of(controller).unwrap();
        control.read(version, file).unwrap().trim().to_owned()
    }

    fn is_v1(&self, controller: &str) -> bool {
        matches!(self.leaf.control().version_of(controller), Some(Version::V1(_)))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.leaf.kill();
        let _ = self.leaf.remove();
        let _ = self.cgroup.remove_created();
    }
}

fn hierarchies() -> Arc<Hierarchies> {
    Arc::new(Hierarchies::open(&discover().unwrap()).unwrap())
}

/// A shell that waits for a line before it runs `script`, so that it can be placed first.
struct Waiting {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Waiting {
    fn new(script: &str) -> Self {
        let mut child = Command::new("/bin/sh")
            .args(["-c", &format!("read line; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        Self { child, stdin }
    }

    fn within(leaf: &Leaf, script: &str) -> Self {
        let waiting = Self::new(script);
        leaf.enter(waiting.pid()).unwrap();
        waiting
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn go(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    fn finish(mut self) -> (Option<i32>, String) {
        self.stdin = None;
        let mut output = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        (self.child.wait().unwrap().code(), output)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exists_anywhere(parent: &str) -> bool {
    let layout = discover().unwrap();
    let mut mounts: Vec<String> = layout.v1.into_iter().map(|one| one.mount_point).collect();
    mounts.push(layout.unified);
    mounts.iter().any(|mount| std::path::Path::new(&format!("{mount}{parent}")).exists())
}

#[test]
fn a_pod_and_its_leaf_come_and_go_without_a_trace() {
    let pod = Pod::new("trace");
    let parent = pod.parent.clone();
    assert_eq!(pod.cgroup.created_levels(), 2);
    assert!(exists_anywhere(&parent));
    // Making it again, and opening it again, is no error and counts nothing as made.
    pod.leaf.create().unwrap();
    assert_eq!(PodCgroup::open(hierarchies(), &parent).unwrap().created_levels(), 0);

    pod.leaf.remove().unwrap();
    pod.leaf.remove().unwrap();
    assert!(pod.cgroup.remove_created().unwrap());
    assert!(!exists_anywhere(parent.trim_end_matches("/pod")));
    assert!(pod.leaf.processes().unwrap().is_empty());
    assert_eq!(pod.leaf.oom_kills().unwrap(), 0);
}

#[test]
fn a_process_enters_every_hierarchy() {
    let pod = Pod::new("enter");
    let waiting = Waiting::within(&pod.leaf, "true");
    let membership = std::fs::read_to_string(format!("/proc/{}/cgroup", waiting.pid())).unwrap();
    let place = format!(":{}/leaf", pod.parent);
    let hierarchies = hierarchies();
    let joined = membership.lines().filter(|line| line.ends_with(&place)).count();
    assert_eq!(joined, hierarchies.v1.len() + usize::from(hierarchies.unified.is_some()), "{membership}");
    assert_eq!(pod.leaf.processes().unwrap(), [waiting.pid()]);
    assert!(!pod.leaf.try_remove().unwrap());
}

#[test]
fn kill_ends_everything_inside_nested_cgroups_included() {
    let pod = Pod::new("kill");
    let directories = &pod.leaf.control().directories;
    for (_, base) in directories.all() {
        rustix::fs::mkdirat(base, "leaf/nested", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    }
    // A loop that forks all the time is the hard case for whoever kills one by one.
    let mut forking = Waiting::within(&pod.leaf, "while :; do /bin/sleep 0.001 & done");
    forking.go();
    let sleeping = Waiting::within(&pod.leaf, "sleep 100");
    pod.leaf.kill().unwrap();
    assert_eq!(forking.finish().0, None);
    assert_eq!(sleeping.finish().0, None);
    pod.leaf.remove().unwrap();
}

#[test]
fn without_cgroup_kill_a_forking_container_ends_as_well() {
    let pod = Pod::new("freeze");
    let mut forking = Waiting::within(&pod.leaf, "while :; do /bin/sleep 0.01 & done");
    forking.go();
    std::thread::sleep(Duration::from_millis(20));
    kill::kill_one_by_one(pod.leaf.control()).unwrap();
    assert_eq!(forking.finish().0, None);
    assert!(pod.leaf.processes().unwrap().is_empty());
}

#[test]
fn what_is_frozen_stands_still_until_it_is_thawed() {
    let pod = Pod::new("still");
    let mut counting = Waiting::within(&pod.leaf, "while :; do /bin/true; done");
    counting.go();
    std::thread::sleep(Duration::from_millis(20));
    pod.leaf.freeze().unwrap();
    let newest = || pod.leaf.processes().unwrap();
    let before = newest();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(newest(), before, "a frozen loop has started processes");
    pod.leaf.thaw().unwrap();
    pod.leaf.thaw().unwrap();
    pod.leaf.kill().unwrap();
    assert_eq!(counting.finish().0, None);
    pod.leaf.remove().unwrap();
    pod.leaf.thaw().unwrap();
}

#[test]
fn memory_and_swap_limits_can_be_raised_and_lowered() {
    let pod = Pod::new("memory");
    let limits = |memory: i64, swap: Option<i64>| Resources {
        memory_limit: Some(memory),
        memory_swap_limit: swap,
        ..Resources::default()
    };
    const MIB: i64 = 1 << 20;
    let expect = |memory: &str, sum: &str, swap: &str| {
        if pod.is_v1("memory") {
            assert_eq!(pod.read("memory", "memory.limit_in_bytes"), memory);
            if pod.leaf.control().try_read(pod.leaf.control().version_of("memory").unwrap(), MEMSW).is_ok() {
                assert_eq!(pod.read("memory", MEMSW), sum);
            }
        } else {
            assert_eq!(pod.read("memory", "memory.max"), memory);
            let version = pod.leaf.control().version_of("memory").unwrap();
            if let Ok(text) = pod.leaf.control().try_read(version, "memory.swap.max") {
                assert_eq!(text.trim(), swap);
            }
        }
    };
    const MEMSW: &str = "memory.memsw.limit_in_bytes";
    for (memory, swap, sum) in
        [(64, None, 64), (128, Some(256), 256), (32, Some(48), 48), (512, Some(512), 512)]
    {
        pod.leaf.apply(&limits(memory * MIB, swap.map(|swap: i64| swap * MIB))).unwrap();
        let texts = [memory, sum, sum - memory].map(|amount| (amount * MIB).to_string());
        expect(&texts[0], &texts[1], &texts[2]);
    }
    pod.leaf.apply(&limits(64 * MIB, Some(-1))).unwrap();
    pod.leaf.apply(&limits(-1, Some(-1))).unwrap();
    pod.leaf.apply(&limits(64 * MIB, None)).unwrap();
    pod.leaf.apply(&limits(-1, None)).unwrap();
    assert!(pod.leaf.apply(&limits(64 * MIB, Some(MIB))).is_err());
    assert!(pod.leaf.apply(&limits(-2, None)).is_err());
}

#[test]
fn cpu_limits_are_written_in_the_machines_own_units() {
    let pod = Pod::new("cpu");
    let limits = |shares, quota, period| Resources {
        cpu_shares: shares,
        cpu_quota: quota,
        cpu_period: period,
        ..Resources::default()
    };
    let quota = || match pod.is_v1("cpu") {
        true => format!("{} {}", pod.read("cpu", "cpu.cfs_quota_us"), pod.read("cpu", "cpu.cfs_period_us")),
        false => pod.read("cpu", "cpu.max").replace("max", "-1"),
    };
    pod.leaf.apply(&limits(Some(1024), Some(50_000), Some(100_000))).unwrap();
    if pod.is_v1("cpu") {
        assert_eq!(pod.read("cpu", "cpu.shares"), "1024");
    } else {
        assert_eq!(pod.read("cpu", "cpu.weight"), "100");
    }
    assert_eq!(quota(), "50000 100000");
    pod.leaf.apply(&limits(None, None, Some(50_000))).unwrap();
    assert_eq!(quota(), "50000 50000");
    pod.leaf.apply(&limits(None, Some(20_000), None)).unwrap();
    assert_eq!(quota(), "20000 50000");
    pod.leaf.apply(&limits(Some(0), Some(-1), Some(100_000))).unwrap();
    assert_eq!(quota(), "-1 100000");
    assert!(pod.leaf.apply(&limits(None, None, Some(-5))).is_err());
}

#[test]
fn a_shorter_period_under_a_limited_pod_is_not_refused_for_its_intermediate_state() {
    let pod = Pod::new("period");
    let limits = |quota, period| Resources {
        cpu_quota: Some(quota),
        cpu_period: Some(period),
        ..Resources::default()
    };
    pod.cgroup.apply(&limits(100_000, 100_000)).unwrap();
    pod.leaf.apply(&limits(100_000, 100_000)).unwrap();
    // 100000/50000 would be two CPUs, more than the pod has.
    pod.leaf.apply(&limits(50_000, 50_000)).unwrap();
    pod.leaf.apply(&limits(100_000, 100_000)).unwrap();
}

#[test]
fn process_and_cpuset_limits_are_set_and_bad_ones_refused() {
    let pod = Pod::new("pids");
    let set = |pids_limit, cpus: &str| {
        let cpuset_cpus = cpus.to_owned();
        pod.leaf.apply(&Resources { pids_limit, cpuset_cpus, ..Resources::default() })
    };
    set(Some(17), "0").unwrap();
    assert_eq!(pod.read("pids", "pids.max"), "17");
    assert_eq!(pod.read("cpuset", "cpuset.cpus"), "0");
    set(Some(-1), "").unwrap();
    assert_eq!(pod.read("pids", "pids.max"), "max");
    assert!(set(None, "all").is_err());
    assert!(set(None, "0\n1").is_err());
}

#[test]
fn huge_pages_of_which_nothing_is_allowed_need_no_controller() {
    let pod = Pod::new("huge");
    let set = |page_size: &str, limit| {
        let hugepage_limits = vec![HugepageLimit { page_size: page_size.to_owned(), limit }];
        pod.leaf.apply(&Resources { hugepage_limits, ..Resources::default() })
    };
    set("2MB", 0).unwrap();
    set("512KB", 0).unwrap();
    assert!(matches!(set("512KB", 1 << 20), Err(CgroupError::MissingController { .. })));
    assert!(set("../2MB", 0).is_err());
    if pod.leaf.control().version_of("hugetlb") == Some(Version::V2) {
        set("2MB", 4 << 20).unwrap();
        assert_eq!(pod.read("hugetlb", "hugetlb.2MB.max"), (4 << 20).to_string());
    }
}

#[test]
fn unified_limits_name_one_file_of_a_controller_on_v2_and_nothing_on_v1() {
    let pod = Pod::new("unified");
    let set = |file: &str, value: &str| {
        let unified = [(file.to_owned(), value.to_owned())].into();
        pod.leaf.apply(&Resources { unified, ..Resources::default() })
    };
    for bad in
        ["memory", "memory.", ".max", "../memory.max", "memory.max/x", "cgroup.procs", "nothing.max", "a\n.b"]
    {
        assert!(set(bad, "1").is_err(), "{bad}");
    }
    if hierarchies().is_v2() {
        set("memory.high", "67108864").unwrap();
        set("memory.oom.group", "1").unwrap();
        assert_eq!(pod.read("memory", "memory.high"), "67108864");
        assert!(matches!(set("memory.nonsense", "1"), Err(CgroupError::MissingController { .. })));
    } else {
        assert!(set("memory.high", "67108864").unwrap_err().to_string().contains("cgroup v1"));
    }
}

#[test]
fn an_oom_kill_is_counted_and_announced() {
    let pod = Pod::new("oom");
    let limit = Resources { memory_limit: Some(16 << 20), ..Resources::default() };
    pod.leaf.apply(&limit).unwrap();
    let watch = pod.leaf.oom_watch().unwrap().unwrap();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    epoll::add(&poller, &watch, epoll::EventData::new_u64(7), watch.interest()).unwrap();
    let wait = |milliseconds: i64| {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 4];
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        epoll::wait(&poller, &mut events, Some(&timeout)).unwrap()
    };
    assert_eq!(wait(20), 0, "nothing has happened yet");

    let mut hungry = Waiting::within(&pod.leaf, "head -c 100000000 /dev/zero | tail -n 1 | wc -c");
    hungry.go();
    let start = Instant::now();
    while wait(200) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "no OOM event");
    }
    // On v1 the event comes a moment before the kill is counted.
    while watch.acknowledge().unwrap() == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "an OOM event without a kill");
        std::thread::sleep(Duration::from_millis(5));
    }
    pod.leaf.kill().unwrap();
    drop(hungry);
    assert!(pod.leaf.oom_kills().unwrap() >= 1);
    // The kernel tells changes of memory.events (v2) at most every 10 ms, so the last one may come late.
    std::thread::sleep(Duration::from_millis(100));
    watch.acknowledge().unwrap();
    assert_eq!(wait(20), 0, "an acknowledged watch is quiet");
}

/// Tries to open a device outside the default set, and one inside it.
const PROBE: &str =
    "if (: < /dev/kmsg) 2>&-; then echo kmsg; fi; if (: > /dev/null) 2>&-; then echo null; fi";

#[test]
fn only_allowed_devices_can_be_used() {
    let pod = Pod::new("devices");
    let probe = || {
        let mut waiting = Waiting::within(&pod.leaf, PROBE);
        waiting.go();
        waiting.finish().1
    };
    assert_eq!(probe(), "kmsg\nnull\n", "nothing is restricted at first");
    pod.leaf.restrict_devices(&default_device_rules()).unwrap();
    assert_eq!(probe(), "null\n");

    // An update replaces the rules.
    let kmsg = |allow| DeviceRule { allow, r#type: "c".into(), major: 1, minor: 11, access: "rwm".into() };
    let more: Vec<DeviceRule> = default_device_rules().into_iter().chain([kmsg(true)]).collect();
    pod.leaf.restrict_devices(&more).unwrap();
    assert_eq!(probe(), "kmsg\nnull\n");
    pod.leaf.restrict_devices(&[kmsg(true)]).unwrap();
    assert_eq!(probe(), "kmsg\n");

    let all = DeviceRule { allow: true, r#type: "a".into(), major: -1, minor: -1, access: "rwm".into() };
    pod.leaf.restrict_devices(std::slice::from_ref(&all)).unwrap();
    assert_eq!(probe(), "kmsg\nnull\n");
    pod.leaf.restrict_devices(&[all, kmsg(false)]).unwrap();
    assert_eq!(probe(), "null\n");
}

#[test]
fn the_bpf_program_restricts_devices_wherever_there_is_a_unified_hierarchy() {
    let pod = Pod::new("bpf");
    let control = pod.leaf.control();
    if control.directories.of(Version::V2).is_none() {
        return;
    }
    let rule = |allow, kind, major, minor, access| Rule { allow, kind, major, minor, access: Access(access) };
    let probe = || {
        let mut waiting = Waiting::within(&pod.leaf, PROBE);
        waiting.go();
        waiting.finish().1
    };
    let null = rule(true, Kind::Character, Some(1), Some(3), Access::READ | Access::WRITE);
    device_filter::attach(control, &[null]).unwrap();
    assert_eq!(probe(), "null\n");
    let everything = rule(true, Kind::Any, None, None, 7);
    let no_reading = rule(false, Kind::Character, Some(1), Some(11), Access::READ);
    device_filter::attach(control, &[everything, no_reading]).unwrap();
    assert_eq!(probe(), "null\n");
    device_filter::attach(control, &[everything, no_reading, rule(true, Kind::Character, Some(1), None, 7)])
        .unwrap();
    assert_eq!(probe(), "kmsg\nnull\n");
    device_filter::attach(control, &[]).unwrap();
    assert_eq!(probe(), "");
    let many: Vec<Rule> =
        (0..4000).map(|minor| rule(true, Kind::Block, Some(u32::MAX), Some(minor), 2)).collect();
    device_filter::attach(control, &many).unwrap();
    assert_eq!(probe(), "");

    let directory = files::open_directory(control.directory(Version::V2).unwrap(), "leaf").unwrap();
    assert_eq!(hull_sys::bpf::device_programs(directory.as_fd()).unwrap().len(), 1, "updates replace");
    device_filter::attach(control, &[everything]).unwrap();
    assert_eq!(probe(), "kmsg\nnull\n");
    assert!(hull_sys::bpf::device_programs(directory.as_fd()).unwrap().is_empty());
}

#[test]
fn pods_that_share_a_level_do_not_trip_over_each_others_end() {
    let shared = format!("/hull-test-{}-shared", std::process::id());
    let hierarchies = hierarchies();
    std::thread::scope(|scope| {
        for pod in 0..4 {
            let (shared, hierarchies) = (&shared, &hierarchies);
            scope.spawn(move || {
                for round in 0..20 {
                    let cgroup =
                        PodCgroup::open(hierarchies.clone(), &format!("{shared}/pod{pod}-{round}")).unwrap();
                    let leaf = cgroup.leaf("leaf").unwrap();
                    leaf.create().unwrap();
                    leaf.remove().unwrap();
                    cgroup.remove_created().unwrap();
                }
            });
        }
    });
    // The last to leave may have been one that had found the shared level made by another.
    PodCgroup::open_existing(hierarchies, &shared, 1).unwrap().remove_created().unwrap();
    assert!(!exists_anywhere(&shared));
}

#[test]
fn another_process_can_clear_away_what_a_dead_agent_made() {
    let pod = Pod::new("orphan");
    let waiting = Waiting::within(&pod.leaf, "sleep 100");
    let found = PodCgroup::open_existing(hierarchies(), &pod.parent, pod.cgroup.created_levels()).unwrap();
    let leaf = found.leaf("leaf").unwrap();
    assert_eq!(leaf.processes().unwrap(), [waiting.pid()]);
    leaf.kill().unwrap();
    assert_eq!(waiting.finish().0, None);
    leaf.remove().unwrap();
    assert!(found.remove_created().unwrap());
    assert!(!exists_anywhere(&pod.parent));
    // Once more, with nothing there.
    let nothing = PodCgroup::open_existing(hierarchies(), &pod.parent, 2).unwrap();
    nothing.leaf("leaf").unwrap().kill().unwrap();
    nothing.leaf("leaf").unwrap().remove().unwrap();
    assert!(nothing.remove_created().unwrap());
}

#[test]
fn what_kubelet_made_in_v1_alone_is_left_there() {
    let hierarchies = hierarchies();
    let parent = format!("/hull-test-{}-kubelet/pod", std::process::id());
    // kubelet's part, by way of a layout that has no unified hierarchy.
    let mut layout = discover().unwrap();
    if layout.v1.is_empty() || layout.unified.is_empty() {
        return;
    }
    layout.unified.clear();
    let kubelet = PodCgroup::open(Arc::new(Hierarchies::open(&layout).unwrap()), &parent).unwrap();

    let pod = PodCgroup::open(hierarchies.clone(), &parent).unwrap();
    assert!(!pod.is_own());
    let later = PodCgroup::open_existing(hierarchies, &parent, pod.created_levels()).unwrap();
    assert!(later.remove_created().unwrap());
    assert!(exists_anywhere(&parent), "kubelet's cgroups stay");
    assert!(kubelet.is_own());
    assert!(kubelet.remove_created().unwrap());
    assert!(!exists_anywhere(&parent), "the unified part went before");
}

#[test]
fn a_leaf_of_the_unified_hierarchy_gives_a_descriptor_to_clone_into() {
    let pod = Pod::new("clone");
    assert_eq!(pod.leaf.clone_fd().is_some(), hierarchies().unified.is_some());
    assert!(pod.cgroup.leaf("absent").unwrap().clone_fd().is_none());
}

#[test]
fn on_v2_a_pod_with_processes_of_its_own_is_refused_by_name() {
    let hierarchies = hierarchies();
    if !hierarchies.is_v2() {
        return;
    }
    let parent = format!("/hull-test-{}-internal", std::process::id());
    let above = PodCgroup::open(hierarchies.clone(), "/").unwrap();
    let leaf = above.leaf(&parent[1..]).unwrap();
    leaf.create().unwrap();
    let waiting = Waiting::within(&leaf, "true");
    let refused = PodCgroup::open(hierarchies, &parent).unwrap_err();
    drop(waiting);
    leaf.remove().unwrap();
    assert!(refused.to_string().contains(&parent), "{refused}");
    assert!(matches!(refused, CgroupError::InternalProcesses { .. }), "{refused}");
}

#[test]
fn hierarchies_are_what_the_layout_says_or_refused() {
    let mut layout = discover().unwrap();
    layout.unified = "/proc".to_owned();
    assert!(Hierarchies::open(&layout).unwrap_err().to_string().contains("/proc"));
    // The table of this machine names what /proc/self/cgroup knows.
    let found = discover().unwrap();
    let known = std::fs::File::open("/proc/self/cgroup").unwrap();
    let lines =
        BufReader::new(known).lines().map(Result::unwrap).filter(|line| !line.starts_with("0::")).count();
    assert!(found.unified_controllers || found.v1.len() == lines, "{found:?}");
}

#[test]
fn a_pods_own_cgroup_is_gone_although_another_pod_is_beside_it_and_not_while_something_is_below() {
    let parent = format!("/hull-test-shared-{}", std::process::id());
    let open = |name: &str| PodCgroup::open(hierarchies(), &format!("{parent}/{name}")).unwrap();
    let (one, other) = (open("one"), open("other"));
    one.leaf("unknown").unwrap().create().unwrap();
    assert!(!one.remove_created().unwrap());
    one.end_all_below().unwrap();
    assert!(one.remove_created().unwrap());
    assert!(other.exists());
    assert!(other.remove_created().unwrap());
    PodCgroup::open_existing(hierarchies(), &parent, 1).unwrap().remove_created().unwrap();
    assert!(!PodCgroup::open_existing(hierarchies(), &parent, 0).unwrap().exists());
}
