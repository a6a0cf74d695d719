//! What the pod and its containers have used, as messages.

use std::fs;
use std::io::Read;

use super::machine;
use super::ranges::{Kind, Occupied, Ranges, occupied};
use super::volumes::Volumes;
use crate::cgroup::{Leaf, PodCgroup};
use crate::protocol::messages::{CgroupUsage, Measured, Range, measured};
use crate::stdio::now;

/// Processes of one container whose descriptors are counted.
const MAX_PROCESSES: usize = 1024;
/// Descriptors of one container that are looked at: the agent does nothing else meanwhile.
const MAX_DESCRIPTORS: u64 = 16_384;
/// Most of a file in /proc that is read.
const MAX_FILE: u64 = 256 << 10;
/// Most interfaces that are told.
const MAX_INTERFACES: usize = 256;

/// What is known of the machine as a whole.
pub(crate) fn machine(pod: &PodCgroup, ranges: &Ranges, volumes: &Volumes) -> Measured {
    let disks = ranges.scratch().filter_map(|range| disk(ranges, &range));
    let volumes = volumes.occupied().map(|(id, Occupied { capacity, used, inodes, inodes_used })| {
        measured::Volume { id: id.to_owned(), capacity, used, inodes, inodes_used }
    });
    let (memory_total, memory_available) = machine::memory();
    Measured {
        at: now(),
        pod: pod.usage().ok().map(|usage| CgroupUsage::new(&usage, &pod.limits().unwrap_or_default())),
        containers: Vec::new(),
        interfaces: interfaces(&read("/proc/net/dev")),
        disks: disks.collect(),
        volumes: volumes.collect(),
        memory_total,
        memory_available,
        cpus_online: machine::online(),
    }
}

/// What is known of one container; `first` is its first process while it lives.
pub(crate) fn container(
    id: &str,
    leaf: &Leaf,
    first: Option<i32>,
    scratch: Option<&Range>,
    ranges: &Ranges,
) -> measured::Container {
    let pids = leaf.processes().unwrap_or_default();
    let mut found = measured::Container {
        id: id.to_owned(),
        cgroup: leaf.usage().ok().map(|usage| CgroupUsage::new(&usage, &leaf.limits().unwrap_or_default())),
        processes: pids.len() as u64,
        disk: scratch.and_then(|range| disk(ranges, range)),
        ..measured::Container::default()
    };
    for pid in pids.iter().take(MAX_PROCESSES) {
        count_descriptors(*pid, &mut found);
    }
    if let Some(first) = first {
        found.ulimits = ulimits(&read(&format!("/proc/{first}/limits"))).collect();
    }
    found
}

fn disk(ranges: &Ranges, range: &Range) -> Option<measured::Disk> {
    let path = ranges.path(Kind::Scratch, range)?;
    let Occupied { capacity, used, inodes, inodes_used } = occupied(&rustix::fs::statvfs(path).ok()?);
    Some(measured::Disk { range: Some(*range), capacity, used, inodes, inodes_used })
}

fn read(path: &str) -> String {
    let mut text = String::new();
    // Of a process that is gone there is nothing to read.
    let _ = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    text
}

fn count_descriptors(pid: i32, into: &mut measured::Container) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for entry in entries.flatten() {
        if into.descriptors >= MAX_DESCRIPTORS {
            return;
        }
        into.descriptors += 1;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if target.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
            into.sockets += 1;
        }
    }
}

/// proc_pid_net(5), "dev": two lines of headings, then one for each interface.
fn interfaces(text: &str) -> Vec<measured::Interface> {
    let lines = text.lines().skip(2).filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let numbers: Vec<u64> =
            counters.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        let side = |first: usize| {
            let [bytes, packets, errors, dropped] = *numbers.get(first..first + 4)? else { return None };
            Some(measured::Counters { bytes, packets, errors, dropped })
        };
        let (received, sent) = (side(0), side(8));
        Some(measured::Interface { name: name.trim().to_owned(), received, sent })
    });
    lines.filter(|one| one.name != "lo" && one.sent.is_some()).take(MAX_INTERFACES).collect()
}

/// proc_pid_limits(5): the soft limits that are numbers. A name is the words before the first limit, as cAdvisor
/// makes it: `Max open files` is `max_open_files`.
fn ulimits(text: &str) -> impl Iterator<Item = (String, u64)> {
    text.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let soft = words.iter().position(|word| *word == "unlimited" || word.parse::<u64>().is_ok())?;
        Some((words[..soft].join("_").to_ascii_lowercase(), words[soft].parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_tell_both_directions_without_the_loopback() {
        let text = "a\nb\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\nx: 1 2\n";
        let [eth0] = interfaces(text).try_into().unwrap();
        assert_eq!(eth0.received, Some(measured::Counters { bytes: 10, packets: 2, errors: 3, dropped: 4 }));
        assert_eq!(eth0.sent, Some(measured::Counters { bytes: 50, packets: 6, errors: 7, dropped: 8 }));
    }

    #[test]
    fn limits_that_are_numbers_have_cadvisors_names() {
        let text = "Limit  Soft Limit  Hard Limit  Units\n\
            Max cpu time              unlimited            unlimited            seconds\n\
            Max open files            1024                 4096                 files\n";
        assert_eq!(ulimits(text).collect::<Vec<_>>(), [("max_open_files".to_owned(), 1024)]);
    }

    #[test]
    fn descriptors_and_sockets_of_a_process_are_counted() {
        let pair = std::os::unix::net::UnixStream::pair().unwrap();
        let mut found = measured::Container::default();
        count_descriptors(std::process::id() as i32, &mut found);
        assert!(found.sockets >= 2 && found.descriptors > found.sockets);
        drop(pair);
    }
}
