//! The roots of the cgroup hierarchies, held open.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FsWord, Mode, OFlags, fstatfs, open};

use super::{CgroupError, files};
use crate::protocol::messages::CgroupLayout;

/// `CGROUP_SUPER_MAGIC` of linux/magic.h.
const V1_MAGIC: FsWord = 0x0027_e0eb;
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const V2_MAGIC: FsWord = 0x6367_7270;

/// Controllers that hull hands down on v2, if the machine has them.
const WANTED: [&str; 6] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"];

/// Open descriptors of the hierarchies' roots; they work after the process has left the host's mounts.
#[derive(Debug)]
pub struct Hierarchies {
    pub(super) unified: Option<Unified>,
    pub(super) v1: Vec<V1>,
    v2: bool,
}

/// The cgroup2 hierarchy.
#[derive(Debug)]
pub(super) struct Unified {
    pub(super) root: OwnedFd,
    /// Those of [`WANTED`] that its root offers.
    pub(super) controllers: Vec<&'static str>,
}

/// One v1 hierarchy.
#[derive(Debug)]
pub(super) struct V1 {
    pub(super) root: OwnedFd,
    pub(super) controllers: Vec<String>,
}

/// Which interface a controller has on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// v1; the number is the hierarchy's index.
    V1(usize),
    V2,
}

impl Hierarchies {
    /// Opens the roots that `layout` names and checks that they are what it says.
    pub fn open(layout: &CgroupLayout) -> Result<Self, CgroupError> {
        let unified = if layout.unified.is_empty() {
            None
        } else {
            let root = open_root(&layout.unified, V2_MAGIC)?;
            let offered = files::read(root.as_fd(), "cgroup.controllers")
                .map_err(|source| CgroupError::Hierarchy { mount_point: layout.unified.clone(), source })?;
            let controllers =
                WANTED.into_iter().filter(|name| offered.split_ascii_whitespace().any(|have| have == *name));
            Some(Unified { root, controllers: controllers.collect() })
        };
        let mut v1 = Vec::with_capacity(layout.v1.len());
        for hierarchy in &layout.v1 {
            let root = open_root(&hierarchy.mount_point, V1_MAGIC)?;
            v1.push(V1 { root, controllers: hierarchy.controllers.clone() });
        }
        if unified.is_none() && v1.is_empty() {
            return Err(CgroupError::Discover("the layout names none".into()));
        }
        let v2 = layout.unified_controllers && unified.is_some();
        Ok(Self { unified, v1, v2 })
    }

    /// Of plain directories with recorded files.
    #[cfg(test)]
    pub(super) fn recorded(
        unified: Option<(OwnedFd, &[&'static str])>,
        v1: Vec<(OwnedFd, Vec<String>)>,
        v2: bool,
    ) -> Self {
        let unified = unified.map(|(root, controllers)| Unified { root, controllers: controllers.to_vec() });
        Self { unified, v1: v1.into_iter().map(|(root, controllers)| V1 { root, controllers }).collect(), v2 }
    }

    /// Whether the machine is a v2 one: processes enter by `CLONE_INTO_CGROUP` and `unified` limits are possible.
    pub fn is_v2(&self) -> bool {
        self.v2
    }

    /// Where the controller is to be found, if anywhere.
    pub(super) fn version_of(&self, controller: &str) -> Option<Version> {
        let v1 =
            self.v1.iter().position(|hierarchy| hierarchy.controllers.iter().any(|have| have == controller));
        v1.map(Version::V1).or_else(|| {
            let unified = self.unified.as_ref()?;
            unified.controllers.contains(&controller).then_some(Version::V2)
        })
    }

    /// Every hierarchy's root, the unified one last.
    pub(super) fn roots(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let v1 = self.v1.iter().map(|hierarchy| hierarchy.root.as_fd());
        v1.chain(self.unified.iter().map(|unified| unified.root.as_fd()))
    }
}

fn open_root(mount_point: &str, magic: FsWord) -> Result<OwnedFd, CgroupError> {
    let fail = |source: io::Error| CgroupError::Hierarchy { mount_point: mount_point.to_owned(), source };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(mount_point, flags, Mode::empty()).map_err(|errno| fail(errno.into()))?;
    let kind = fstatfs(&root).map_err(|errno| fail(errno.into()))?.f_type;
    if kind != magic {
        return Err(fail(io::Error::other("another kind of filesystem is mounted there")));
    }
    Ok(root)
}
