//! The price of moving a process between cgroups.
//!
//! A move (a write to `cgroup.procs`) takes a lock whose readers are all forks and exits of the machine. Unless moves
//! are frequent, each waits for an RCU grace period first, some 10 ms. The cgroup2 mount option `favordynmods` keeps
//! the lock ready for moves, at the price of a few nanoseconds for each fork: measured here on a hybrid machine, a
//! move into five hierarchies took 0.35 ms with it and 7 to 19 ms without. It is a property of the machine's one
//! cgroup2 hierarchy, which v1 hierarchies cannot change but profit from. v2 machines need it less, since processes
//! are born into their cgroups there.

use std::io;

use rustix::mount::{MountFlags, mount_remount};

use super::CgroupError;
use crate::protocol::messages::CgroupLayout;

const OPTION: &str = "favordynmods";

/// Options of cgroup2 that a remount must repeat, or it takes them away (cgroup-v2.rst, "Mounting").
const KEPT: [&str; 5] = [
    "nsdelegate",
    "memory_localevents",
    "memory_recursiveprot",
    "memory_hugetlb_accounting",
    "pids_localevents",
];

/// Makes moves cheap on the whole machine, or ordinary again. Returns what it was before. Without a cgroup2 mount
/// nothing can be done, which is an error; so it is on kernels before 6.0.
pub fn favor_moves(layout: &CgroupLayout, favor: bool) -> Result<bool, CgroupError> {
    let mount_point = &layout.unified;
    let fail = |source: io::Error| CgroupError::Hierarchy { mount_point: mount_point.clone(), source };
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(fail)?;
    let present = options_of(&table, mount_point).ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
    let favored = present.contains(&OPTION);
    if favored == favor {
        return Ok(favored);
    }
    let mut options: Vec<&str> = present.into_iter().filter(|option| KEPT.contains(option)).collect();
    if favor {
        options.push(OPTION);
    }
    // The hierarchy's own options change (its superblock's), not those of the mount, which are repeated.
    let flags = flags_of(&table, mount_point);
    mount_remount(mount_point.as_str(), flags, options.join(",").as_str())
        .map_err(|errno| fail(errno.into()))?;
    Ok(favored)
}

/// The line of the topmost cgroup2 mount at `mount_point`: its own options and those of its superblock.
fn line_of<'a>(table: &'a str, mount_point: &str) -> Option<(&'a str, &'a str)> {
    table.lines().rev().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(4);
        let mut about = filesystem.split(' ');
        let ours = fields.next()? == mount_point && about.next()? == "cgroup2";
        ours.then_some((fields.next()?, about.nth(1)?))
    })
}

fn options_of<'a>(table: &'a str, mount_point: &str) -> Option<Vec<&'a str>> {
    Some(line_of(table, mount_point)?.1.split(',').collect())
}

fn flags_of(table: &str, mount_point: &str) -> MountFlags {
    let known = [
        ("ro", MountFlags::RDONLY),
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
        ("noatime", MountFlags::NOATIME),
        ("nodiratime", MountFlags::NODIRATIME),
        ("relatime", MountFlags::RELATIME),
    ];
    let own = line_of(table, mount_point).map_or("", |(own, _)| own);
    let set = known.into_iter().filter(|(name, _)| own.split(',').any(|option| option == *name));
    set.fold(MountFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_present_options_are_those_of_the_topmost_cgroup2_mount() {
        let table = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
            31 30 0:27 / /x rw - tmpfs cgroup2 rw\n";
        assert_eq!(options_of(table, "/sys/fs/cgroup").unwrap(), ["rw", "nsdelegate"]);
        let flags = flags_of(table, "/sys/fs/cgroup");
        assert_eq!(flags, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RELATIME);
        assert!(options_of(table, "/x").is_none());
    }

    #[test]
    fn moves_can_be_favored_and_unfavored() {
        let layout = super::super::discover().unwrap();
        if layout.unified.is_empty() {
            return;
        }
        let before = favor_moves(&layout, true).unwrap();
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(options_of(&table, &layout.unified).unwrap().contains(&OPTION));
        assert!(favor_moves(&layout, before).unwrap());
        let after = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(options_of(&after, &layout.unified).unwrap().contains(&OPTION), before);
    }
}
