//! The v1 cpuset controller, whose new cgroups start with no CPU and no memory node and take no process until they
//! have both (cgroup-v1/cpusets.rst).

use std::io;
use std::os::fd::BorrowedFd;

use super::files;

/// Gives the cgroup `child` (a path below `parent`) what its parent has, for each of the two lists that is empty.
pub(super) fn inherit(parent: BorrowedFd<'_>, child: &str) -> io::Result<()> {
    for list in ["cpuset.cpus", "cpuset.mems"] {
        let file = format!("{child}/{list}");
        if !files::read(parent, &file)?.trim().is_empty() {
            continue;
        }
        let inherited = files::read(parent, list)?;
        files::write(parent, &file, inherited.trim())?;
    }
    Ok(())
}

/// Whether processes can be put into the cgroup at `path`.
pub(super) fn is_filled(base: BorrowedFd<'_>, path: &str) -> io::Result<bool> {
    let filled = |list: &str| -> io::Result<bool> {
        let file = if path.is_empty() { list.to_owned() } else { format!("{path}/{list}") };
        Ok(!files::read(base, &file)?.trim().is_empty())
    };
    Ok(filled("cpuset.cpus")? && filled("cpuset.mems")?)
}
