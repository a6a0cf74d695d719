//! One cgroup in all hierarchies at once: where its control files are, and how its failures are told.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::hierarchies::{Hierarchies, Version};
use super::{CgroupError, files};

/// The pod's directory in every hierarchy, open. One that does not exist (any more) is `None`.
#[derive(Debug)]
pub(super) struct Directories {
    pub(super) hierarchies: Arc<Hierarchies>,
    /// Below the hierarchies' roots, with a leading slash.
    pub(super) path: String,
    /// In the order of `hierarchies.v1`.
    pub(super) v1: Vec<Option<OwnedFd>>,
    pub(super) unified: Option<OwnedFd>,
}

impl Directories {
    pub(super) fn of(&self, version: Version) -> Option<BorrowedFd<'_>> {
        match version {
            Version::V1(index) => self.v1.get(index)?.as_ref().map(AsFd::as_fd),
            Version::V2 => self.unified.as_ref().map(AsFd::as_fd),
        }
    }

    /// Every hierarchy in which the directory exists, the unified one last.
    pub(super) fn all(&self) -> impl DoubleEndedIterator<Item = (Version, BorrowedFd<'_>)> {
        let v1 = self.v1.iter().enumerate();
        let v1 = v1.filter_map(|(index, fd)| Some((Version::V1(index), fd.as_ref()?.as_fd())));
        v1.chain(self.unified.iter().map(|fd| (Version::V2, fd.as_fd())))
    }
}

/// One cgroup: the pod's own directory, or a leaf below it.
#[derive(Clone, Debug)]
pub(super) struct Control {
    pub(super) directories: Arc<Directories>,
    /// A checked name; `None` for the pod's directory itself.
    pub(super) leaf: Option<String>,
    /// Whether the leaf exists in v1 hierarchies. If not, its processes live in the pod's own directory there.
    pub(super) leaf_in_v1: bool,
}

impl fmt::Display for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.directories.path;
        match &self.leaf {
            Some(leaf) => write!(formatter, "{}/{leaf}", path.trim_end_matches('/')),
            None => formatter.write_str(path),
        }
    }
}

impl Control {
    /// The interface of `controller` here, if the cgroup exists in its hierarchy.
    pub(super) fn version_of(&self, controller: &str) -> Option<Version> {
        let version = self.directories.hierarchies.version_of(controller)?;
        self.directories.of(version).map(|_| version)
    }

    /// The pod's own directory.
    pub(super) fn of_pod(directories: Arc<Directories>) -> Self {
        Self { directories, leaf: None, leaf_in_v1: false }
    }

    /// Name of the leaf in that hierarchy; `None` if it is the pod's directory itself.
    pub(super) fn leaf_in(&self, version: Version) -> Option<&str> {
        let is_there = self.leaf_in_v1 || version == Version::V2;
        self.leaf.as_deref().filter(|_| is_there)
    }

    /// Path of a control file in that hierarchy relative to the pod's directory.
    pub(super) fn path_of(&self, version: Version, file: &str) -> String {
        match self.leaf_in(version) {
            Some(leaf) => format!("{leaf}/{file}"),
            None => file.to_owned(),
        }
    }

    pub(super) fn directory(&self, version: Version) -> Result<BorrowedFd<'_>, CgroupError> {
        let missing = || self.failed("open the directory", io::Error::from(io::ErrorKind::NotFound));
        self.directories.of(version).ok_or_else(missing)
    }

    /// Writes a control file; the plain I/O error, for callers that know better what it means.
    pub(super) fn try_write(&self, version: Version, file: &str, value: &str) -> io::Result<()> {
        let base = self.directories.of(version).ok_or(io::ErrorKind::NotFound)?;
        files::write(base, &self.path_of(version, file), value)
    }

    pub(super) fn try_read(&self, version: Version, file: &str) -> io::Result<String> {
        let base = self.directories.of(version).ok_or(io::ErrorKind::NotFound)?;
        files::read(base, &self.path_of(version, file))
    }

    pub(super) fn write(&self, version: Version, file: &str, value: &str) -> Result<(), CgroupError> {
        self.try_write(version, file, value).map_err(|error| self.failed_write(file, value, error))
    }

    pub(super) fn read(&self, version: Version, file: &str) -> Result<String, CgroupError> {
        self.try_read(version, file).map_err(|error| self.failed(format!("read {file}"), error))
    }

    /// Writes a limit of `controller`; a missing file means that the controller is not there.
    pub(super) fn set(
        &self,
        controller: &str,
        version: Version,
        file: &str,
        value: &str,
    ) -> Result<(), CgroupError> {
        match self.try_write(version, file, value) {
            Ok(()) => Ok(()),
            Err(error) if files::is_missing(&error) && self.exists(version) => {
                Err(self.missing(controller, file))
            }
            Err(error) => Err(self.failed_write(file, value, error)),
        }
    }

    /// Whether the cgroup itself exists in that hierarchy.
    pub(super) fn exists(&self, version: Version) -> bool {
        self.directories
            .of(version)
            .is_some_and(|base| files::open_for_reading(base, &self.path_of(version, "cgroup.procs")).is_ok())
    }

    pub(super) fn missing(&self, controller: &str, limit: &str) -> CgroupError {
        CgroupError::MissingController {
            controller: controller.to_owned(),
            limit: limit.to_owned(),
            cgroup: self.to_string(),
        }
    }

    pub(super) fn failed_write(&self, file: &str, value: &str, error: io::Error) -> CgroupError {
        self.failed(format!("write {value:?} to {file}"), error)
    }

    pub(super) fn failed(&self, action: impl Into<String>, source: io::Error) -> CgroupError {
        CgroupError::Io { action: action.into(), cgroup: self.to_string(), source }
    }
}
