//! Facts of the host that pods are given.

use std::fs;
use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use super::translate::pod::Host;

/// /etc/hosts and /etc/resolv.conf are read up to here.
const MAX_FILE: u64 = 1 << 20;

/// Wall clock, nanoseconds since 1970, as CRI and the agent count.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Whether AppArmor confines processes here.
pub(crate) fn has_apparmor() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
}

/// The host's name and files as they are now. A missing file is empty.
pub(crate) fn host() -> Host {
    Host {
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        hosts: read("/etc/hosts"),
        resolv_conf: read("/etc/resolv.conf"),
    }
}

fn read(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    if let Err(error) = read {
        tracing::debug!(path, %error, "a file of the host cannot be given to pods");
    }
    bytes
}
