//! Finds the cgroup hierarchies in the mount table.

use std::path::Path;

use super::CgroupError;
use crate::protocol::messages::{CgroupLayout, CgroupV1Hierarchy};

/// Where init systems mount the hierarchies; what is mounted below it wins over mounts made elsewhere, such as the
/// bind mounts of other container runtimes.
const STANDARD: &str = "/sys/fs/cgroup";

/// Controllers of v1 (cgroup-v1/cgroups.rst); other words among a mount's options are flags.
const V1_CONTROLLERS: [&str; 15] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "debug",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// Finds the hierarchies in `/proc/self/mountinfo`. hulld does this once, at its start.
pub fn discover() -> Result<CgroupLayout, CgroupError> {
    let path = Path::new("/proc/self/mountinfo");
    let table = std::fs::read_to_string(path)
        .map_err(|error| CgroupError::Discover(format!("cannot read {}: {error}", path.display())))?;
    let layout = layout_of(&table);
    if layout.unified.is_empty() && layout.v1.is_empty() {
        return Err(CgroupError::Discover("no cgroup or cgroup2 filesystem is mounted".into()));
    }
    Ok(layout)
}

/// One mount of a cgroup filesystem.
struct CgroupMount {
    mount_point: String,
    /// `None` for cgroup2.
    controllers: Option<Vec<String>>,
}

fn layout_of(table: &str) -> CgroupLayout {
    let mut mounts: Vec<CgroupMount> = table.lines().filter_map(parse_line).collect();
    // Stable: among mounts in the standard place, the first of a hierarchy is the one its users know.
    mounts.sort_by_key(|mount| !is_standard(&mount.mount_point));

    let unified =
        mounts.iter().find(|mount| mount.controllers.is_none()).map(|mount| mount.mount_point.clone());
    let mut v1: Vec<CgroupV1Hierarchy> = Vec::new();
    for mount in mounts {
        let Some(controllers) = mount.controllers.filter(|controllers| !controllers.is_empty()) else {
            continue;
        };
        if !v1.iter().any(|known| known.controllers == controllers) {
            v1.push(CgroupV1Hierarchy { mount_point: mount.mount_point, controllers });
        }
    }
    // A v2 machine is one whose standard mount point is the cgroup2 filesystem itself, which is also how kubelet tells;
    // a stray v1 mount (net_cls for some VPN) does not make it hybrid.
    let has_v1_controllers =
        v1.iter().any(|one| one.controllers.iter().any(|name| !name.starts_with("name=")));
    let unified_controllers = match unified.as_deref() {
        Some(STANDARD) => true,
        Some(_) => !has_v1_controllers,
        None => false,
    };
    if unified_controllers {
        v1.clear();
    }
    CgroupLayout { unified: unified.unwrap_or_default(), unified_controllers, v1 }
}

fn is_standard(mount_point: &str) -> bool {
    mount_point.strip_prefix(STANDARD).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A line of proc_pid_mountinfo(5): id, parent, device, root, mount point, options, tags, `-`, type, source, super
/// options.
fn parse_line(line: &str) -> Option<CgroupMount> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mount_point = unescape(mount.split(' ').nth(4)?);
    let mut fields = filesystem.split(' ');
    match fields.next()? {
        "cgroup2" => Some(CgroupMount { mount_point, controllers: None }),
        "cgroup" => {
            let options = fields.nth(1)?.split(',');
            let controllers = options
                .filter(|option| V1_CONTROLLERS.contains(option) || option.starts_with("name="))
                .map(str::to_owned)
                .collect();
            Some(CgroupMount { mount_point, controllers: Some(controllers) })
        }
        _ => None,
    }
}

/// Undoes the octal escapes (`\040` for a space).
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
        31 23 0:27 / /opt/vpn/net_cls rw - cgroup net_cls rw,net_cls\n";
    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        90 23 0:30 / /var/lib/other/rootfs/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        32 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_v2_machine_is_told_by_its_standard_mount_point() {
        let layout = layout_of(V2);
        assert!(layout.unified_controllers);
        assert_eq!(layout.unified, "/sys/fs/cgroup");
        assert!(layout.v1.is_empty());
    }

    #[test]
    fn a_hybrid_machine_has_v1_controllers_and_a_unified_mount_without_them() {
        let layout = layout_of(HYBRID);
        assert!(!layout.unified_controllers);
        assert_eq!(layout.unified, "/sys/fs/cgroup/unified");
        let found: Vec<_> =
            layout.v1.iter().map(|one| (one.mount_point.as_str(), one.controllers.join("+"))).collect();
        assert_eq!(
            found,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", "cpu+cpuacct".to_owned()),
                ("/sys/fs/cgroup/systemd", "name=systemd".to_owned())
            ]
        );
    }

    #[test]
    fn a_mount_point_with_a_space_is_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/odd\9"), r"/odd\9");
    }
}
