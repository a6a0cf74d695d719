//! What a cgroup has used: the same numbers, in the same units, whichever version each controller has.
//!
//! Read by hulld straight from the files of a process pod, and by the agent of a machine for its own. Each number is
//! read by itself: one that the kernel does not keep (no controller, no pressure accounting, too old) is `None` and
//! takes nothing else with it. A cgroup that is gone has no numbers at all.

mod cpu;
mod io;
mod memory;
mod message;
mod pressure;

use std::io::Error;

use rustix::io::Errno;

pub use self::cpu::{Cpu, CpuLimits};
pub use self::io::DeviceIo;
pub use self::memory::{Hugepages, Memory, MemoryLimits};
pub use self::pressure::{Pressure, Stall, Stalls};

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, Leaf, PodCgroup, files};

/// What one cgroup, with all below it, has used so far and uses now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Huge pages, one for each size that the machine has.
    pub hugepages: Vec<Hugepages>,
    /// Transfers, one for each block device.
    pub io: Vec<DeviceIo>,
    /// Tasks, that is threads, that exist.
    pub tasks: Option<u64>,
    /// Most tasks that may exist; `None` for no limit.
    pub tasks_limit: Option<u64>,
    /// Time lost for want of something. From the unified hierarchy, so a hybrid machine has it too.
    pub pressure: Pressure,
}

/// Limits that a cgroup has, as the kernel shows them. 0 in no field means "none": that is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of processor time.
    pub cpu: CpuLimits,
    /// Of memory.
    pub memory: MemoryLimits,
}

impl Leaf {
    /// What it has used. Costs some twenty small reads and blocks for no longer than these take.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        Reader(self.control()).usage()
    }

    /// Processor time, memory and pressure, as CRI's stats tell them; the rest is left out. Half the reads.
    pub fn brief_usage(&self) -> Result<Usage, CgroupError> {
        Reader(self.control()).brief_usage()
    }

    /// Its limits.
    pub fn limits(&self) -> Result<Limits, CgroupError> {
        Reader(self.control()).limits()
    }
}

impl PodCgroup {
    /// What all processes of the pod have used together.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        Reader(self.control()).usage()
    }

    /// See [`Leaf::brief_usage`].
    pub fn brief_usage(&self) -> Result<Usage, CgroupError> {
        Reader(self.control()).brief_usage()
    }

    /// Limits of the pod as a whole.
    pub fn limits(&self) -> Result<Limits, CgroupError> {
        Reader(self.control()).limits()
    }
}

/// Reads one cgroup's files.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a Control);

impl Reader<'_> {
    fn usage(self) -> Result<Usage, CgroupError> {
        Ok(Usage {
            hugepages: memory::hugepages(self)?,
            io: io::usage(self)?,
            tasks: self.number("pids", "pids.current")?,
            tasks_limit: self.number("pids", "pids.max")?,
            ..self.brief_usage()?
        })
    }

    fn brief_usage(self) -> Result<Usage, CgroupError> {
        Ok(Usage {
            cpu: cpu::usage(self)?,
            memory: memory::usage(self)?,
            pressure: pressure::usage(self)?,
            ..Usage::default()
        })
    }

    fn limits(self) -> Result<Limits, CgroupError> {
        Ok(Limits { cpu: cpu::limits(self)?, memory: memory::limits(self)? })
    }

    fn version(self, controller: &str) -> Option<Version> {
        self.0.version_of(controller)
    }

    /// A file's text, if there is such a file.
    fn text(self, version: Version, file: &str) -> Result<Option<String>, CgroupError> {
        match self.0.try_read(version, file) {
            Ok(text) => Ok(Some(text)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(self.0.failed(format!("read {file}"), error)),
        }
    }

    /// The single number in a file that both versions call by this name; `max` and a missing file are `None`.
    fn number(self, controller: &str, file: &str) -> Result<Option<u64>, CgroupError> {
        match self.version(controller) {
            Some(version) => self.number_in(version, file),
            None => Ok(None),
        }
    }

    fn number_in(self, version: Version, file: &str) -> Result<Option<u64>, CgroupError> {
        Ok(self.text(version, file)?.and_then(|text| text.trim().parse().ok()))
    }
}

/// Whether the error says that the kernel has no such number, rather than that reading failed.
fn is_absent(error: &Error) -> bool {
    // Pressure files exist but answer EOPNOTSUPP while the accounting is off (psi=0, cgroup.pressure).
    let unsupported = matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOTDIR));
    unsupported || files::is_missing(error) || error.kind() == std::io::ErrorKind::NotFound
}

/// The value after `key` in a file of `key value` lines.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests;
