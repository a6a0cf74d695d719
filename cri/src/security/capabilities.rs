//! Capabilities: their names, the default set, and the sets that a container gets. Sets are bit masks, bit n being
//! capability number n of linux/capability.h.

use std::sync::OnceLock;

/// Names by number, without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has that asks for nothing: the set that Docker chose and every runtime has kept, so images rely on
/// it.
pub const DEFAULT: u64 = set_of(&[
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
]);

/// Why a capability was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CapabilityError {
    /// The kernel's list has no such name.
    #[error("there is no capability called {0:?}")]
    Unknown(String),
}

/// The five sets of a process (capabilities(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    /// What execve can ever give.
    pub bounding: u64,
    /// What the kernel checks.
    pub effective: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// Kept over execve by files that ask for it; empty unless ambient ones are asked for (CVE-2022-24769).
    pub inheritable: u64,
    /// Kept over execve of ordinary files by processes that are not root.
    pub ambient: u64,
}

/// The number of a capability. Upper and lower case, with or without `CAP_`.
pub fn parse(name: &str) -> Result<u8, CapabilityError> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .position(|known| *known == bare)
        .map(|number| number as u8)
        .ok_or_else(|| CapabilityError::Unknown(name.chars().take(60).collect()))
}

/// The name of a capability with `CAP_`, as profiles and statuses write it.
pub fn name_of(number: u8) -> Option<String> {
    NAMES.get(usize::from(number)).map(|name| format!("CAP_{name}"))
}

/// Every capability that can be given on this machine: what the kernel knows, hull knows, and hulld's own bounding set
/// still has (a nested node often lacks some, and nobody can give what they do not have).
pub fn all() -> u64 {
    static ALL: OnceLock<u64> = OnceLock::new();
    *ALL.get_or_init(|| {
        // The kernel reports only capabilities that it knows as bounding ones. Without an answer nothing is assumed.
        hull_sys::privilege::bounding_set().unwrap_or(0) & mask(NAMES.len())
    })
}

/// The sets of a container. A privileged one has everything. Otherwise, in this order: the default set, or everything
/// if `ALL` is added, or nothing if `ALL` is dropped; then the ones added by name (ambient ones are added too); then
/// the ones dropped by name. So `drop: ALL, add: X` gives X, and a name both added and dropped is dropped. What this
/// machine cannot give is left out; names that do not exist are an error.
pub fn resolve(
    add: &[String],
    drop: &[String],
    ambient: &[String],
    privileged: bool,
) -> Result<CapabilitySets, CapabilityError> {
    resolve_within(all(), add, drop, ambient, privileged)
}

fn resolve_within(
    all: u64,
    add: &[String],
    drop: &[String],
    ambient: &[String],
    privileged: bool,
) -> Result<CapabilitySets, CapabilityError> {
    let (add, drop, ambient) = (Named::parse(add)?, Named::parse(drop)?, Named::parse(ambient)?);
    let granted = if privileged {
        all
    } else {
        let start = match (add.everything || ambient.everything, drop.everything) {
            (_, true) => 0,
            (true, false) => all,
            (false, false) => DEFAULT,
        };
        (start | add.named | ambient.named) & !drop.named & all
    };
    let ambient = if ambient.everything { granted } else { ambient.named & granted };
    Ok(CapabilitySets {
        bounding: granted,
        effective: granted,
        permitted: granted,
        // The kernel takes an ambient capability only beside the inheritable one.
        inheritable: ambient,
        ambient,
    })
}

/// A list of names.
struct Named {
    everything: bool,
    named: u64,
}

impl Named {
    fn parse(names: &[String]) -> Result<Self, CapabilityError> {
        let mut parsed = Self { everything: false, named: 0 };
        for name in names {
            if name.eq_ignore_ascii_case("ALL") {
                parsed.everything = true;
            } else {
                parsed.named |= 1 << parse(name)?;
            }
        }
        Ok(parsed)
    }
}

/// The lowest `count` bits.
const fn mask(count: usize) -> u64 {
    (1 << count) - 1
}

