//! Cgroups, version 1, hybrid and version 2, behind one set of operations.
//!
//! [`discover`] finds the hierarchies of a machine; [`Hierarchies`] holds their roots open, so that everything after
//! it works relative to descriptors and goes on working when the process has left the host's mounts. A [`PodCgroup`]
//! is the pod's directory in every hierarchy (kubelet's, or one that hull made) and a [`Leaf`] is one directory below
//! it in which processes live: a container's, or the agent's own. On v2 processes are never put into the pod's
//! directory itself ("no internal processes", cgroup-v2.rst).
//!
//! On a hybrid machine (v1 controllers, and a cgroup2 mount beside them) leaves exist in the unified hierarchy too,
//! because `cgroup.kill` and pressure figures come only from there. Which version a controller has is decided for each
//! controller separately, so a hybrid machine that keeps, say, hugetlb in the unified hierarchy works as well.

mod control;
mod convert;
mod cpuset;
mod device_filter;
mod devices;
mod discover;
mod error;
mod files;
mod freeze;
mod hierarchies;
mod kill;
mod leaf;
mod oom;
mod path;
mod pod;
mod resources;
pub mod stats;
mod tree;

#[cfg(test)]
mod tests;

pub use convert::weight_of_shares;
pub use devices::{DeviceRuleError, default_device_rules};
pub use discover::discover;
pub use error::CgroupError;
pub use hierarchies::Hierarchies;
pub use leaf::Leaf;
pub use oom::OomWatch;
pub use pod::PodCgroup;
