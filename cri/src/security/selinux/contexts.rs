use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::label::Label;

/// Bytes that are read of a file of the policy's.
const MAX_FILE: u64 = 64 << 10;
/// Which of the installed policies is in force.
const CONFIG: &str = "/etc/selinux/config";
/// The policy that is meant where the configuration names none (selinux_config(5)).
const DEFAULT_POLICY: &str = "targeted";
/// Where container-selinux puts the file of contexts if the policy has none.
const FALLBACK: &str = "/usr/share/containers/selinux/contexts";

/// The labels that the node's policy has for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contexts {
    /// Of their processes.
    pub(super) process: Label,
    /// Of their files.
    pub(super) file: Label,
}

impl Contexts {
    /// Reads `lxc_contexts` of the policy in force. `None`: the policy knows no containers.
    pub(super) fn of_node() -> io::Result<Option<Self>> {
        let config = read(Path::new(CONFIG))?.unwrap_or_default();
        let policy = value(&config, "SELINUXTYPE").unwrap_or(DEFAULT_POLICY);
        // From a file of root's, but it becomes part of a path.
        let policy = if policy.contains('/') { DEFAULT_POLICY } else { policy };
        let own = PathBuf::from("/etc/selinux").join(policy).join("contexts/lxc_contexts");
        for path in [own, FALLBACK.into()] {
            if let Some(text) = read(&path)? {
                return Self::parse(&text).map(Some).ok_or_else(|| {
                    io::Error::other(format!("{} has no labels for process and file", path.display()))
                });
            }
        }
        Ok(None)
    }

    fn parse(text: &str) -> Option<Self> {
        let label = |key| value(text, key).and_then(Label::parse);
        Some(Self { process: label("process")?, file: label("file")? })
    }
}

fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::File::open(path) {
        Ok(file) => {
            let mut text = String::new();
            file.take(MAX_FILE).read_to_string(&mut text)?;
            Ok(Some(text))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of a line `KEY = "VALUE"`; quotes are optional, as are spaces.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().filter(|line| !line.trim_start().starts_with(['#', ';'])).find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_labels_of_containers_are_the_policys() {
        // Debian's.
        let text = "process = \"system_u:system_r:container_t:s0\"\n\
                    # file = \"no\"\n\
                    content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
                    file=system_u:object_r:container_file_t:s0\n";
        let contexts = Contexts::parse(text).unwrap();
        assert_eq!(contexts.process.kind, "container_t");
        assert_eq!(contexts.file.to_string(), "system_u:object_r:container_file_t:s0");
        assert_eq!(Contexts::parse("process = \"a:b:c\"\n"), None);
        assert_eq!(value("SELINUX=permissive\nSELINUXTYPE=default\n", "SELINUXTYPE"), Some("default"));
    }
}
