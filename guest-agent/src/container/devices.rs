//! Device nodes and the links of /dev.

use std::os::fd::AsFd;

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use super::failure::{During, Failure, Stage};
use super::inside::{Root, set_owner};
use super::plan::{DeviceKind, DeviceNode, is_below};

/// runtime-spec config-linux.md, "Default Devices": name, major, minor; all 0666 and root's.
const DEFAULT: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// runtime-spec runtime-linux.md, "Dev symbolic links", and the two that all runtimes add.
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// Nodes of the host that a container has of its own: asking for them (as "all devices" does) changes nothing.
const OWN: [&str; 2] = ["ptmx", "console"];

/// Fills a fresh tmpfs that is mounted at /dev, also with the request's devices below /dev.
pub(super) fn populate(dev: &Root, requested: &[DeviceNode]) -> Result<(), Failure> {
    for (name, major, minor) in DEFAULT {
        let node = DeviceNode {
            path: format!("/dev/{name}"),
            kind: DeviceKind::Character,
            major,
            minor,
            mode: 0o666,
            owner: None,
        };
        make(dev, name, &node)?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, dev.as_fd(), name)
            .during(Stage::Device, || format!("cannot link /dev/{name} to {target}"))?;
    }
    for node in requested {
        match node.path.strip_prefix("/dev/") {
            Some(path) if !OWN.contains(&path) => make(dev, path, node)?,
            _ => {}
        }
    }
    Ok(())
}

/// Devices that are not below /dev. They go onto the image's own tree, before any volume is mounted in it, so that
/// none is ever made on a volume.
pub(super) fn make_elsewhere(root: &Root, requested: &[DeviceNode]) -> Result<(), Failure> {
    requested
        .iter()
        .filter(|node| !is_below(&node.path, "/dev"))
        .try_for_each(|node| make(root, &node.path, node))
}

fn make(root: &Root, path: &str, node: &DeviceNode) -> Result<(), Failure> {
    let doing = || format!("cannot make the device {}", node.path);
    let (parent, name) = if path.contains('/') {
        root.create_parent(path).during(Stage::Device, doing)?
    } else {
        (root.as_fd().try_clone_to_owned().during(Stage::Device, doing)?, path)
    };
    let (kind, number) = match node.kind {
        DeviceKind::Character => (FileType::CharacterDevice, rustix::fs::makedev(node.major, node.minor)),
        DeviceKind::Block => (FileType::BlockDevice, rustix::fs::makedev(node.major, node.minor)),
        DeviceKind::Fifo => (FileType::Fifo, 0),
    };
    // The launch runs with umask 0, so the mode is exact.
    let mode = Mode::from_raw_mode(node.mode);
    match rustix::fs::mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            let there = rustix::fs::statat(&parent, name, flags).during(Stage::Device, doing)?;
            let same = FileType::from_raw_mode(there.st_mode) == kind && there.st_rdev == number;
            if !same {
                return Err(Failure::system(Stage::Device, doing(), Errno::EXIST));
            }
            // The same device once more: with the mode that was asked for last. It is no link (checked above).
            rustix::fs::chmodat(&parent, name, mode, rustix::fs::AtFlags::empty())
                .during(Stage::Device, doing)?;
        }
        Err(error) => return Err(Failure::system(Stage::Device, doing(), error)),
    }
    let Some((uid, gid)) = node.owner else { return Ok(()) };
    set_owner(parent.as_fd(), name, uid, gid).during(Stage::Device, doing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_device_is_made_with_its_parents_mode_and_owner_and_never_over_something_else() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(std::fs::File::open(directory.path()).unwrap().into());
        let node = DeviceNode {
            path: "/a/b/null".into(),
            kind: DeviceKind::Character,
            major: 1,
            minor: 3,
            mode: 0o640,
            owner: Some((5, 6)),
        };
        make_elsewhere(&root, std::slice::from_ref(&node)).unwrap();
        make_elsewhere(&root, std::slice::from_ref(&node)).unwrap();
        let made = std::fs::metadata(directory.path().join("a/b/null")).unwrap();
        assert_eq!((made.uid(), made.gid(), made.rdev()), (5, 6, rustix::fs::makedev(1, 3)));
        let zero = DeviceNode { minor: 5, ..node };
        let failure = make_elsewhere(&root, &[zero]).unwrap_err();
        assert_eq!(failure.errno, Errno::EXIST.raw_os_error());
    }
}
