//! A cgroup in which processes live: a container's, or the agent's own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, mkdirat};
use rustix::io::Errno;

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, OomWatch, cpuset, devices, files, freeze, kill, oom, resources, tree};
use crate::protocol::messages::{DeviceRule, Resources};

/// How long [`until_gone`] waits for killed processes to be gone.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);
/// Its first look again: an agent that has said its last word takes some tenths of a millisecond to be gone.
const FIRST_PAUSE: Duration = Duration::from_micros(100);

/// One cgroup below the pod's, in every hierarchy; or in the unified one only, see [`super::PodCgroup::own_leaf`].
#[derive(Debug)]
pub struct Leaf {
    control: Control,
    /// The open directory in the unified hierarchy.
    directory: OnceLock<OwnedFd>,
    /// See [`Leaf::keep_open`].
    tasks: OnceLock<Vec<(Version, OwnedFd)>>,
}

impl Leaf {
    pub(super) fn new(control: Control) -> Self {
        Self { control, directory: OnceLock::new(), tasks: OnceLock::new() }
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// What it is called below the pod's cgroup.
    pub fn name(&self) -> Option<&str> {
        self.control.leaf.as_deref()
    }

    /// Makes the cgroup; that it exists already is no error. If it fails, what it made is gone again.
    pub fn create(&self) -> Result<(), CgroupError> {
        self.create_with(|| ())
    }

    /// [`Self::create`] that lets everybody else on this processor go first: what is woken by what happened before is
    /// often put behind this process, even if the other processors are idle.
    pub fn create_aside(&self) -> Result<(), CgroupError> {
        self.create_with(std::thread::yield_now)
    }

    fn create_with(&self, before_each: impl Fn()) -> Result<(), CgroupError> {
        let directories = &self.control.directories;
        for (version, base) in directories.all() {
            before_each();
            let made = self.create_in(version, base);
            if let Err(error) = made {
                // The first error tells the story; leftovers of a failed removal are swept with the pod.
                let _ = self.try_remove();
                return Err(self.control.failed("make the directory", error));
            }
        }
        Ok(())
    }

    fn create_in(&self, version: Version, base: BorrowedFd<'_>) -> io::Result<()> {
        let Some(name) = self.control.leaf_in(version) else { return Ok(()) };
        match mkdirat(base, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        if let Version::V1(index) = version {
            let controllers = &self.control.directories.hierarchies.v1[index].controllers;
            if controllers.iter().any(|controller| controller == "cpuset") {
                cpuset::inherit(base, name)?;
            }
        }
        Ok(())
    }

    /// Whether it exists in the hierarchy that knows of kills for memory.
    pub fn exists(&self) -> bool {
        self.control.version_of("memory").is_some_and(|version| self.control.exists(version))
    }

    /// Sets what `resources` names and leaves the rest alone; a 0 means "not given", as in CRI. Changes are made in an
    /// order in which no intermediate state is refused, so it serves for new and for running containers. A memory
    /// limit without a swap limit means no swap at all. A swap limit is ignored where the kernel does not account
    /// swap, since kubelet sends one to every container; any other limit without its controller is an error.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        resources::apply(&self.control, resources)
    }

    /// Lets the processes use only the devices that `rules` allow; the last matching rule decides, and what none
    /// matches is denied. Start from [`super::default_device_rules`]; a single rule that allows everything lifts the
    /// restriction. Calling it again replaces the rules of before.
    pub fn restrict_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        devices::restrict(&self.control, rules)
    }

