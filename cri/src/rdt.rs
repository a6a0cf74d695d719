//! Classes of cache and memory bandwidth (Intel RDT, AMD QoS): groups that a node's administrator has made in resctrl.
//!
//! A container names one as with containerd and CRI-O; its processes are put into the group before their programs run.
//! hull makes no groups and writes no schemata (runtime-spec config-linux.md, "Intel RDT": a closID without a schema
//! must be there).

use std::path::{Path, PathBuf};

use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::blockio::class;

/// What containerd's and CRI-O's clients write on a container itself.
const OF_CONTAINER: &str = "io.kubernetes.cri.rdt-class";
/// What is written on a pod, followed by `pod` or `container.NAME`.
const OF_POD: &str = "rdt.resources.beta.kubernetes.io/";
/// The class of everything that is in no other (goresctrl).
const ROOT: &str = "system/default";
/// Directories of resctrl that are no groups (Documentation/arch/x86/resctrl.rst).
const NO_GROUPS: [&str; 3] = ["info", "mon_data", "mon_groups"];
/// Bytes of a file's name (NAME_MAX).
const MAX_NAME: usize = 255;

/// Why a container cannot have its class.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RdtError {
    /// The node's administrator has not said that there are any.
    #[error("the container asks for the RDT class {0:?}, and there are none: rdt.resctrl is not set")]
    None(String),
    /// resctrl is not mounted: it may have to be, or the machine has nothing of the kind.
    #[error(
        "the container asks for the RDT class {class:?}, and this node has none: resctrl is not mounted at {}",
        resctrl.display()
    )]
    NotMounted {
        /// What was asked for.
        class: String,
        /// Where it was looked for.
        resctrl: PathBuf,
    },
    /// There is no such class.
    #[error("the container asks for the RDT class {class:?}; {} has {known}", resctrl.display())]
    Unknown {
        /// What was asked for.
        class: String,
        /// Where it was looked for.
        resctrl: PathBuf,
        /// The classes that there are.
        known: String,
    },
}

/// The file that takes processes into the container's class; `None`: it asks for none. Without `resctrl` there are no
/// classes: an annotation has no power that the node's administrator has not given it.
pub(crate) fn tasks(
    container: &ContainerConfig,
    pod: &PodSandboxConfig,
    resctrl: Option<&Path>,
) -> Result<Option<PathBuf>, RdtError> {
    let Some(class) = class(container, pod, OF_CONTAINER, OF_POD) else { return Ok(None) };
    let Some(resctrl) = resctrl else { return Err(RdtError::None(class.into())) };
    if !resctrl.join("tasks").is_file() {
        return Err(RdtError::NotMounted { class: class.into(), resctrl: resctrl.into() });
    }
    if class == ROOT {
        return Ok(Some(resctrl.join("tasks")));
    }
    let tasks = resctrl.join(class).join("tasks");
    if is_name(class) && tasks.is_file() {
        return Ok(Some(tasks));
    }
    let known = groups(resctrl);
    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
    Err(RdtError::Unknown { class: class.into(), resctrl: resctrl.into(), known })
}

/// An annotation never becomes more of a path than one directory's name.
fn is_name(class: &str) -> bool {
    !class.contains(['/', '\0'])
        && !class.starts_with('.')
        && class.len() <= MAX_NAME
        && !NO_GROUPS.contains(&class)
}

fn groups(resctrl: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(resctrl).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("tasks").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_name(name))
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::ContainerMetadata;
    use std::fs;

    fn asks(class: &str) -> (ContainerConfig, PodSandboxConfig) {
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "app".into(), attempt: 0 }),
            ..Default::default()
        };
        let annotation = ("rdt.resources.beta.kubernetes.io/container.app".to_owned(), class.to_owned());
        (container, PodSandboxConfig { annotations: [annotation].into(), ..Default::default() })
    }

    #[test]
    fn a_class_is_a_group_that_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let resctrl = directory.path();
        let told = |class: &str| {
            let (container, pod) = asks(class);
            tasks(&container, &pod, Some(resctrl)).map_err(|error| error.to_string())
        };
        assert_eq!(told(""), Ok(None));
        assert!(told("gold").unwrap_err().contains("resctrl is not mounted at"));
        for group in ["", "gold", "silver", "info", "mon_groups"] {
            fs::create_dir_all(resctrl.join(group)).unwrap();
            fs::write(resctrl.join(group).join("tasks"), "").unwrap();
        }
        assert_eq!(told("gold"), Ok(Some(resctrl.join("gold/tasks"))));
        assert_eq!(told("system/default"), Ok(Some(resctrl.join("tasks"))));
        for class in ["bronze", "gold/..", "../gold", ".", "..", "info", "gold\0", &"g".repeat(300)] {
            assert!(told(class).unwrap_err().ends_with("has gold, silver"), "{class:?}");
        }
        let (container, _) = asks("gold");
        assert_eq!(tasks(&container, &PodSandboxConfig::default(), Some(resctrl)).unwrap(), None);
    }

    #[test]
    fn without_resctrl_in_the_configuration_a_class_is_refused_with_the_key_that_is_missing() {
        let (container, pod) = asks("gold");
        let error = tasks(&container, &pod, None).unwrap_err().to_string();
        assert_eq!(
            error,
            "the container asks for the RDT class \"gold\", and there are none: rdt.resctrl is not set"
        );
        assert_eq!(tasks(&container, &PodSandboxConfig::default(), None).unwrap(), None);
    }
}
