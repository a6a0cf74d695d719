//! What a host path that a container mounts becomes in the guest. By its place below a kubelet's directory; whatever is
//! not known for certain is served from the host by virtio-fs, which is always right, if slower.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of linux/magic.h.
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;
/// Plugins whose volumes only kubelet writes (pkg/volume of Kubernetes).
const WRITTEN_BY_KUBELET: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Largest single file of kubelet's that is copied.
const MAX_FILE: u64 = 512 << 10;

/// What a host path is to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// A directory that kubelet writes: copied, and copied again when it changes.
    Copied,
    /// A part of such a directory for one container, which kubelet never changes.
    CopiedOnce,
    /// A small file that the container may write and nobody reads.
    File(Vec<u8>),
    /// A file that the container may write and kubelet reads after its end.
    Message,
    /// An emptyDir; `path` below it is mounted. Its volume is known by `directory`.
    EmptyDir { directory: PathBuf, path: String, memory: Option<u64> },
    /// Everything else.
    Host,
    /// It cannot be had in a machine; the reason completes "the host path … ".
    Refused(&'static str),
}

/// Looks at a path. Blocks for a moment.
pub(super) fn classify(path: &Path, kubelet_roots: &[PathBuf]) -> Class {
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let below =
        kubelet_roots.iter().find_map(|root| Some((root, path.strip_prefix(root.join("pods")).ok()?)));
    if let Some((root, below)) = below.filter(|_| plain) {
        let parts: Vec<&str> = below.components().filter_map(|part| part.as_os_str().to_str()).collect();
        if let Some(class) =
            parts.split_first().and_then(|(pod, parts)| of_pod(path, &root.join("pods").join(pod), parts))
        {
            return class;
        }
    }
    // Not looked at here: whoever serves it may be gone.
    Class::Host
}

/// Of what kubelet keeps for one pod.
fn of_pod(path: &Path, pod: &Path, parts: &[&str]) -> Option<Class> {
    match *parts {
        ["etc-hosts"] => Some(Class::File(small_file(path)?)),
        ["containers", _, _] => small_file(path).map(|_| Class::Message),
        ["volumes", plugin, _] if WRITTEN_BY_KUBELET.contains(&plugin) => {
            path.is_dir().then_some(Class::Copied)
        }
        ["volumes", EMPTY_DIR, _] => empty_dir(path, path),
        ["volume-subpaths", volume, _, _] => {
            let volumes = pod.join("volumes");
            if WRITTEN_BY_KUBELET.iter().any(|plugin| volumes.join(plugin).join(volume).is_dir()) {
                return Some(Class::CopiedOnce);
            }
            let directory = volumes.join(EMPTY_DIR).join(volume);
            directory.is_dir().then(|| empty_dir(&directory, path)).flatten()
        }
        _ => None,
    }
}

fn small_file(path: &Path) -> Option<Vec<u8>> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return None;
    }
    fs::read(path).ok()
}

/// `path` is the volume's directory itself or kubelet's bind mount of a part of it.
fn empty_dir(directory: &Path, path: &Path) -> Option<Class> {
    let metadata = fs::symlink_metadata(directory).ok()?;
    if !metadata.is_dir() {
        return None;
    }
    let facts = rustix::fs::statfs(directory).ok()?;
    let is_mount = directory.parent().and_then(|above| fs::metadata(above).ok())?.dev() != metadata.dev();
    let kind = facts.f_type as u64;
    if is_mount && kind == HUGETLBFS {
        return Some(Class::Refused("is an emptyDir of huge pages, which a machine has none of"));
    }
    let memory = (is_mount && kind == TMPFS).then(|| facts.f_blocks.saturating_mul(facts.f_bsize as u64));
    if is_mount && memory.is_none() {
        return None;
    }
    let below =
        if path == directory { Some(String::new()) } else { place_below(directory, path).ok().flatten() };
    Some(Class::EmptyDir { directory: directory.to_owned(), path: below?, memory })
}