    /// The directory in the unified hierarchy (v2 and hybrid), for `CLONE_INTO_CGROUP`; the process that is born there
    /// then calls [`Self::enter_v1`]. `None` without such a hierarchy, and for a leaf that does not exist.
    pub fn clone_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.directory.get().is_none() {
            let base = self.control.directories.unified.as_ref()?;
            let opened = files::open_directory(base.as_fd(), self.control.leaf.as_deref()?).ok()?;
            // Two threads may race here; either descriptor is as good.
            let _ = self.directory.set(opened);
        }
        self.directory.get().map(AsFd::as_fd)
    }

    /// The cgroup of the unified hierarchy in which the process `pid` of this leaf is, for `CLONE_INTO_CGROUP`: where
    /// processes of a container made cgroups below the leaf, the leaf itself may take no more (cgroup-v2.rst, "No
    /// Internal Process Constraint"). An error if it is outside of the leaf. Needs the host's /proc.
    pub fn clone_fd_beside(&self, pid: i32) -> io::Result<OwnedFd> {
        let base = self.control.directories.unified.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let leaf = self.control.leaf.as_deref().ok_or(io::ErrorKind::NotFound)?;
        let memberships = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let below = below(&memberships, &self.control.to_string()).ok_or(io::ErrorKind::NotFound)?;
        files::open_directory(base.as_fd(), &format!("{leaf}{below}"))
    }

    /// The `tasks` files of its v1 hierarchies, open for writing: a process that has them, and nothing else of the
    /// cgroups, enters by writing `0` to each.
    pub fn task_files(&self) -> Result<Vec<OwnedFd>, CgroupError> {
        self.open_tasks().map(|files| files.into_iter().map(|(_, file)| file).collect())
    }

    fn open_tasks(&self) -> Result<Vec<(Version, OwnedFd)>, CgroupError> {
        let all = self.control.directories.all();
        let v1 = all.filter(|(version, _)| matches!(version, Version::V1(_)));
        v1.map(|(version, base)| {
            let opened = files::open_for_writing(base, &self.control.path_of(version, "tasks"));
            Ok((version, opened.map_err(|error| self.control.failed("open the file tasks of", error))?))
        })
        .collect()
    }

    /// Opens what processes enter by, for all that are going to: each would open and close a file for every hierarchy.
    pub fn keep_open(&self) {
        if self.tasks.get().is_none()
            && let Ok(files) = self.open_tasks()
        {
            // Whoever was faster has opened the same.
            let _ = self.tasks.set(files);
        }
        let _ = self.clone_fd();
    }

    /// Closes what [`Self::keep_open`] has opened: nobody enters any more.
    pub fn let_go(&mut self) {
        self.tasks.take();
    }

    /// Takes the calling process into the leaf of one v1 hierarchy.
    fn enter_one(&self, version: Version) -> Result<(), CgroupError> {
        let kept = self.tasks.get().and_then(|files| files.iter().find(|(one, _)| *one == version));
        match kept {
            Some((_, file)) => files::write_to(file.as_fd(), "0")
                .map_err(|error| self.control.failed_write("tasks", "0", error)),
            None => self.control.write(version, "tasks", "0"),
        }
    }

    /// Moves the calling process, which must have one thread, into the leaf of every v1 hierarchy. A thread that moves
    /// only itself needs no lock against the machine's forks (`cgroup_procs_write_start` in the kernel), which every
    /// write to `cgroup.procs` takes and waits for an RCU grace period for: measured for nine hierarchies 0.5 ms
    /// against 5 to 85 ms.
    ///
    /// The hierarchy that shares out CPU time is left to [`Self::enter_v1_cpu`]: the preparation of an exec in a
    /// container with few shares or a small quota would wait for CPU time longer than for anything else.
    pub fn enter_v1(&self) -> Result<(), CgroupError> {
        let cpu = self.control.version_of("cpu");
        let all = self.control.directories.all().map(|(version, _)| version);
        all.filter(|version| matches!(version, Version::V1(_)) && Some(*version) != cpu)
            .try_for_each(|version| self.enter_one(version))
    }

    /// The last step of the way in, after [`Self::enter_v1`].
    pub fn enter_v1_cpu(&self) -> Result<(), CgroupError> {
        match self.control.version_of("cpu") {
            Some(cpu @ Version::V1(_)) => self.enter_one(cpu),
            _ => Ok(()),
        }
    }

    /// Moves another process (with all its threads) in, in all hierarchies back to back: spaced out, each move waits
    /// for an RCU grace period of 9 ms and more; together they share one. Nothing on the way of a start uses it.
    pub fn enter(&self, pid: i32) -> Result<(), CgroupError> {
        let pid = pid.to_string();
        let versions: Vec<Version> = self.control.directories.all().map(|(version, _)| version).collect();
        versions.into_iter().try_for_each(|version| self.control.write(version, "cgroup.procs", &pid))
    }

    /// Kills every process in it and in cgroups below it. With `cgroup.kill` that is one write, after which they are
    /// dying but perhaps not gone; without it the cgroup is frozen and emptied by signals, for at most two seconds.
    pub fn kill(&self) -> Result<(), CgroupError> {
        kill::kill(&self.control)
    }

    /// Makes everything in it stand still, and waits up to two seconds until it does; on failure all go on.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        freeze::freeze(&self.control)
    }

    /// Lets everything in it go on after [`Leaf::freeze`]. Nothing happens to a leaf that is not frozen, or is gone.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        freeze::thaw(&self.control)
    }

    /// Every process in it and in cgroups below it, as the caller's PID namespace numbers them. A leaf that does not
    /// exist has none.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        kill::processes(&self.control)
    }

    /// How many of its processes the kernel has killed for memory. 0 where nobody counts (no memory controller).
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        oom::kills(&self.control)
    }

    /// Something to poll for OOM kills; `None` without a memory controller.
    pub fn oom_watch(&self) -> Result<Option<OomWatch>, CgroupError> {
        oom::watch(&self.control)
    }

    /// Removes it from every hierarchy with all that is below it; a missing one counts as removed. Waits up to two
    /// seconds for dying processes. An event loop uses [`Self::try_remove`] with a timer of its own.
    pub fn remove(&self) -> Result<(), CgroupError> {
        until_gone(&self.control, || self.try_remove())
    }

    /// One attempt of [`Self::remove`], without waiting: false if something is still in use.
    pub fn try_remove(&self) -> Result<bool, CgroupError> {
        let Some(name) = self.control.leaf.as_deref() else { return Ok(false) };
        let mut all_gone = true;
        for (_, base) in self.control.directories.all() {
            all_gone &= tree::remove(base, name)
                .map_err(|error| self.control.failed("remove the directory", error))?;
        }
        Ok(all_gone)
    }
}

