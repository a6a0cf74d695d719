//! Devices by name: the Container Device Interface (github.com/cncf-tags/container-device-interface, SPEC.md).
//!
//! A vendor describes in a file what a container needs to use a device: nodes, mounts, variables, groups. Hooks are
//! refused by name: they are programs of the host, run as root in the middle of a container's start.

mod files;
mod spec;

use std::path::{Path, PathBuf};

use hull_agent::protocol::messages;

use crate::api::runtime::{ContainerConfig, Mount, MountPropagation};
use crate::security::devices::{self, DeviceError};

use spec::{ContainerEdits, DeviceNode};

/// Where the files are; what stands in a later directory goes before what stands in an earlier one.
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// Container annotations with this prefix name devices, too: kubelet's older way to pass on what a device plugin gave.
const ANNOTATION: &str = "cdi.k8s.io/";
/// Devices of one container.
const MAX_DEVICES: usize = 256;
/// Mount options that say what is so anyway.
const IMPLIED: [&str; 5] = ["bind", "rbind", "rw", "private", "rprivate"];

/// Why a container cannot have a device.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// Not `VENDOR/CLASS=NAME`.
    #[error("{0:?} is not the name of a CDI device: VENDOR/CLASS=NAME")]
    Name(String),
    /// More than [`MAX_DEVICES`].
    #[error("a container can have {MAX_DEVICES} CDI devices at most")]
    TooMany,
    /// No file describes it.
    #[error("the CDI device {device} is neither in {looked}{broken}")]
    Unknown {
        /// `VENDOR/CLASS=NAME`
        device: String,
        /// The directories.
        looked: String,
        /// Files that could not be read.
        broken: String,
    },
    /// Two files describe it.
    #[error("the CDI device {device} is described twice, in {0} and {1}", files[0].display(), files[1].display())]
    Conflict {
        /// `VENDOR/CLASS=NAME`
        device: String,
        /// The files.
        files: [PathBuf; 2],
    },
    /// The file asks for something that hull does not do, or that cannot be.
    #[error("the CDI device {device} ({file}) {reason}")]
    Edit {
        /// `VENDOR/CLASS=NAME`
        device: String,
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
}

/// What devices change about a container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edits {
    /// `NAME=VALUE`, each replacing an earlier one.
    pub env: Vec<String>,
    /// Nodes to make and to allow.
    pub devices: Vec<messages::Device>,
    /// Bind mounts, each replacing one of the request at the same path.
    pub mounts: Vec<Mount>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The devices that a container asks for, in order, each once.
