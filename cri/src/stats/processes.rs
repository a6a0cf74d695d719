//! What the processes of a container hold: descriptors, sockets, limits.

use std::fs;
use std::io::Read;
use std::path::Path;

/// Processes of one container that are looked at; of one with more only these are counted.
const MAX_PROCESSES: usize = 4096;
/// Descriptors of one container that are looked at.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Most of /proc/PID/limits that is read.
const MAX_FILE: u64 = 16 << 10;

/// What the processes of a container hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Open descriptors.
    pub descriptors: u64,
    /// Those that are sockets.
    pub sockets: u64,
    /// Soft limits of its first process that are not "unlimited": cAdvisor's name and the value.
    pub ulimits: Vec<(String, u64)>,
}

/// Looks at these processes. One that is gone counts nothing.
pub fn details(pids: &[i32]) -> Details {
    let mut details = Details::default();
    for pid in pids.iter().take(MAX_PROCESSES) {
        count_descriptors(&Path::new("/proc").join(pid.to_string()).join("fd"), &mut details);
    }
    if let Some(first) = pids.iter().min() {
        let mut text = String::new();
        let opened = fs::File::open(Path::new("/proc").join(first.to_string()).join("limits"));
        if opened.and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)).is_ok() {
            details.ulimits = ulimits(&text);
        }
    }
    details
}

fn count_descriptors(directory: &Path, details: &mut Details) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if details.descriptors >= MAX_DESCRIPTORS {
            return;
        }
        details.descriptors += 1;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if target.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
            details.sockets += 1;
        }
    }
}

/// Lines of `Max open files            1024                 4096                 files`.
fn ulimits(text: &str) -> Vec<(String, u64)> {
    let parse = |line: &str| {
        // The name is the words before the soft limit, which is a number or "unlimited".
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let soft = words.iter().position(|word| *word == "unlimited" || word.parse::<u64>().is_ok())?;
        let name = words.get(..soft)?.join("_").to_ascii_lowercase();
        Some((name, words.get(soft)?.parse().ok()?))
    };
    text.lines().skip(1).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limits_are_told_unless_they_are_none() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max open files            1024                 20000                files     \n\
                    Max nice priority         0                    0                    \n";
        assert_eq!(ulimits(text), [("max_open_files".to_owned(), 1024), ("max_nice_priority".to_owned(), 0)]);
    }

    #[test]
    fn descriptors_and_sockets_of_a_process_are_counted() {
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let details = details(&[std::process::id().cast_signed(), i32::MAX]);
        assert!(details.sockets >= 2 && details.descriptors > details.sockets, "{details:?}");
        assert!(details.ulimits.iter().any(|(name, _)| name == "max_open_files"), "{details:?}");
    }
}
