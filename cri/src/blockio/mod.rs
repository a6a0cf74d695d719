//! Classes of block I/O: what a node's administrator allows a container that names a class.
//!
//! The file has the form that containerd and CRI-O read by way of goresctrl (github.com/intel/goresctrl, doc/blockio.md):
//!
//! ```yaml
//! Classes:
//!   throttled:
//!   - Weight: 80
//!   - Devices: [/dev/vd[a-d], /dev/disk/by-id/*]
//!     ThrottleReadBps: 50M
//!     ThrottleWriteIOPS: 10k
//! ```
//!
//! A class becomes files of cgroup v2. Nothing else of an annotation is believed: without the file there are no classes.

mod devices;
mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::api::runtime::{ContainerConfig, PodSandboxConfig};

/// What containerd's and CRI-O's clients write on a container itself.
const OF_CONTAINER: &str = "io.kubernetes.cri.blockio-class";
/// What is written on a pod, followed by `pod` or `container.NAME`.
const OF_POD: &str = "blockio.resources.beta.kubernetes.io/";

/// Why a container cannot have its class.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClassError {
    /// There are no classes.
    #[error(
        "the container asks for the block I/O class {0:?}, and there are none: blockio.classes is not set"
    )]
    None(String),
    /// There is no such class.
    #[error("the container asks for the block I/O class {class:?}; {} has {known}", file.display())]
    Unknown {
        /// What was asked for.
        class: String,
        /// The file.
        file: PathBuf,
        /// The classes that there are.
        known: String,
    },
    /// The file cannot be used.
    #[error("cannot use the block I/O classes of {}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The kernel has nothing to make a class of.
    #[error("the container asks for the block I/O class {0:?}, which needs cgroup v2")]
    NeedsV2(String),
}

/// What a container's class comes to: files of its cgroup (v2) and their values, a line for each device.
pub(crate) fn limits(
    container: &ContainerConfig,
    pod: &PodSandboxConfig,
    file: Option<&Path>,
    v2: bool,
) -> Result<BTreeMap<String, String>, ClassError> {
    let Some(class) = class(container, pod, OF_CONTAINER, OF_POD) else { return Ok(BTreeMap::new()) };
    let file = file.ok_or_else(|| ClassError::None(class.to_owned()))?;
    let failed = |reason| ClassError::File { file: file.to_owned(), reason };
    let mut classes = file::read(file).map_err(failed)?;
    let Some(rules) = classes.remove(class) else {
        let names: Vec<String> = classes.into_keys().collect();
        let known = if names.is_empty() { "none".into() } else { names.join(", ") };
        return Err(ClassError::Unknown { class: class.to_owned(), file: file.to_owned(), known });
    };
    if !v2 {
        return Err(ClassError::NeedsV2(class.to_owned()));
    }
    let weights = devices::weight_file();
    file::to_cgroup(&rules, weights, devices::matching).map_err(failed)
}

/// The class that is named first: by the container (`own`), by its pod for it, by its pod for all (`of_pod`, followed by
/// `pod` or `container.NAME`). An empty name is none.
pub(crate) fn class<'a>(
    container: &'a ContainerConfig,
    pod: &'a PodSandboxConfig,
    own: &str,
    of_pod: &str,
) -> Option<&'a str> {
    let name = container.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
    let of_pod = |suffix: &str| pod.annotations.get(&format!("{of_pod}{suffix}"));
    let own = container.annotations.get(own);
    let found = own.or_else(|| of_pod(&format!("container.{name}"))).or_else(|| of_pod("pod"));
    found.map(String::as_str).filter(|class| !class.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::ContainerMetadata;

    fn container(annotations: &[(&str, &str)]) -> ContainerConfig {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: "app".into(), attempt: 0 }),
            annotations: annotations.collect(),
            ..Default::default()
        }
    }

    fn pod(annotations: &[(&str, &str)]) -> PodSandboxConfig {
        PodSandboxConfig { annotations: container(annotations).annotations, ..Default::default() }
    }

    #[test]
    fn the_nearest_name_counts() {
        let of_pod = ("blockio.resources.beta.kubernetes.io/pod", "pod");
        let of_app = ("blockio.resources.beta.kubernetes.io/container.app", "app");
        let of_other = ("blockio.resources.beta.kubernetes.io/container.other", "other");
        let own = ("io.kubernetes.cri.blockio-class", "own");
        let class = |own: &[(&str, &str)], of_pod: &[(&str, &str)]| {
            class(&container(own), &pod(of_pod), OF_CONTAINER, OF_POD).map(str::to_owned)
        };
        assert_eq!(class(&[own], &[of_pod, of_app]).as_deref(), Some("own"));
        assert_eq!(class(&[], &[of_pod, of_app]).as_deref(), Some("app"));
        assert_eq!(class(&[], &[of_pod, of_other]).as_deref(), Some("pod"));
        assert_eq!(class(&[], &[of_other]), None);
    }

    #[test]
    fn a_class_that_is_not_there_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("classes.yaml");
        std::fs::write(&file, "Classes:\n  slow:\n  - Weight: 100\n  fast: []\n").unwrap();
        let asks = |class| pod(&[("blockio.resources.beta.kubernetes.io/pod", class)]);
        let told = |pod: &PodSandboxConfig, file: Option<&Path>, v2| {
            limits(&container(&[]), pod, file, v2).map_err(|error| error.to_string())
        };
        assert_eq!(told(&pod(&[]), None, false), Ok(BTreeMap::new()), "nothing is asked for");
        assert_eq!(told(&asks(""), None, true), Ok(BTreeMap::new()));
        assert_eq!(told(&asks("fast"), Some(&file), true), Ok(BTreeMap::new()));
        assert!(told(&asks("slow"), None, true).unwrap_err().contains("\"slow\", and there are none"));
        assert!(told(&asks("none"), Some(&file), true).unwrap_err().contains("has fast, slow"));
        assert!(told(&asks("slow"), Some(&file), false).unwrap_err().contains("needs cgroup v2"));
        let limits = told(&asks("slow"), Some(&file), true).unwrap();
        assert!(limits.values().all(|value| value.starts_with("default ")), "{limits:?}");
    }
}
