//! The pod's directory in every hierarchy.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, mkdirat, unlinkat};
use rustix::io::Errno;

use super::control::{Control, Directories};
use super::{CgroupError, Hierarchies, Leaf, cpuset, files, kill, leaf, oom, path, resources, tree};
use crate::protocol::messages::Resources;

/// How often the walk starts anew when somebody removes a level that it is about to use.
const WALK_ATTEMPTS: usize = 8;

/// The cgroup under which all processes of a pod live, each in a [`Leaf`].
#[derive(Debug)]
pub struct PodCgroup {
    control: Control,
    /// How many of the lowest levels were made by hull, for each hierarchy in the order of `Hierarchies::roots`.
    created: Vec<u32>,
}

impl PodCgroup {
    /// Opens the pod's cgroup at `parent` (as CRI gives it in `cgroup_parent`, e.g. `/kubepods/burstable/pod123`) and
    /// makes the levels that are missing. On v2 every controller that the machine has is handed down to it and on to
    /// its leaves; on v1 empty cpusets get their parent's CPUs and nodes. If it fails, what it made is gone again.
    pub fn open(hierarchies: Arc<Hierarchies>, parent: &str) -> Result<Self, CgroupError> {
        let levels = path::levels(parent)?;
        let path = format!("/{}", levels.join("/"));
        let mut created = Vec::new();
        let mut opened = Vec::new();
        for (index, root) in hierarchies.roots().enumerate() {
            let kind = match hierarchies.v1.get(index) {
                Some(v1) => Kind::V1 { cpuset: v1.controllers.iter().any(|name| name == "cpuset") },
                None => {
                    Kind::V2 { controllers: hierarchies.unified.as_ref().map_or(&[], |one| &one.controllers) }
                }
            };
            let walk = Walk { root, levels: &levels, kind };
            match walk.to_the_end() {
                Ok((directory, count)) => {
                    opened.push(Some(directory));
                    created.push(count);
                }
                Err(error) => {
                    // The first error tells the story.
                    let _ = remove_levels(&hierarchies, &levels, &created);
                    return Err(error);
                }
            }
        }
        let unified = if hierarchies.unified.is_some() { opened.pop().flatten() } else { None };
        let directories = Arc::new(Directories { hierarchies, path, v1: opened, unified });
        Ok(Self { control: Control::of_pod(directories), created })
    }

    /// Opens the pod's cgroup where it exists and makes nothing: for taking up or clearing away what another process
    /// made. `created_levels` is what that process got from [`Self::created_levels`].
    pub fn open_existing(
        hierarchies: Arc<Hierarchies>,
        parent: &str,
        created_levels: u32,
    ) -> Result<Self, CgroupError> {
        let levels = path::levels(parent)?;
        let path = format!("/{}", levels.join("/"));
        let relative = if levels.is_empty() { ".".to_owned() } else { levels.join("/") };
        let mut opened = Vec::new();
        for root in hierarchies.roots() {
            opened.push(match files::open_directory(root, &relative) {
                Ok(directory) => Some(directory),
                Err(error) if files::is_missing(&error) => None,
                Err(source) => {
                    return Err(CgroupError::Io {
                        action: "open the directory".into(),
                        cgroup: path,
                        source,
                    });
                }
            });
        }
        let (of_v1, of_unified) = unpack(created_levels);
        let mut created = vec![of_v1; hierarchies.v1.len()];
        created.extend(hierarchies.unified.iter().map(|_| of_unified));
        let unified = if hierarchies.unified.is_some() { opened.pop().flatten() } else { None };
        let directories = Arc::new(Directories { hierarchies, path, v1: opened, unified });
        Ok(Self { control: Control::of_pod(directories), created })
    }

