//! Network interfaces of a pod, as its agent sees them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most of /proc/PID/net/dev that is read: some two thousand interfaces.
const MAX_FILE: u64 = 256 << 10;
/// Most interfaces that are told; a pod with more has made them itself.
const MAX_INTERFACES: usize = 256;

/// Counters of one interface since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// As the pod calls it.
    pub name: String,
    /// Received.
    pub received: Counters,
    /// Sent.
    pub sent: Counters,
}

/// Counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Packets with errors.
    pub errors: u64,
    /// Packets dropped.
    pub dropped: u64,
}

/// The interfaces of `namespace` by way of a process that lives in it, the loopback left out. None if the process is
/// not (or no longer) there: its number may belong to another by now, which lives in another namespace.
pub fn interfaces(pid: i32, namespace: &Path) -> Vec<Interface> {
    let process = PathBuf::from("/proc").join(pid.to_string());
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let (theirs, wanted) = (identity(&process.join("ns/net")), identity(namespace));
    if pid <= 0 || theirs.is_none() || theirs != wanted {
        return Vec::new();
    }
    let mut text = String::new();
    let read = fs::File::open(process.join("net/dev"))
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    match read {
        Ok(_) => parse(&text),
        Err(_) => Vec::new(),
    }
}

/// proc_pid_net(5), "dev": two lines of headings, then a line for each interface.
fn parse(text: &str) -> Vec<Interface> {
    let lines = text.lines().skip(2).filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let numbers: Vec<u64> =
            counters.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        let side = |first: usize| {
            let [bytes, packets, errors, dropped] = *numbers.get(first..first + 4)? else { return None };
            Some(Counters { bytes, packets, errors, dropped })
        };
        Some(Interface { name: name.trim().to_owned(), received: side(0)?, sent: side(8)? })
    });
    lines.filter(|interface| interface.name != "lo").take(MAX_INTERFACES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0    0     0       0          0
  eth0: 1016      12    1    2    0     0          0         0     876      10    3    4    0     0       0          0
broken: 1 2 3
";

    #[test]
    fn an_interface_tells_both_directions_and_the_loopback_is_left_out() {
        let wanted = Interface {
            name: "eth0".into(),
            received: Counters { bytes: 1016, packets: 12, errors: 1, dropped: 2 },
            sent: Counters { bytes: 876, packets: 10, errors: 3, dropped: 4 },
        };
        assert_eq!(parse(TEXT), [wanted]);
        assert_eq!(parse(""), []);
    }

    #[test]
    fn a_process_in_another_namespace_tells_nothing() {
        let own = std::process::id().cast_signed();
        assert_eq!(interfaces(own, Path::new("/proc/self/ns/mnt")), []);
        assert_eq!(interfaces(0, Path::new("/proc/self/ns/net")), []);
        interfaces(own, Path::new("/proc/self/ns/net"));
    }
}
