//! Processes of a machine, known by number and by when they started: a number alone may be somebody else's by now.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Dir, Mode, OFlags};

/// A process, by its directory in /proc: once it is gone everything in there fails, whoever has its number then.
#[derive(Debug)]
pub(super) struct Process {
    directory: OwnedFd,
}

impl Process {
    /// The one with this number now.
    pub(super) fn find(pid: i32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())? })
    }

    /// The one with this number that started at this moment; 0: whenever that was.
    pub(super) fn of(pid: i32, started: u64) -> io::Result<Self> {
        let process = Self::find(pid)?;
        if started != 0 && process.started()? != started {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it has ended"));
        }
        Ok(process)
    }

    /// When it started, in clock ticks since the boot (proc_pid_stat(5), field 22).
    pub(super) fn started(&self) -> io::Result<u64> {
        let mut text = Vec::new();
        self.open("stat", OFlags::RDONLY)?.read_to_end(&mut text)?;
        parse_started(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// A file of its directory.
    pub(super) fn open(&self, name: &str, flags: OFlags) -> io::Result<File> {
        Ok(rustix::fs::openat(&self.directory, name, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }

    /// For how long each of its threads has been ready to run and has not been let, in nanoseconds, by the thread's
    /// number (Documentation/scheduler/sched-stats.rst). Empty if this kernel does not count that.
    pub(super) fn kept_waiting(&self) -> BTreeMap<String, u64> {
        let Ok(tasks) = self.open("task", OFlags::RDONLY | OFlags::DIRECTORY) else { return BTreeMap::new() };
        let Ok(entries) = Dir::read_from(tasks) else { return BTreeMap::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
        let waited = |name: &str| {
            let mut text = String::new();
            let file = self.open(&format!("task/{name}/schedstat"), OFlags::RDONLY).ok()?;
            file.take(128).read_to_string(&mut text).ok()?;
            text.split(' ').nth(1)?.parse().ok()
        };
        let names = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        names.filter_map(|name| waited(&name).map(|waited| (name, waited))).collect()
    }

    /// How far the kernel is to spare it when memory runs out.
    pub(super) fn set_oom_score_adj(&self, score: i32) -> io::Result<()> {
        self.open("oom_score_adj", OFlags::WRONLY)?.write_all(score.to_string().as_bytes())
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The name, in parentheses, may have anything in it.
fn parse_started(stat: &[u8]) -> Option<u64> {
    let behind = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let text = std::str::from_utf8(stat.get(behind..)?).ok()?;
    text.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_known_by_number_and_start_and_nobody_else_is_taken_for_it() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id() as i32;
        let process = Process::find(pid).unwrap();
        let started = process.started().unwrap();
        assert!(started > 0 && Process::of(pid, started).is_ok() && Process::of(pid, 0).is_ok());
        assert_eq!(process.kept_waiting().len(), 1, "it has one thread");
        assert!(Process::of(pid, started + 1).is_err(), "another one with its number");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.started().is_err() && process.set_oom_score_adj(0).is_err());
    }

    #[test]
    fn a_name_cannot_move_the_fields() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let line = format!("7 (a) 1 (b) 2) {}", fields.join(" "));
        assert_eq!(parse_started(line.as_bytes()), Some(22));
        assert_eq!(parse_started(b"7 no name"), None);
        assert_eq!(parse_started(b"7 (a) R 1"), None);
    }
}