/// Tries until nothing is in use any more.
pub(super) fn until_gone(
    control: &Control,
    mut try_remove: impl FnMut() -> Result<bool, CgroupError>,
) -> Result<(), CgroupError> {
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    while !try_remove()? {
        let waited = start.elapsed();
        if waited >= REMOVE_PATIENCE {
            let waited_ms = waited.as_millis().try_into().unwrap_or(u64::MAX);
            return Err(CgroupError::Busy { cgroup: control.to_string(), waited_ms });
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

/// What the path of a process in the unified hierarchy has after `leaf`, by its /proc/PID/cgroup: empty or `/a/b`.
fn below<'a>(memberships: &'a str, leaf: &str) -> Option<&'a str> {
    let path = memberships.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = path.strip_prefix(leaf)?;
    let inside = below.is_empty() || below.starts_with('/');
    (inside && !below.split('/').any(|level| level == "..")).then_some(below)
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn a_place_beside_a_process_is_inside_the_leaf_or_none() {
        let of = |path: &str| below(&format!("3:cpu:/x\n0::{path}\n"), "/pod/leaf").map(str::to_owned);
        assert_eq!(of("/pod/leaf/a/b").as_deref(), Some("/a/b"));
        assert_eq!(of("/pod/leaf").as_deref(), Some(""));
        for outside in ["/pod/leaf2", "/pod", "/../x", "/pod/leaf/../other"] {
            assert_eq!(of(outside), None, "{outside}");
        }
        assert_eq!(below("3:cpu:/pod/leaf\n", "/pod/leaf"), None);
    }
}