/// Where, below `directory`, that lies what is bind mounted at `path` (proc(5), mountinfo).
fn place_below(directory: &Path, path: &Path) -> io::Result<Option<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let bound = mount_at(&table, path);
    let holder = directory.ancestors().find_map(|above| Some((above, mount_at(&table, above)?)));
    let (Some(bound), Some((at, holder))) = (bound, holder) else { return Ok(None) };
    let inside = directory.strip_prefix(at).unwrap_or(Path::new(""));
    let base = Path::new(&holder.root).join(inside);
    let below = Path::new(&bound.root).strip_prefix(&base).ok().and_then(Path::to_str).map(str::to_owned);
    Ok(below.filter(|_| bound.device == holder.device))
}

/// A mount as the table tells it.
struct Mounted {
    device: String,
    /// Of the mount within its filesystem.
    root: String,
}

/// The uppermost mount at this very path.
fn mount_at(table: &str, path: &Path) -> Option<Mounted> {
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let (device, root, at) = (fields.nth(2)?, fields.next()?, fields.next()?);
        (Path::new(&unescaped(at)) == path)
            .then(|| Mounted { device: device.to_owned(), root: unescaped(root) })
    };
    table.lines().rev().find_map(parse)
}

/// Without the octal escapes for space, tab, newline and backslash.
fn unescaped(field: &str) -> String {
    let mut text = field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
    if text.contains("\\134") {
        text = text.replace("\\134", "\\");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn volume(root: &Path, plugin: &str, name: &str) -> PathBuf {
        let path = root.join("pods/uid/volumes").join(plugin).join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_kubelet_keeps_for_a_pod_is_known_by_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let of = |path: &Path| classify(path, &[root.to_owned()]);
        for plugin in WRITTEN_BY_KUBELET {
            assert_eq!(of(&volume(root, plugin, "v")), Class::Copied);
        }
        let empty = volume(root, EMPTY_DIR, "cache");
        let expected = Class::EmptyDir { directory: empty.clone(), path: String::new(), memory: None };
        assert_eq!(of(&empty), expected);
        fs::write(root.join("pods/uid/etc-hosts"), "127.0.0.1 localhost").unwrap();
        assert_eq!(of(&root.join("pods/uid/etc-hosts")), Class::File(b"127.0.0.1 localhost".to_vec()));
        let message = root.join("pods/uid/containers/main");
        fs::create_dir_all(&message).unwrap();
        fs::write(message.join("0123abcd"), "").unwrap();
        assert_eq!(of(&message.join("0123abcd")), Class::Message);
        let part = root.join("pods/uid/volume-subpaths/v/main/0");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(&part, "").unwrap();
        assert_eq!(of(&part), Class::CopiedOnce);
    }

    #[test]
    fn whatever_is_not_certain_is_served_from_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let roots = [root.to_owned()];
        let local = volume(root, "kubernetes.io~local-volume", "disk");
        assert_eq!(classify(&local, &roots), Class::Host);
        assert_eq!(classify(Path::new("/etc/hosts"), &roots), Class::Host);
        let secret = volume(root, "kubernetes.io~secret", "s");
        assert_eq!(classify(&secret, &[]), Class::Host, "no kubelet of ours");
        assert_eq!(classify(&secret.join("../../../../../../../etc"), &roots), Class::Host);
        symlink("/etc/shadow", root.join("pods/uid/etc-hosts")).unwrap();
        assert_eq!(classify(&root.join("pods/uid/etc-hosts"), &roots), Class::Host);
    }

    #[test]
    fn mounts_are_found_by_their_place_whatever_it_is_called() {
        let table = "22 1 8:1 / / rw - ext4 x rw\n\
                     30 22 8:1 /a\\040b/sub /mnt/with\\040space rw - ext4 x rw\n";
        let found = mount_at(table, Path::new("/mnt/with space")).unwrap();
        assert_eq!((found.device.as_str(), found.root.as_str()), ("8:1", "/a b/sub"));
        assert!(mount_at(table, Path::new("/mnt")).is_none());
    }
}
