//! Host devices for containers: what CRI asks for by path, looked up on the host, in the terms of the agent's protocol.
//!
//! Everything here asks the filesystem and blocks.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use hull_agent::protocol::messages::{Device, DeviceRule};

/// Most devices that one directory, or all of /dev, may give to a container.
const MAX_DEVICES: usize = 4096;
/// Deepest directory below the one that was asked for.
const MAX_DEPTH: usize = 16;
/// Directories of /dev that hold no devices of the host's, or that a container has of its own.
const SKIPPED: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
/// Devices that every container has of its own, and that would otherwise be the host's terminal.
const OWN: [&str; 3] = ["/dev/console", "/dev/ptmx", "/dev/tty"];

/// Why a device cannot be given to a container.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The path cannot be looked at.
    #[error("cannot look up the device {path} on the host: {source}")]
    Lookup {
        /// Path on the host.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is a file, but no device.
    #[error("{0} is neither a device nor a directory of devices")]
    NotADevice(String),
    /// A path that is not absolute and plain.
    #[error("{0:?} cannot be a device's path: it must be absolute, without .. and control characters")]
    Path(String),
    /// Permissions other than `r`, `w` and `m`.
    #[error(
        "the device {path} is asked for with the permissions {permissions:?}; they consist of r, w and m"
    )]
    Permissions {
        /// Path on the host.
        path: String,
        /// As they came, shortened.
        permissions: String,
    },
    /// More devices than any container needs.
    #[error("below {0} are more than 4096 devices")]
    TooMany(String),
}

/// The devices that one entry of CRI's device list means: one, or, for a directory, all below it, at the same paths
/// below `container_path`. Empty permissions are `rwm`, and an empty container path is the host's.
pub fn from_cri(
    host_path: &str,
    container_path: &str,
    permissions: &str,
) -> Result<Vec<Device>, DeviceError> {
    let source = checked(host_path)?;
    let destination = if container_path.is_empty() { source.clone() } else { checked(container_path)? };
    let access = access_of(host_path, permissions)?;
    // Links are followed here, as /dev/disk/by-id is made of them, and nowhere below.
    let metadata = fs::metadata(&source).map_err(|error| lookup(&source, error))?;
    if metadata.is_dir() {
        let mut search = Search { access: &access, below: &source, found: Vec::new() };
        search.directory(&source, &destination, 0)?;
        return Ok(search.found);
    }
    match device(&destination, &metadata, &access) {
        Some(device) => Ok(vec![device]),
        None => Err(DeviceError::NotADevice(host_path.to_owned())),
    }
}

/// Every device below the host's /dev, for a privileged container.
pub fn host() -> Result<Vec<Device>, DeviceError> {
    let mut devices = from_cri("/dev", "/dev", "rwm")?;
    devices.retain(|device| !OWN.contains(&device.path.as_str()));
    // Nobody named them: in a pod with a user namespace they must not become its root's.
    devices.iter_mut().for_each(|device| device.host_owner = true);
    Ok(devices)
}

/// The rule that lets a container use a device that it was given.
pub fn rule_for(device: &Device) -> DeviceRule {
    DeviceRule {
        allow: true,
        r#type: device.r#type.clone(),
        major: i64::from(device.major),
        minor: i64::from(device.minor),
        access: device.access.clone(),
    }
}

/// The one rule of a privileged container.
pub fn allow_everything() -> DeviceRule {
    DeviceRule { allow: true, r#type: "a".to_owned(), major: -1, minor: -1, access: "rwm".to_owned() }
}

/// A walk through a directory of devices.
struct Search<'a> {
    access: &'a str,
    /// For messages.
    below: &'a Path,
    found: Vec<Device>,
}

impl Search<'_> {
    fn directory(&mut self, source: &Path, destination: &Path, depth: usize) -> Result<(), DeviceError> {
        let entries = fs::read_dir(source).map_err(|error| lookup(source, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| lookup(source, error))?;
            let name = entry.file_name();
            let (source, destination) = (source.join(&name), destination.join(&name));
            // Devices come and go; one that has gone since the directory was read is not there to be given.
            let Ok(metadata) = fs::symlink_metadata(&source) else { continue };
            if metadata.is_dir() {
                let skipped = name.to_str().is_none_or(|name| SKIPPED.contains(&name));
                if !skipped && depth < MAX_DEPTH {
                    self.directory(&source, &destination, depth + 1)?;
                }
            } else if let Some(device) = device(&destination, &metadata, self.access) {
                if self.found.len() >= MAX_DEVICES {
                    return Err(DeviceError::TooMany(self.below.display().to_string()));
                }
                self.found.push(device);
            }
        }
        Ok(())
    }
}