    /// How many processes the kernel has killed for memory: on v2 in it and below it.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        oom::kills(&self.control)
    }

    /// Whether it exists in any hierarchy.
    pub fn exists(&self) -> bool {
        self.control.directories.all().next().is_some()
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// The place of a leaf called `name` (one path component); nothing is made yet.
    pub fn leaf(&self, name: &str) -> Result<Leaf, CgroupError> {
        self.place(name, true)
    }

    /// The place of the agent's leaf. On a hybrid machine it is one in the unified hierarchy only, by which its processes
    /// can be killed and seen to be gone; in v1, which lets a directory with others below it hold processes, they live in
    /// the pod's directory itself and are counted there as they would be below it. That saves making and removing a
    /// directory in each hierarchy. [`Leaf::remove`] of [`Self::leaf`] with the same name removes it, wherever it is.
    pub fn own_leaf(&self, name: &str) -> Result<Leaf, CgroupError> {
        self.place(name, self.control.directories.unified.is_none())
    }

    fn place(&self, name: &str, leaf_in_v1: bool) -> Result<Leaf, CgroupError> {
        path::check_name(name)?;
        let directories = Arc::clone(&self.control.directories);
        Ok(Leaf::new(Control { directories, leaf: Some(name.to_owned()), leaf_in_v1 }))
    }

    /// Sets limits of the pod as a whole. See [`Leaf::apply`] for the meaning of each.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        resources::apply(&self.control, resources)
    }

    /// How many of the path's lowest levels did not exist before [`Self::open`]: 0 when kubelet had made it. To be
    /// kept as it is for [`Self::open_existing`]: where the unified hierarchy of a hybrid machine differs from the
    /// others (kubelet makes its cgroups in v1 only) it holds both numbers.
    pub fn created_levels(&self) -> u32 {
        let v1 = self.control.directories.hierarchies.v1.len();
        let (of_v1, of_unified) = self.created.split_at(v1.min(self.created.len()));
        pack(of_v1.iter().copied().max(), of_unified.first().copied())
    }

    /// Whether hull made the pod's own directory, so that limits of the pod are hull's to set.
    pub fn is_own(&self) -> bool {
        // On a hybrid machine the limits are in v1.
        self.created.first().is_some_and(|count| *count > 0)
    }

    /// Ends and removes everything below, whatever it is called: what is left of a pod of whose containers nobody knows.
    /// Waits up to two seconds for what dies. Only for a cgroup that is this pod's alone: several pods may be given the
    /// same one.
    pub fn end_all_below(&self) -> Result<(), CgroupError> {
        kill::kill(&self.control)?;
        leaf::until_gone(&self.control, || {
            let mut all_gone = true;
            for (_, base) in self.control.directories.all() {
                let failed = |error| self.control.failed("remove what is below", error);
                for child in tree::children(base).map_err(failed)? {
                    all_gone &= tree::remove(base, &child).map_err(failed)?;
                }
            }
            Ok(all_gone)
        })
    }

    /// Removes the levels that hull made, from the lowest up, as far as nobody else uses them. The leaves must have
    /// been removed. True if the lowest, the pod's own, is gone: those above it may be other pods', too.
    pub fn remove_created(&self) -> Result<bool, CgroupError> {
        let path = self.control.directories.path.clone();
        let levels = path::levels(&path)?;
        remove_levels(&self.control.directories.hierarchies, &levels, &self.created)
    }
}

/// Marks a number that holds two.
const DIFFERENT: u32 = 1 << 31;

/// One number for the levels made in v1 and in the unified hierarchy; a path has at most 64 levels.
fn pack(of_v1: Option<u32>, of_unified: Option<u32>) -> u32 {
    match (of_v1, of_unified) {
        (Some(v1), Some(unified)) if v1 != unified => DIFFERENT | unified << 16 | v1,
        (v1, unified) => v1.or(unified).unwrap_or(0),
    }
}

fn unpack(packed: u32) -> (u32, u32) {
    if packed & DIFFERENT == 0 { (packed, packed) } else { (packed & 0xffff, (packed & !DIFFERENT) >> 16) }
}

/// What a new level needs.
#[derive(Clone, Copy)]
enum Kind<'a> {
    V1 { cpuset: bool },
    V2 { controllers: &'a [&'static str] },
}

/// The way from one hierarchy's root down to the pod.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    levels: &'a [&'a str],
    kind: Kind<'a>,
}