/// The mask of names that are known to exist; evaluated by the compiler, which refuses one that does not.
const fn set_of(names: &[&str]) -> u64 {
    let mut set = 0;
    let mut index = 0;
    while index < names.len() {
        let mut number = 0;
        while !same(NAMES[number], names[index]) {
            number += 1;
        }
        set |= 1 << number;
        index += 1;
    }
    set
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut index = 0;
    while index < a.len() {
        if a[index] != b[index] {
            return false;
        }
        index += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: u64 = mask(NAMES.len());

    fn bit(name: &str) -> u64 {
        1 << parse(name).unwrap()
    }

    fn resolved(add: &[&str], drop: &[&str], ambient: &[&str]) -> CapabilitySets {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        resolve_within(EVERY, &strings(add), &strings(drop), &strings(ambient), false).unwrap()
    }

    #[test]
    fn names_are_the_kernels() {
        assert_eq!(parse("CAP_CHOWN"), Ok(0));
        assert_eq!(parse("sys_admin"), Ok(21));
        assert_eq!(parse("Cap_Checkpoint_Restore"), Ok(40));
        assert_eq!(name_of(24).as_deref(), Some("CAP_SYS_RESOURCE"));
        assert_eq!(name_of(41), None);
        for unknown in ["", "CAP_", "CAP_CAP_CHOWN", "ROOT", "ALL"] {
            assert!(parse(unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn the_default_set_is_the_one_that_images_rely_on() {
        // As /proc/1/status of a Docker container has shown it for ten years.
        assert_eq!(DEFAULT, 0xa804_25fb);
        assert_eq!(resolved(&[], &[], &[]).effective, 0xa804_25fb);
    }

    #[test]
    fn add_and_drop_have_one_order() {
        assert_eq!(resolved(&["NET_ADMIN"], &[], &[]).bounding, DEFAULT | bit("NET_ADMIN"));
        assert_eq!(resolved(&["NET_BIND_SERVICE"], &["ALL"], &[]).bounding, bit("NET_BIND_SERVICE"));
        assert_eq!(resolved(&["ALL"], &["SYS_ADMIN"], &[]).bounding, EVERY & !bit("SYS_ADMIN"));
        assert_eq!(resolved(&["all"], &["all"], &[]).bounding, 0);
        assert_eq!(resolved(&["KILL"], &["KILL"], &[]).bounding, DEFAULT & !bit("KILL"));
    }

    #[test]
    fn the_inheritable_set_is_empty_unless_ambient_ones_are_asked_for() {
        // CRI-O 2022-27652, youki 2025-27612
        let plain = resolved(&["NET_ADMIN"], &[], &[]);
        assert_eq!((plain.inheritable, plain.ambient), (0, 0));
        let ambient = resolved(&[], &["ALL"], &["NET_BIND_SERVICE"]);
        let only = bit("NET_BIND_SERVICE");
        assert_eq!(
            ambient,
            CapabilitySets {
                bounding: only,
                effective: only,
                permitted: only,
                inheritable: only,
                ambient: only
            }
        );
        assert_eq!(resolved(&[], &["KILL"], &["KILL"]).ambient, 0);
    }

    #[test]
    fn nobody_gets_what_the_daemon_does_not_have() {
        let without = EVERY & !bit("SYS_RESOURCE") & !bit("CHOWN");
        let add = ["SYS_RESOURCE".to_owned()];
        let sets = resolve_within(without, &add, &[], &[], false).unwrap();
        assert_eq!(sets.bounding, DEFAULT & !bit("CHOWN"));
        assert_eq!(resolve_within(without, &[], &[], &[], true).unwrap().bounding, without);
        assert_eq!(all() & !hull_sys::privilege::bounding_set().unwrap(), 0);
    }

    #[test]
    fn a_name_that_does_not_exist_is_an_error_in_every_list() {
        let bad = ["NET_ADMINS".to_owned()];
        for lists in [[&bad[..], &[], &[]], [&[], &bad[..], &[]], [&[], &[], &bad[..]]] {
            assert!(resolve(lists[0], lists[1], lists[2], false).is_err());
            assert!(resolve(lists[0], lists[1], lists[2], true).is_err());
        }
    }
}