/// The device that a file is; `None` if it is none, or if its path cannot be told to the agent.
fn device(destination: &Path, metadata: &Metadata, access: &str) -> Option<Device> {
    let kind = metadata.file_type();
    let letter = if kind.is_char_device() {
        "c"
    } else if kind.is_block_device() {
        "b"
    } else {
        return None;
    };
    let number = metadata.rdev();
    Some(Device {
        path: destination.to_str()?.to_owned(),
        r#type: letter.to_owned(),
        major: rustix::fs::major(number),
        minor: rustix::fs::minor(number),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
        block_slot: None,
        host_owner: false,
    })
}

pub(crate) fn access_of(path: &str, permissions: &str) -> Result<String, DeviceError> {
    if permissions.is_empty() {
        return Ok("rwm".to_owned());
    }
    if !permissions.chars().all(|letter| matches!(letter, 'r' | 'w' | 'm')) {
        let permissions = permissions.chars().take(20).collect();
        return Err(DeviceError::Permissions { path: path.to_owned(), permissions });
    }
    Ok("rwm".chars().filter(|letter| permissions.contains(*letter)).collect())
}

/// An absolute path that names one place whatever is below it.
fn checked(path: &str) -> Result<PathBuf, DeviceError> {
    let as_path = Path::new(path);
    let climbs = as_path.components().any(|part| part == Component::ParentDir);
    if !as_path.is_absolute() || climbs || path.chars().any(char::is_control) {
        return Err(DeviceError::Path(path.chars().take(200).collect()));
    }
    // Without doubled slashes and single dots.
    Ok(as_path.components().collect())
}

fn lookup(path: &Path, source: io::Error) -> DeviceError {
    DeviceError::Lookup { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_is_looked_up() {
        let devices = from_cri("/dev/null", "/dev/nothing", "wr").unwrap();
        let null = &devices[0];
        assert_eq!((null.path.as_str(), null.r#type.as_str()), ("/dev/nothing", "c"));
        assert_eq!((null.major, null.minor, null.mode), (1, 3, 0o666));
        assert_eq!(null.access, "rw");
        assert_eq!(rule_for(null).major, 1);
        assert_eq!(from_cri("/dev/zero", "", "").unwrap()[0].path, "/dev/zero");
    }

    #[test]
    fn a_link_to_a_device_is_followed_but_none_below_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/zero", directory.path().join("link")).unwrap();
        let link = directory.path().join("link");
        assert_eq!(from_cri(link.to_str().unwrap(), "/dev/x", "r").unwrap()[0].minor, 5);
        assert!(from_cri(directory.path().to_str().unwrap(), "/dev/d", "r").unwrap().is_empty());
    }

    #[test]
    fn a_directory_means_all_devices_below_it() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("deep/pts")).unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        let node = |path: &str| {
            use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
            let path = directory.path().join(path);
            mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(1, 7)).unwrap();
        };
        node("deep/full");
        node("deep/pts/0");
        let devices = from_cri(directory.path().to_str().unwrap(), "/dev/given", "rwm").unwrap();
        assert_eq!(devices.iter().map(|one| one.path.as_str()).collect::<Vec<_>>(), ["/dev/given/deep/full"]);
    }

    #[test]
    fn what_is_no_device_is_refused() {
        assert!(matches!(from_cri("/etc/passwd", "", "r"), Err(DeviceError::NotADevice(_))));
        assert!(matches!(from_cri("/dev/absent", "", "r"), Err(DeviceError::Lookup { .. })));
        assert!(matches!(from_cri("/dev/null", "", "rx"), Err(DeviceError::Permissions { .. })));
        for path in ["dev/null", "/dev/../etc", "", "/dev/a\nb"] {
            assert!(matches!(from_cri(path, "/dev/x", "r"), Err(DeviceError::Path(_))), "{path:?}");
        }
        assert!(matches!(from_cri("/dev/null", "../x", "r"), Err(DeviceError::Path(_))));
    }

    #[test]
    fn a_privileged_container_gets_the_hosts_devices_but_its_own_terminal() {
        let devices = host().unwrap();
        assert!(devices.iter().any(|device| device.path == "/dev/null"));
        assert!(!devices.iter().any(|device| OWN.contains(&device.path.as_str())));
        assert!(!devices.iter().any(|device| device.path.starts_with("/dev/pts/")));
    }
}