impl Walk<'_> {
    /// The open directory and how many of the lowest levels had to be made.
    fn to_the_end(&self) -> Result<(OwnedFd, u32), CgroupError> {
        if let Some(ready) = self.if_ready() {
            return Ok((ready, 0));
        }
        let mut first_made = self.levels.len();
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.level_by_level(&mut first_made) {
                Ok(directory) => return Ok((directory, (self.levels.len() - first_made) as u32)),
                // Another pod's end took a shared level away between our look and our use of it.
                Err(CgroupError::Io { source, .. })
                    if files::is_missing(&source) && attempts < WALK_ATTEMPTS => {}
                Err(error) => {
                    self.take_back(first_made);
                    return Err(error);
                }
            }
        }
    }

    /// The usual case under kubelet: the directory is there and has all that its leaves need.
    fn if_ready(&self) -> Option<OwnedFd> {
        let path = if self.levels.is_empty() { ".".to_owned() } else { self.levels.join("/") };
        let directory = files::open_directory(self.root, &path).ok()?;
        let ready = match self.kind {
            Kind::V1 { cpuset: false } => true,
            Kind::V1 { cpuset: true } => cpuset::is_filled(directory.as_fd(), "").unwrap_or(false),
            Kind::V2 { controllers } => {
                let enabled = files::read(directory.as_fd(), "cgroup.subtree_control").ok()?;
                missing_from(&enabled, controllers).is_empty()
            }
        };
        ready.then_some(directory)
    }

    /// `first_made` becomes the index of the uppermost level that had to be made.
    fn level_by_level(&self, first_made: &mut usize) -> Result<OwnedFd, CgroupError> {
        let mut here =
            files::open_directory(self.root, ".").map_err(|error| self.failed(0, "open", error))?;
        for (index, level) in self.levels.iter().enumerate() {
            let fail = |action| move |error| self.failed(index + 1, action, error);
            self.hand_down(here.as_fd(), index)?;
            match mkdirat(&here, *level, Mode::from_raw_mode(0o755)) {
                Ok(()) => *first_made = (*first_made).min(index),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(fail("make")(errno.into())),
            }
            if matches!(self.kind, Kind::V1 { cpuset: true }) {
                cpuset::inherit(here.as_fd(), level).map_err(fail("fill the cpuset of"))?;
            }
            here = files::open_directory(here.as_fd(), level).map_err(fail("open"))?;
        }
        self.hand_down(here.as_fd(), self.levels.len())?;
        Ok(here)
    }

    /// On v2, enables the controllers for the children of an open level.
    fn hand_down(&self, level: BorrowedFd<'_>, depth: usize) -> Result<(), CgroupError> {
        let Kind::V2 { controllers } = self.kind else { return Ok(()) };
        let fail = |error| self.failed(depth, "hand controllers down from", error);
        let enabled = files::read(level, "cgroup.subtree_control").map_err(fail)?;
        let missing = missing_from(&enabled, controllers);
        if missing.is_empty() {
            return Ok(());
        }
        let all: Vec<String> = missing.iter().map(|controller| format!("+{controller}")).collect();
        match files::write(level, "cgroup.subtree_control", &all.join(" ")) {
            Ok(()) => return Ok(()),
            // Going on with one at a time would get the threaded controllers (cpu, cpuset, pids) and so turn the
            // level into a thread root, which can never have the others.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
                return Err(CgroupError::InternalProcesses { cgroup: self.path_to(depth) });
            }
            Err(error) if files::is_missing(&error) && !level_exists(level) => return Err(fail(error)),
            Err(_) => {}
        }
        // One that cannot be had (cpu beside realtime processes, one that a parent withholds) must not cost the
        // others; a limit that needs it fails with the controller's name when it is set.
        for one in &all {
            let _ = files::write(level, "cgroup.subtree_control", one);
        }
        Ok(())
    }

    /// Removes what this walk made, from the lowest level up.
    fn take_back(&self, first_made: usize) {
        for length in (first_made + 1..=self.levels.len()).rev() {
            // One that is in use, or was never reached, stays or is not there; nothing better can be done with either.
            let _ = unlinkat(self.root, self.levels[..length].join("/"), AtFlags::REMOVEDIR);
        }
    }

    fn failed(&self, depth: usize, action: &str, source: io::Error) -> CgroupError {
        CgroupError::Io { action: format!("{action} the directory"), cgroup: self.path_to(depth), source }
    }

    fn path_to(&self, depth: usize) -> String {
        format!("/{}", self.levels[..depth].join("/"))
    }
}

fn level_exists(level: BorrowedFd<'_>) -> bool {
    files::open_for_reading(level, "cgroup.procs").is_ok()
}

fn missing_from<'a>(enabled: &str, wanted: &[&'a str]) -> Vec<&'a str> {
    let is_enabled = |controller: &&str| enabled.split_ascii_whitespace().any(|have| have == *controller);
    wanted.iter().copied().filter(|controller| !is_enabled(controller)).collect()
}

/// Removes, in each hierarchy, as many of the lowest levels as `created` says and as are unused. True if the lowest is gone.
fn remove_levels(hierarchies: &Hierarchies, levels: &[&str], created: &[u32]) -> Result<bool, CgroupError> {
    let mut lowest_is_gone = true;
    for (root, count) in hierarchies.roots().zip(created) {
        for length in (1..=levels.len()).rev().take(*count as usize) {
            let path = levels[..length].join("/");
            match unlinkat(root, path.as_str(), AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::BUSY | Errno::NOTEMPTY) => {
                    lowest_is_gone &= length < levels.len();
                    break;
                }
                Err(errno) => {
                    return Err(CgroupError::Io {
                        action: "remove the directory".into(),
                        cgroup: format!("/{path}"),
                        source: errno.into(),
                    });
                }
            }
        }
    }
    Ok(lowest_is_gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_in_either_kind_of_hierarchy_is_told_apart() {
        assert_eq!(pack(Some(2), Some(2)), 2);
        assert_eq!(pack(None, Some(3)), 3);
        assert_eq!(pack(Some(1), None), 1);
        for (v1, unified) in [(0, 3), (3, 0), (64, 1), (2, 2)] {
            assert_eq!(unpack(pack(Some(v1), Some(unified))), (v1, unified));
        }
    }
}
