use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// strace on a running process, its children, and everything that they start from now on. Dropped, it lets go of them.
pub struct Strace {
    process: Child,
    output: PathBuf,
    read: u64,
}

/// What was done, counted.
#[derive(Debug, Default)]
pub struct Effort {
    /// System calls but those with which threads wait for one another and for work.
    pub calls: usize,
    /// Processes; threads are none.
    pub processes: usize,
    /// Programs executed.
    pub programs: usize,
    /// fsync and its like.
    pub syncs: usize,
    /// Bytes written to files below the directory that was asked for.
    pub written: u64,
    /// Mounts made, by either way.
    pub mounts: usize,
    /// By name, for whoever looks for the cause of a growth.
    pub by_name: std::collections::BTreeMap<String, usize>,
}

impl Strace {
    /// Attaches to `pid`; `directory` is for its output.
    pub async fn attach(pid: u32, directory: &Path) -> Strace {
        let output = directory.join("strace");
        let traced: Vec<u32> = std::iter::once(pid).chain(children(pid)).collect();
        let process = Command::new("strace")
            .args(["-f", "-y", "-s", "0"])
            .args(traced.iter().flat_map(|pid| ["-p".to_owned(), pid.to_string()]))
            .arg("-o")
            .arg(&output)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("strace is installed");
        let is_traced = |pid: &u32| {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let mut states = threads.map(|thread| std::fs::read_to_string(thread.path().join("status")));
            states.all(|status| !status.unwrap_or_default().contains("TracerPid:\t0\n"))
        };
        let all_traced = || traced.iter().all(is_traced).then_some(());
        crate::eventually("strace is attached", crate::patience(20), async || all_traced()).await;
        let mut strace = Strace { process, output, read: 0 };
        strace.effort(directory).await;
        strace
    }

    /// What was done since the last look.
    pub async fn effort(&mut self, directory: &Path) -> Effort {
        // Whoever answered may have something to tidy up after its answer.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut file = File::open(&self.output).expect("strace has written");
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let mut text = String::new();
        self.read += file.read_to_string(&mut text).unwrap() as u64;
        Effort::of(&text, &directory.display().to_string())
    }
}

/// The processes that `pid` has started and that still run.
pub fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists =
        threads.map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<u32>>()).collect()
}

impl Drop for Strace {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ = self.process.wait();
    }
}

impl Effort {
    fn of(trace: &str, directory: &str) -> Effort {
        let mut effort = Effort::default();
        // The number of the thread comes first.
        for line in trace.lines().filter_map(|line| line.split_once(' ')).map(|(_, rest)| rest.trim_start()) {
            let Some((name, arguments)) = line.split_once('(') else { continue };
            if name.starts_with(['+', '-', '<']) {
                continue;
            }
            effort.count(name, arguments, directory);
        }
        effort
    }

    fn count(&mut self, name: &str, arguments: &str, directory: &str) {
        if matches!(name, "futex" | "epoll_wait" | "epoll_pwait" | "sched_yield" | "restart_syscall") {
            return;
        }
        *self.by_name.entry(name.to_owned()).or_default() += 1;
        self.calls += 1;
        match name {
            "clone" | "clone3" | "fork" | "vfork" if !arguments.contains("CLONE_THREAD") => {
                self.processes += 1
            }
            "execve" | "execveat" => self.programs += 1,
            "fsync" | "fdatasync" | "sync" | "syncfs" | "sync_file_range" => self.syncs += 1,
            "mount" | "fsmount" => self.mounts += 1,
            "write" | "writev" | "pwrite64" => {
                let path = arguments.split_once('<').map_or("", |(_, path)| path);
                let bytes =
                    arguments.rsplit_once("= ").and_then(|(_, bytes)| bytes.trim().parse::<u64>().ok());
                if path.starts_with(directory) {
                    self.written += bytes.unwrap_or(0);
                }
            }
            _ => {}
        }
    }
}
