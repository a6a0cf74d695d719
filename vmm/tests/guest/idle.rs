//! What a machine costs that boots, and one that has nothing to do; run by hand. HULL_BENCH_CMDLINE is appended to the
//! kernel's command line (`initcall_debug`), and HULL_BENCH_LOOK is run with the VMM's number while the guest is there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::machine::Machine;

/// Nanoseconds that each thread has run, by its name (Documentation/scheduler/sched-stats.rst).
fn run_times(pid: i32) -> BTreeMap<String, u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut times = BTreeMap::new();
    for task in tasks.map(|task| task.unwrap().path()) {
        let name = fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        let text = fs::read_to_string(task.join("schedstat")).unwrap();
        *times.entry(name).or_default() += text.split(' ').next().unwrap().parse::<u64>().unwrap();
    }
    times
}

/// What KVM counts for the machine; nothing where debugfs is not mounted.
fn kvm_counts(pid: i32) -> BTreeMap<String, u64> {
    let Ok(machines) = fs::read_dir("/sys/kernel/debug/kvm") else { return BTreeMap::new() };
    let of_it = |path: &Path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&format!("{pid}-")))
    };
    let Some(directory) = machines.filter_map(|one| Some(one.ok()?.path())).find(|path| of_it(path)) else {
        return BTreeMap::new();
    };
    let files = fs::read_dir(directory).unwrap().filter_map(|file| Some(file.ok()?.path()));
    let count = |file: &Path| fs::read_to_string(file).ok()?.trim().parse().ok();
    let name = |file: &Path| file.file_name().unwrap().to_string_lossy().into_owned();
    files.filter_map(|file| count(&file).map(|count| (name(&file), count))).collect()
}

fn print_differences(what: &str, before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, unit: u64) {
    for (name, after) in after {
        let more = after.saturating_sub(*before.get(name).unwrap_or(&0)) / unit;
        if more > 0 {
            println!("{what} {name}: {more}");
        }
    }
}

#[test]
#[ignore = "measures for half a minute"]
fn what_an_idle_machine_costs_in_twenty_seconds() {
    let Some(mut machine) = Machine::boot(1, 128 << 20) else { return };
    let mut agent = machine.agent();
    agent.create(|_| ());
    std::thread::sleep(Duration::from_secs(10));
    let before = (run_times(machine.pid()), kvm_counts(machine.pid()));
    std::thread::sleep(Duration::from_secs(20));
    let after = (run_times(machine.pid()), kvm_counts(machine.pid()));
    print_differences("ms of the thread", &before.0, &after.0, 1_000_000);
    print_differences("KVM", &before.1, &after.1, 1);
}

#[test]
#[ignore = "measures for seconds"]
fn what_a_boot_costs() {
    for _ in 0..3 {
        let Some(mut machine) = Machine::boot(1, 128 << 20) else { return };
        let (started, listens) = machine.started();
        println!("agent started after {started} us, listens after {listens} us");
        print_differences("ms of the thread", &BTreeMap::new(), &run_times(machine.pid()), 1_000_000);
        print_differences("KVM", &BTreeMap::new(), &kvm_counts(machine.pid()), 1);
        println!("{}", machine.told());
        if let Some(program) = std::env::var_os("HULL_BENCH_LOOK") {
            let _ = std::process::Command::new(program).arg(machine.pid().to_string()).status();
        }
    }
}
