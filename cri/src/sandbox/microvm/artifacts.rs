//! The programs and files that machines are made of, and where they are.

use std::path::{Path, PathBuf};

use crate::config::MachineConfig;

/// Where packages put programs, and where they put what is no program of the host's.
const PROGRAMS: &str = "/usr/libexec/hull";
const FILES: &str = "/usr/lib/hull";

/// All that a machine is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifacts {
    /// hull-vmm.
    pub vmm: PathBuf,
    /// hull-virtiofsd.
    pub virtiofsd: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

impl Artifacts {
    /// Finds what the configuration names, or else what lies beside hulld or where packages put it. An error is a
    /// sentence with the places that were looked at.
    pub fn find(config: &MachineConfig) -> Result<Self, String> {
        Ok(Self {
            vmm: find(config.vmm.as_deref(), "hull-vmm", PROGRAMS)?,
            virtiofsd: find(config.virtiofsd.as_deref(), "hull-virtiofsd", PROGRAMS)?,
            kernel: find(config.kernel.as_deref(), "vmlinux", FILES)?,
            initramfs: find(config.initramfs.as_deref(), "initramfs.cpio", FILES)?,
        })
    }
}

fn find(configured: Option<&Path>, name: &str, directory: &str) -> Result<PathBuf, String> {
    let places = match configured {
        Some(path) => vec![path.to_owned()],
        None => {
            let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(name)));
            beside.into_iter().chain([Path::new(directory).join(name)]).collect()
        }
    };
    places.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let places: Vec<_> = places.iter().map(|path| path.display().to_string()).collect();
        format!("there is no {name} at {}", places.join(" or "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_places_where_it_was_looked_for() {
        let config = MachineConfig { vmm: Some("/nowhere/vmm".into()), ..MachineConfig::default() };
        assert_eq!(Artifacts::find(&config).unwrap_err(), "there is no hull-vmm at /nowhere/vmm");
        let error = find(None, "no-such-thing", PROGRAMS).unwrap_err();
        assert!(error.ends_with("/no-such-thing or /usr/libexec/hull/no-such-thing"), "{error}");
    }
}
