//! Which sysctls a pod may set: those that belong to one of its own namespaces.

/// Longest name and value; the kernel takes values of up to a page.
const MAX_LENGTH: usize = 4096;

/// Why a sysctl was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SysctlError {
    /// The name is no path below /proc/sys.
    #[error("{0:?} is not the name of a sysctl")]
    Name(String),
    /// The value holds a control character, or is too long.
    #[error("the value of the sysctl {0} contains a control character or is longer than 4096 bytes")]
    Value(String),
    /// It belongs to the whole machine.
    #[error(
        "the sysctl {0} is not one of a pod's own namespaces (kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*, net.*)"
    )]
    NotNamespaced(String),
    /// The pod shares the namespace that it belongs to with the host.
    #[error("the sysctl {name} cannot be set: the pod uses the host's {namespace} namespace")]
    HostNamespace {
        /// The sysctl.
        name: String,
        /// `IPC` or `network`.
        namespace: &'static str,
    },
}

/// Checks one sysctl of a pod. The name's parts are separated by dots, or by slashes if a slash comes first
/// (sysctl.conf(5)), in which case dots are part of a name, as in `net/ipv4/conf/eth0.100/forwarding`.
pub fn check(name: &str, value: &str, host_ipc: bool, host_network: bool) -> Result<(), SysctlError> {
    let shown = || name.chars().take(100).collect::<String>();
    let parts = parts_of(name).ok_or_else(|| SysctlError::Name(shown()))?;
    // A tab is how the kernel itself separates the numbers of a list.
    if value.len() > MAX_LENGTH || value.chars().any(|letter| letter.is_control() && letter != '\t') {
        return Err(SysctlError::Value(shown()));
    }
    let (namespace, of_host) = match parts[..] {
        ["kernel", name] if name.starts_with("shm") || name.starts_with("msg") || name == "sem" => {
            ("IPC", host_ipc)
        }
        ["fs", "mqueue", _] => ("IPC", host_ipc),
        ["net", _, ..] => ("network", host_network),
        _ => return Err(SysctlError::NotNamespaced(shown())),
    };
    if of_host { Err(SysctlError::HostNamespace { name: shown(), namespace }) } else { Ok(()) }
}

/// The parts of the name; `None` if joining them with slashes would not be a plain path below /proc/sys.
fn parts_of(name: &str) -> Option<Vec<&str>> {
    if name.len() > MAX_LENGTH || name.chars().any(char::is_control) {
        return None;
    }
    let separator = name.chars().find(|letter| matches!(letter, '.' | '/'))?;
    let parts: Vec<&str> = name.split(separator).collect();
    // In a name with dots a slash stands for a dot of the name, which could be the second of "..".
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains("//");
    let plain_with_dots = |part: &str| plain(part) && !part.starts_with('/') && !part.ends_with('/');
    let all_plain = if separator == '.' {
        parts.iter().copied().all(plain_with_dots)
    } else {
        parts.iter().copied().all(plain)
    };
    all_plain.then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(name: &str) -> bool {
        check(name, "1", false, false).is_ok()
    }

    #[test]
    fn namespaced_sysctls_may_be_set() {
        for name in [
            "kernel.shm_rmid_forced",
            "kernel.shmmax",
            "kernel.msgmnb",
            "kernel.sem",
            "fs.mqueue.msg_max",
            "net.ipv4.ip_unprivileged_port_start",
            "net/ipv4/conf/eth0.100/forwarding",
            "net.ipv4.conf.eth0/100.forwarding",
        ] {
            assert!(allowed(name), "{name}");
        }
        assert_eq!(check("net.ipv4.tcp_rmem", "4096\t87380 16777216", false, false), Ok(()));
    }

    #[test]
    fn the_machines_own_sysctls_may_not() {
        for name in [
            "kernel.core_pattern",
            "vm.overcommit_memory",
            "kernel.semaphore",
            "fs.file-max",
            "net",
            "kernel",
        ] {
            assert!(!allowed(name), "{name}");
        }
    }

    #[test]
    fn a_name_cannot_climb_out_of_its_directory() {
        for name in [
            "net..kernel.core_pattern",
            "net/../kernel/core_pattern",
            "net/./x",
            "net//x",
            "/net/x",
            "net.ipv4.",
            ".net",
            "net.//.kernel",
            "net./x",
            "net.x\n",
            "",
        ] {
            assert!(!allowed(name), "{name:?}");
        }
    }

    #[test]
    fn a_value_cannot_smuggle_another_line() {
        // CRI-O CVE-2022-0811: the value is one value and nothing else.
        assert!(check("kernel.shmmax", "1\n2", false, false).is_err());
        assert!(check("kernel.shmmax", "1\0", false, false).is_err());
        assert_eq!(check("kernel.shmmax", "1+kernel.core_pattern=|/x", false, false), Ok(()));
        assert!(check("kernel.shmmax", &"1".repeat(5000), false, false).is_err());
    }

    #[test]
    fn a_pod_on_a_host_namespace_cannot_change_it() {
        assert!(check("net.core.somaxconn", "1", false, true).is_err());
        assert!(check("kernel.sem", "1", true, false).is_err());
        assert!(check("fs.mqueue.msg_max", "1", true, false).is_err());
        assert_eq!(check("net.core.somaxconn", "1", true, false), Ok(()));
    }
}
