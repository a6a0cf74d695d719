use std::fs;
use std::path::Path;

use crate::NetworkError;
use crate::ledger::file_error;

const ROOT: &str = "/proc/sys/net";

/// Sets a network sysctl (a path below /proc/sys/net) of the calling thread's namespace; only if it differs, since
/// some have side effects even when written with the value they have.
pub(crate) fn set(name: &str, value: &str) -> Result<(), NetworkError> {
    let path = Path::new(ROOT).join(name);
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| file_error("setting", &path, source))
}

/// Whether the kernel speaks IPv6.
pub(crate) fn has_ipv6() -> bool {
    Path::new(ROOT).join("ipv6").exists()
}

/// Makes the host route between its interfaces. This stays when the daemon ends: others rely on it as well.
pub(crate) fn enable_forwarding(v4: bool, v6: bool) -> Result<(), NetworkError> {
    if v4 {
        set("ipv4/ip_forward", "1")?;
    }
    if v6 && !is("ipv6/conf/all/forwarding", "1") {
        // A forwarding host ignores router advertisements unless accept_ra is 2 (ip-sysctl.rst); without this a host
        // that gets its own address or route by them would lose it.
        let interfaces = fs::read_dir(Path::new(ROOT).join("ipv6/conf")).into_iter().flatten().flatten();
        for name in interfaces.filter_map(|entry| entry.file_name().into_string().ok()) {
            let setting = format!("ipv6/conf/{name}/accept_ra");
            if name != "all" && is(&setting, "1") {
                set(&setting, "2")?;
            }
        }
        set("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

fn is(name: &str, value: &str) -> bool {
    fs::read_to_string(Path::new(ROOT).join(name)).is_ok_and(|now| now.trim() == value)
}
