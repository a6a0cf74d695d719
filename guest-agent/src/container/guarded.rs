//! Masked and read-only paths.

use std::os::fd::{AsFd, OwnedFd};

use hull_sys::mount::{self, Attributes, MountAttrFlags as Attr, OpenTreeFlags};
use rustix::fs::{CWD, FileType};

use crate::sandbox::layout;

use super::failure::{During, Failure, Stage};
use super::inside::{Links, Root, file_type, is_procfs};
use super::mounts::{Part, attach};
use super::own_proc::is_missing;
use super::plan::{ContainerPlan, is_below};

/// AT_RECURSIVE of open_tree(2).
const RECURSIVE: OpenTreeFlags = OpenTreeFlags::AT_RECURSIVE;
const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// First what is read-only, then what is masked, of the paths of one part.
pub(super) fn guard(root: &Root, plan: &ContainerPlan, part: Part) -> Result<(), Failure> {
    let of_part = |path: &&String| match part {
        Part::All => true,
        Part::Outside => !is_below(path, "/proc"),
        Part::Inside => is_below(path, "/proc"),
    };
    for path in plan.readonly_paths.iter().filter(of_part) {
        if let Some(found) = find(root, path)? {
            make_readonly(found, path)?;
        }
    }
    for path in plan.masked_paths.iter().filter(of_part) {
        if let Some(found) = find(root, path)? {
            mask(found, path)?;
        }
    }
    Ok(())
}

/// What is to be guarded; `None` if this kernel or image has no such thing. What is asked for in /proc must really be in
/// procfs: otherwise a mount or link has taken its place and the real one stays open (CVE-2025-31133, CVE-2025-52881).
fn find(root: &Root, path: &str) -> Result<Option<OwnedFd>, Failure> {
    let doing = || format!("cannot protect {path}");
    let found = match root.resolve(path, Links::Follow) {
        Err(error) if is_missing(&error) => return Ok(None),
        result => result.during(Stage::Mount, doing)?,
    };
    if is_below(path, "/proc") && !is_procfs(found.as_fd()).during(Stage::Mount, doing)? {
        return Err(Failure::new(Stage::Mount, format!("cannot protect {path}: it is not in procfs")));
    }
    Ok(Some(found))
}

fn make_readonly(found: OwnedFd, path: &str) -> Result<(), Failure> {
    let doing = || format!("cannot make {path} read-only");
    let flags = CLONE | RECURSIVE | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = mount::open_tree(&found, "", flags).during(Stage::Mount, doing)?;
    let attributes = Attributes { set: Attr::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), true, &attributes).during(Stage::Mount, doing)?;
    attach(tree.as_fd(), found.as_fd(), path)
}

/// A file becomes the agent's null device, a directory its empty one: sources that nothing in the image can replace.
fn mask(found: OwnedFd, path: &str) -> Result<(), Failure> {
    let doing = || format!("cannot mask {path}");
    let directory = file_type(found.as_fd()).during(Stage::Mount, doing)? == FileType::Directory;
    let source = if directory { layout::EMPTY } else { layout::NULL };
    let tree = mount::open_tree(CWD, source, CLONE).during(Stage::Mount, doing)?;
    if directory {
        let set = Attr::MOUNT_ATTR_RDONLY
            | Attr::MOUNT_ATTR_NOSUID
            | Attr::MOUNT_ATTR_NODEV
            | Attr::MOUNT_ATTR_NOEXEC;
        mount::set_attributes(tree.as_fd(), false, &Attributes { set, ..Attributes::default() })
            .during(Stage::Mount, doing)?;
    }
    attach(tree.as_fd(), found.as_fd(), path)
}
