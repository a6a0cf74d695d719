//! Block devices by pattern.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Most names that one pattern is compared with.
const MAX_NAMES: usize = 100_000;

/// A disk's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The disks that a path names; it may have `*`, `?` and `[a-z]` in its components. A pattern that names nothing is no
/// error (the disk may be in another node), a path is.
pub(super) fn matching(pattern: &str) -> Result<Vec<Device>, String> {
    if !pattern.starts_with('/') {
        return Err(format!("the device {pattern:?} is not an absolute path"));
    }
    if !is_pattern(pattern) {
        return Ok(vec![disk(Path::new(pattern))?]);
    }
    let mut paths = vec![PathBuf::from("/")];
    let mut seen = 0;
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        if !is_pattern(part) {
            paths.iter_mut().for_each(|path| path.push(part));
            continue;
        }
        let mut next = Vec::new();
        for path in &paths {
            let names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
            for name in names {
                seen += 1;
                if seen > MAX_NAMES {
                    return Err(format!(
                        "the device {pattern:?} could be any of more than {MAX_NAMES} files"
                    ));
                }
                if name.to_str().is_some_and(|name| matches(part.as_bytes(), name.as_bytes())) {
                    next.push(path.join(name));
                }
            }
        }
        paths = next;
    }
    // Partitions and what is no device at all may well have such names.
    let mut disks: Vec<Device> = paths.iter().filter_map(|path| disk(path).ok()).collect();
    disks.sort_unstable();
    disks.dedup();
    Ok(disks)
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

fn disk(path: &Path) -> Result<Device, String> {
    let refused = |reason: &str| format!("the device {} {reason}", path.display());
    let file = fs::metadata(path).map_err(|error| refused(&format!("cannot be looked at: {error}")))?;
    if !file.file_type().is_block_device() {
        return Err(refused("is no block device"));
    }
    let (major, minor) = (rustix::fs::major(file.rdev()), rustix::fs::minor(file.rdev()));
    if Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists() {
        return Err(refused("is a partition: only whole disks have limits"));
    }
    Ok(Device { major, minor })
}

/// Whether a name fits a pattern of a shell's kind.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|skipped| matches(rest, &name[skipped..])),
        (Some((b'?', rest)), Some((_, name))) => matches(rest, name),
        (Some((b'[', rest)), Some((byte, name))) => {
            match rest.iter().skip(1).position(|byte| *byte == b']') {
                Some(end) => fits(&rest[..=end], *byte) && matches(&rest[end + 2..], name),
                None => false,
            }
        }
        (Some((wanted, rest)), Some((byte, name))) => wanted == byte && matches(rest, name),
        _ => false,
    }
}

/// Whether a byte is one of `a-z_`, or none of `^a-z`.
fn fits(set: &[u8], byte: u8) -> bool {
    let (negated, mut set) = match set.split_first() {
        Some((b'^' | b'!', rest)) if !rest.is_empty() => (true, rest),
        _ => (false, set),
    };
    let mut found = false;
    while let Some((first, rest)) = set.split_first() {
        (found, set) = match rest {
            [b'-', last, rest @ ..] => (found || (*first..=*last).contains(&byte), rest),
            _ => (found || *first == byte, rest),
        };
    }
    found != negated
}

/// The file that takes weights: that of the scheduler BFQ where a disk has it, else that of io.cost.
pub(super) fn weight_file() -> &'static str {
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let schedulers = disks.filter_map(|disk| fs::read_to_string(disk.path().join("queue/scheduler")).ok());
    match schedulers.into_iter().any(|schedulers| schedulers.contains("[bfq]")) {
        true => "io.bfq.weight",
        false => "io.weight",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_patterns_as_in_a_shell() {
        for (pattern, name, fits) in [
            ("vd[a-d]", "vda", true),
            ("vd[a-d]", "vde", false),
            ("vd[^a-d]", "vde", true),
            ("vd[]x]", "vd]", true),
            ("nvme*n?", "nvme10n1", true),
            ("nvme*n?", "nvme10n1p1", false),
            ("*", "", true),
            ("sd*", "sd", true),
            ("sd[", "sd[", false),
            ("a**b", "axxb", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn only_whole_disks_are_devices() {
        assert_eq!(matching("/dev/nul[l]"), Ok(Vec::new()), "no block device");
        assert!(matching("/dev/null").unwrap_err().contains("no block device"));
        assert!(matching("/dev/not-there").unwrap_err().contains("cannot be looked at"));
        assert!(matching("sda").unwrap_err().contains("absolute"));
    }
}