pub fn names(config: &ContainerConfig) -> Vec<String> {
    let of_annotations = config
        .annotations
        .iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION))
        .flat_map(|(_, value)| value.split(',').map(str::trim));
    let asked = config.cdi_devices.iter().map(|device| device.name.as_str()).chain(of_annotations);
    let mut names: Vec<String> = Vec::new();
    for name in asked.filter(|name| !name.is_empty()) {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// Looks the devices up on the host. Blocks for a little while.
pub fn edits(names: &[String], directories: &[&Path]) -> Result<Edits, CdiError> {
    if names.len() > MAX_DEVICES {
        return Err(CdiError::TooMany);
    }
    let mut edits = Edits::default();
    let mut applied: Vec<PathBuf> = Vec::new();
    for full in names {
        let (kind, name) = parse(full).ok_or_else(|| CdiError::Name(full.chars().take(200).collect()))?;
        let found = files::find(kind, name, directories)?;
        let fail = |reason: String| CdiError::Edit {
            device: full.clone(),
            file: found.path.display().to_string(),
            reason,
        };
        // What belongs to the whole file is done once.
        if !applied.contains(&found.path) {
            edits.apply(&found.spec.container_edits).map_err(fail)?;
            applied.push(found.path.clone());
        }
        edits.apply(&found.device.container_edits).map_err(fail)?;
    }
    Ok(edits)
}

/// `VENDOR/CLASS=NAME` taken apart; each part begins and ends with a letter or digit (a name may begin with any).
fn parse(full: &str) -> Option<(&str, &str)> {
    let (kind, name) = full.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    let part = |text: &str, more: &str| {
        text.len() <= 253
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    (part(vendor, "-_.") && part(class, "-_.") && part(name, "-_.:")).then_some((kind, name))
}

impl Edits {
    fn apply(&mut self, edits: &ContainerEdits) -> Result<(), String> {
        if let Some(hook) = edits.hooks.first() {
            return Err(format!("wants the {} hook {}; hull runs no hooks", hook.hook_name, hook.path));
        }
        if edits.intel_rdt.is_some() || !edits.net_devices.is_empty() {
            return Err("wants intelRdt or netDevices, which hull does not do".into());
        }
        for entry in &edits.env {
            let name = entry.split_once('=').map_or("", |(name, _)| name);
            if name.is_empty() || entry.contains('\0') {
                return Err(format!("sets the variable {entry:?}, which is not NAME=VALUE"));
            }
            self.env.push(entry.clone());
        }
        for node in &edits.device_nodes {
            for device in device(node)? {
                self.devices.retain(|known| known.path != device.path);
                self.devices.push(device);
            }
        }
        for asked in &edits.mounts {
            let mount = mount(asked)?;
            self.mounts.retain(|known| known.container_path != mount.container_path);
            self.mounts.push(mount);
        }
        if edits.additional_gids.contains(&u32::MAX) {
            return Err("adds the group 4294967295, which is none".into());
        }
        // 0 would be root's group, and means nothing in these files.
        self.groups.extend(edits.additional_gids.iter().filter(|gid| **gid != 0));
        Ok(())
    }
}

fn device(node: &DeviceNode) -> Result<Vec<messages::Device>, String> {
    let host_path = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let look_up = || devices::from_cri(host_path, &node.path, &node.permissions);
    let mut found = match (node.r#type.as_str(), node.major, node.minor) {
        ("b" | "c" | "u", Some(major), Some(minor)) => vec![messages::Device {
            path: node.path.clone(),
            r#type: if node.r#type == "b" { "b" } else { "c" }.to_owned(),
            major,
            minor,
            mode: 0o666,
            access: devices::access_of(host_path, &node.permissions).map_err(|error| error.to_string())?,
            ..Default::default()
        }],
        ("" | "b" | "c" | "u", ..) => look_up().map_err(|error: DeviceError| error.to_string())?,
        (kind, ..) => return Err(format!("has a device node of the type {kind:?}")),
    };
    for device in &mut found {
        device.mode = node.file_mode.map_or(device.mode, |mode| mode & 0o777);
        device.uid = node.uid.unwrap_or(device.uid);
        device.gid = node.gid.unwrap_or(device.gid);
    }
    Ok(found)
}

fn mount(asked: &spec::Mount) -> Result<Mount, String> {
    let spec::Mount { host_path, container_path, .. } = asked;
    if !matches!(asked.r#type.as_str(), "" | "bind" | "none") {
        return Err(format!("has a mount of the type {:?} at {container_path}", asked.r#type));
    }
    // Nothing is made on the host for it.
    std::fs::metadata(host_path).map_err(|error| format!("mounts {host_path}: {error}"))?;
    let mut mount =
        Mount { host_path: host_path.clone(), container_path: container_path.clone(), ..Default::default() };
    for option in &asked.options {
        match option.as_str() {
            "ro" => mount.readonly = true,
            "rro" => (mount.readonly, mount.recursive_read_only) = (true, true),
            "slave" | "rslave" => mount.propagation = MountPropagation::PropagationHostToContainer.into(),
            "shared" | "rshared" => mount.propagation = MountPropagation::PropagationBidirectional.into(),
            option if IMPLIED.contains(&option) => {}
            // Judged with those of the request.
            option => mount.mount_options.push(option.to_owned()),
        }
    }
    Ok(mount)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::CdiDevice;
    use std::fs;

    const YAML: &str = "cdiVersion: 0.6.0\nkind: vendor.com/gpu\ncontainerEdits:\n  env: [DRIVER=1]\n\
        devices:\n- name: zero\n  containerEdits:\n    env: [ONE=1]\n    deviceNodes:\n    - path: /dev/gpu0\n      hostPath: /dev/zero\n      permissions: rw\n      fileMode: 0640\n    additionalGids: [44, 0]\n\
        - name: \"1\"\n  containerEdits:\n    deviceNodes:\n    - {path: /dev/gpu1, type: c, major: 195, minor: 1, uid: 5}\n    mounts:\n    - {hostPath: /etc, containerPath: /vendor, options: [ro, nosuid, rbind]}\n\
        - name: hooked\n  containerEdits:\n    hooks:\n    - {hookName: createContainer, path: /usr/bin/evil, args: [evil]}\n";

    fn of(names: &[&str], directories: &[&Path]) -> Result<Edits, CdiError> {
        edits(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), directories)
    }

    #[test]
    fn a_device_brings_nodes_mounts_variables_and_groups() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("vendor.yaml"), YAML).unwrap();
        fs::write(directory.path().join("ignored.txt"), "x").unwrap();
        let found = of(&["vendor.com/gpu=zero", "vendor.com/gpu=1"], &[directory.path()]).unwrap();
        assert_eq!(found.env, ["DRIVER=1", "ONE=1"], "what belongs to the file is there once");
        let [zero, one] = &found.devices[..] else { panic!("{found:?}") };
        assert_eq!((zero.path.as_str(), zero.major, zero.minor, zero.mode), ("/dev/gpu0", 1, 5, 0o640));
        assert_eq!(zero.access, "rw");
        assert_eq!((one.path.as_str(), one.major, one.minor, one.uid), ("/dev/gpu1", 195, 1, 5));
        assert_eq!(found.groups, [44]);
        let [mount] = &found.mounts[..] else { panic!("{found:?}") };
        assert!(mount.readonly && mount.mount_options == ["nosuid"] && mount.container_path == "/vendor");
    }

    #[test]
    fn what_is_not_there_or_cannot_be_is_refused_with_the_reason() {
        let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let directories = [lower.path(), upper.path()];
        let refused = |name: &str| of(&[name], &directories).unwrap_err().to_string();
        assert!(refused("vendor.com/gpu=zero").contains("is neither in"));
        fs::write(lower.path().join("broken.json"), "{").unwrap();
        assert!(refused("vendor.com/gpu=zero").contains("broken.json"));
        fs::write(lower.path().join("a.yaml"), YAML).unwrap();
        assert!(refused("vendor.com/gpu=two").contains("vendor.com/gpu=two"));
        assert!(refused("vendor.com/gpu=hooked").contains("createContainer hook /usr/bin/evil"));
        for name in
            ["gpu0", "vendor.com/gpu", "vendor.com=0", "/gpu=0", "vendor.com/gpu=", "a/b/c=0", "a/b=../x"]
        {
            assert!(refused(name).contains("is not the name"), "{name}");
        }
        fs::write(lower.path().join("b.yaml"), YAML).unwrap();
        assert!(refused("vendor.com/gpu=zero").contains("described twice"));
        // The directory of what is made at run time goes before the other one.
        fs::write(upper.path().join("c.yaml"), YAML.replace("DRIVER=1", "DRIVER=2")).unwrap();
        assert_eq!(of(&["vendor.com/gpu=zero"], &directories).unwrap().env[0], "DRIVER=2");
        for change in ["cdiVersion: 2.0.0", "kind: vendor.com/gpu\nunknown: 1"] {
            let changed =
                YAML.replace(change.split('\n').next().unwrap().split(": 2").next().unwrap(), change);
            fs::write(
                upper.path().join("c.yaml"),
                changed.replace("cdiVersion: 2.0.0: 0.6.0", "cdiVersion: 2.0.0"),
            )
            .unwrap();
            assert!(of(&["vendor.com/gpu=zero"], &[upper.path()]).is_err(), "{change}");
        }
    }

    #[test]
    fn devices_are_named_by_field_and_by_annotation() {
        let config = ContainerConfig {
            cdi_devices: vec![CdiDevice { name: "a/b=1".into() }, CdiDevice { name: "a/b=2".into() }],
            annotations: [("cdi.k8s.io/plugin", "a/b=2, a/b=3"), ("other", "a/b=4")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        assert_eq!(names(&config), ["a/b=1", "a/b=2", "a/b=3"]);
    }
}
