//! Sysctls, written to their one file below /proc/sys and nowhere else (CVE-2022-0811: a `+` in a value became kernel
//! parameters, because the value went to a command line).

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::SandboxError;

/// Bytes of a value (one page, the most that the kernel takes).
const MAX_VALUE: usize = 4096;

/// The path below /proc/sys of a sysctl's name, by the rule of sysctl.d(5): the first separator in it, dot or slash,
/// is the separator of components; if that is a dot, dots and slashes swap.
fn path_of(name: &str) -> Option<String> {
    let first = name.find(['.', '/'])?;
    let swap = name.as_bytes()[first] == b'.';
    let path: String = name
        .chars()
        .map(|character| match character {
            '.' if swap => '/',
            '/' if swap => '.',
            other => other,
        })
        .collect();
    let sound = |part: &str| !part.is_empty() && part != "." && part != "..";
    (path.split('/').all(sound) && !path.chars().any(char::is_control)).then_some(path)
}

/// Writes each value once to its file below `proc`, the root of a procfs. Nothing outside of sys/ can be reached.
pub(super) fn write_all(
    proc: BorrowedFd<'_>,
    sysctls: &BTreeMap<String, String>,
) -> Result<(), SandboxError> {
    for (name, value) in sysctls {
        let bad = |reason: &str| SandboxError::Sysctl { name: name.clone(), reason: reason.into() };
        let path = path_of(name).ok_or_else(|| bad("not a sysctl's name"))?;
        if value.len() > MAX_VALUE
            || value.chars().any(|character| character.is_control() && character != '\t')
        {
            return Err(bad("its value is too long or contains control characters"));
        }
        write(proc, &path, value).map_err(|error| bad(&error.to_string()))?;
    }
    Ok(())
}

fn write(proc: BorrowedFd<'_>, path: &str, value: &str) -> std::io::Result<()> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(proc, format!("sys/{path}"), flags, Mode::empty(), resolve)?;
    let written = rustix::io::write(&file, value.as_bytes())?;
    if written == value.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn names_with_dots_and_slashes_lead_to_one_file() {
        let path = |name| path_of(name).unwrap();
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), "net/ipv4/conf/eth0.1/forwarding");
        for name in ["", "kernel", "..kernel", "net/../kernel/x", "/etc/passwd", "a..b", "a.b\n", "a/b/"] {
            assert_eq!(path_of(name), None, "{name:?}");
        }
    }

    // CVE-2022-0811.
    #[test]
    fn a_value_with_a_plus_or_newline_reaches_nothing_but_its_own_file() {
        let proc = std::fs::File::open("/proc").unwrap();
        let domain = || std::fs::read_to_string("/proc/sys/kernel/ostype").unwrap();
        let before = domain();
        let one = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        assert!(
            write_all(proc.as_fd(), &one("kernel.shm_rmid_forced", "1\n+kernel.core_pattern=|/x")).is_err()
        );
        assert!(write_all(proc.as_fd(), &one("kernel.ostype", "1+kernel.core_pattern=|/x")).is_err());
        assert!(write_all(proc.as_fd(), &one("kernel/../../sysrq-trigger", "h")).is_err());
        assert_eq!(domain(), before);
    }
}
