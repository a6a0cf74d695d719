//! Finding the file that describes a device.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::CdiError;
use super::spec::{Device, Spec};
use crate::yaml;

/// Bytes of a file, and files of a directory, that are looked at.
const MAX_FILE: u64 = 4 << 20;
const MAX_FILES: usize = 1000;

/// A device with the file that it stands in.
pub(super) struct Found {
    pub(super) spec: Spec,
    pub(super) device: Device,
    pub(super) path: PathBuf,
}

/// Looks for the device in the directories, of which a later one goes before an earlier one. Two files of one directory
/// that describe the same device are an error. What cannot be read is passed over, and told if nothing is found.
pub(super) fn find(kind: &str, name: &str, directories: &[&Path]) -> Result<Found, CdiError> {
    let mut broken = Vec::new();
    for directory in directories.iter().rev() {
        let mut found: Option<Found> = None;
        for path in spec_files(directory) {
            let spec = match read(&path) {
                Ok(spec) => spec,
                Err(reason) => {
                    broken.push(format!("{}: {reason}", path.display()));
                    continue;
                }
            };
            if spec.kind != kind {
                continue;
            }
            let Some(device) = spec.devices.iter().find(|device| device.name == name).cloned() else {
                continue;
            };
            if let Some(other) = &found {
                return Err(CdiError::Conflict {
                    device: format!("{kind}={name}"),
                    files: [other.path.clone(), path],
                });
            }
            found = Some(Found { spec, device, path });
        }
        if let Some(found) = found {
            return Ok(found);
        }
    }
    let looked: Vec<String> = directories.iter().map(|directory| directory.display().to_string()).collect();
    Err(CdiError::Unknown {
        device: format!("{kind}={name}"),
        looked: looked.join(" nor in "),
        broken: told(&broken),
    })
}

fn told(broken: &[String]) -> String {
    match broken {
        [] => String::new(),
        [first] => format!(" (unreadable: {first})"),
        [first, rest @ ..] => format!(" (unreadable: {first}; and {} more)", rest.len()),
    }
}

/// Files named `*.json`, `*.yaml` and `*.yml`, in the order of their names. A missing directory has none.
fn spec_files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_spec = |path: &PathBuf| {
        path.extension()
            .is_some_and(|extension| extension == "json" || extension == "yaml" || extension == "yml")
    };
    let mut files: Vec<PathBuf> =
        entries.take(MAX_FILES).filter_map(|entry| Some(entry.ok()?.path())).filter(is_spec).collect();
    files.sort();
    files
}

fn read(path: &Path) -> Result<Spec, String> {
    let text = content(path).map_err(|error| error.to_string())?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let value = if is_json {
        serde_json::from_str(&text).map_err(|error| error.to_string())?
    } else {
        yaml::parse(&text)?
    };
    let spec: Spec = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let version = spec.cdi_version.trim_start_matches('v');
    if !["0.", "1."].iter().any(|known| version.starts_with(known)) {
        return Err(format!("its cdiVersion is {:?}; hull knows 0.x and 1.x", spec.cdi_version));
    }
    Ok(spec)
}

fn content(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    let read = file.take(MAX_FILE + 1).read_to_string(&mut text)? as u64;
    if read > MAX_FILE { Err(io::Error::other("it is larger than 4 MiB")) } else { Ok(text) }
}
