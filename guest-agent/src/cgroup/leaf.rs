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
use super::{CgroupError, OomWatch, cpuset, devices, files, kill, oom, resources, tree};
use crate::protocol::messages::{DeviceRule, Resources};

/// How long [`Leaf::remove`] waits for killed processes to be gone.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

/// One cgroup below the pod's, in every hierarchy.
#[derive(Debug)]
pub struct Leaf {
    control: Control,
    /// v2: the open directory.
    directory: OnceLock<OwnedFd>,
}

impl Leaf {
    pub(super) fn new(control: Control) -> Self {
        Self { control, directory: OnceLock::new() }
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// Makes the cgroup; that it exists already is no error. If it fails, what it made is gone again.
    pub fn create(&self) -> Result<(), CgroupError> {
        let directories = &self.control.directories;
        for (version, base) in directories.all() {
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
        let name = self.control.path_of("");
        let name = name.trim_end_matches('/');
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

    /// v2: the directory, for `CLONE_INTO_CGROUP`. `None` on v1 and hybrid, where [`Self::enter`] is the way in, and
    /// for a leaf that does not exist.
    pub fn clone_fd(&self) -> Option<BorrowedFd<'_>> {
        let directories = &self.control.directories;
        if !directories.hierarchies.is_v2() {
            return None;
        }
        if self.directory.get().is_none() {
            let base = directories.unified.as_ref()?;
            let opened = files::open_directory(base.as_fd(), self.control.leaf.as_deref()?).ok()?;
            // Two threads may race here; either descriptor is as good.
            let _ = self.directory.set(opened);
        }
        self.directory.get().map(AsFd::as_fd)
    }

    /// Moves a process (with all its threads) in, in all hierarchies back to back: spaced out, each move waits for an
    /// RCU grace period of some 9 ms; together they share one. 0 is the caller itself.
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
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !self.try_remove()? {
            let waited = start.elapsed();
            if waited >= REMOVE_PATIENCE {
                let waited_ms = waited.as_millis().try_into().unwrap_or(u64::MAX);
                return Err(CgroupError::Busy { cgroup: self.control.to_string(), waited_ms });
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
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
