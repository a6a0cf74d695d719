//! hulld's part: start a process, send the first request, look at what became of it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hull_vmm::protocol::BlockingConnection;
use hull_vmm::protocol::messages::{Message, Response, message::Body, request::Call, response::Outcome};

/// First id of the pod on the host.
pub(crate) const BASE: u32 = 1_879_048_192 + 77 * 65_536;

pub(crate) fn test(name: &str, body: impl FnOnce()) {
    body();
    println!("test {name} ... ok");
}

/// A process that was started as hulld starts it and has answered.
pub(crate) struct Confined {
    pub(crate) pid: i32,
    pub(crate) connection: BlockingConnection,
    next: u64,
}

/// Starts this very program in the role and sends it the request. The answer may be an error.
pub(crate) fn start(role: &str, call: Call, fds: &[OwnedFd]) -> (BlockingConnection, Outcome) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut first = Command::new(std::env::current_exe().unwrap())
        .arg(role)
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut connection = BlockingConnection::new(ours.into());
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    connection.send(&Message::request(1, call, fds.len()), &borrowed).unwrap();
    let outcome = outcome(connection.recv().unwrap().expect("an answer"));
    let status = first.wait().unwrap();
    assert_eq!(status.success(), matches!(outcome, Outcome::Booted(_)), "{outcome:?}");
    (connection, outcome)
}

fn outcome(frame: hull_vmm::protocol::Frame) -> Outcome {
    match frame.message.body {
        Some(Body::Response(Response { outcome: Some(outcome) })) => outcome,
        other => panic!("{other:?}"),
    }
}

impl Confined {
    pub(crate) fn start(role: &str, call: Call, fds: &[OwnedFd]) -> Self {
        match start(role, call, fds) {
            (connection, Outcome::Booted(booted)) => Self { pid: booted.pid, connection, next: 1 },
            (_, outcome) => panic!("{outcome:?}"),
        }
    }

    /// `None` if the process ended instead.
    pub(crate) fn ask(&mut self, call: Call) -> Option<Outcome> {
        self.next += 1;
        self.connection.send(&Message::request(self.next, call, 0), &[]).unwrap();
        self.connection.recv().ok().flatten().map(outcome)
    }

    pub(crate) fn proc(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(path)
    }

    /// The fields of `status`, for each thread.
    pub(crate) fn threads(&self) -> Vec<BTreeMap<String, String>> {
        let tasks = fs::read_dir(self.proc("task")).unwrap();
        let status = |task: std::io::Result<fs::DirEntry>| {
            let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |line: &str| {
                let (name, value) = line.split_once(':').unwrap();
                (name.to_owned(), value.trim().to_owned())
            };
            text.lines().map(field).collect()
        };
        tasks.map(status).collect()
    }

    pub(crate) fn namespace(&self, kind: &str) -> PathBuf {
        fs::read_link(self.proc("ns").join(kind)).unwrap()
    }

    pub(crate) fn is_gone(&self) -> bool {
        for _ in 0..500 {
            // A zombie that its new parent has not taken yet is gone enough.
            match fs::read_to_string(self.proc("stat")) {
                Err(_) => return true,
                Ok(stat) if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')) => {
                    return true;
                }
                Ok(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        false
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        let _ = hull_sys::process::kill(self.pid, libc::SIGKILL);
        assert!(self.is_gone());
    }
}

pub(crate) fn own_namespace(kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap()
}

/// A cgroup in the unified hierarchy and, on a hybrid machine, one in the v1 hierarchy of the pids controller.
pub(crate) struct Cgroups {
    directories: Vec<PathBuf>,
    pub(crate) name: String,
}

impl Cgroups {
    pub(crate) fn new() -> Self {
        let name = format!("hull-jail-test-{}", std::process::id());
        let mounts = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
        let is_cgroup = |mount: &&&str| Path::new(mount).join("cgroup.procs").exists();
        let directories: Vec<_> =
            mounts.iter().filter(is_cgroup).map(|mount| Path::new(mount).join(&name)).collect();
        for directory in &directories {
            fs::create_dir(directory).unwrap();
        }
        Self { directories, name }
    }

    /// The directory in the unified hierarchy, and the `tasks` files.
    pub(crate) fn open(&self) -> (OwnedFd, Vec<OwnedFd>) {
        let v1 = |directory: &&PathBuf| directory.join("tasks").exists();
        let unified = self.directories.iter().find(|directory| !v1(directory)).unwrap();
        let tasks = self.directories.iter().filter(v1);
        let open =
            |directory: &PathBuf| OpenOptions::new().write(true).open(directory.join("tasks")).unwrap();
        (File::open(unified).unwrap().into(), tasks.map(|directory| open(directory).into()).collect())
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for directory in &self.directories {
            for _ in 0..500 {
                if fs::remove_dir(directory).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            assert!(!directory.exists());
        }
    }
}

/// What everything that is confined has in common.
pub(crate) fn check_confinement(process: &Confined, threads: usize, capabilities: u64, id: u32) {
    let all = process.threads();
    assert_eq!(all.len(), threads, "{all:#?}");
    let set = format!("{capabilities:016x}");
    let ids = [id; 4].map(|id| id.to_string()).join("\t");
    for status in &all {
        for (field, wanted) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", set.as_str()),
            ("CapEff", set.as_str()),
            ("CapBnd", set.as_str()),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Uid", ids.as_str()),
            ("Gid", ids.as_str()),
            ("Groups", ""),
            ("CoreDumping", "0"),
        ] {
            assert_eq!(status[field], wanted, "{field} of {}", status["Name"]);
        }
    }
    for kind in ["user", "mnt", "pid", "ipc", "uts", "net"] {
        assert_ne!(process.namespace(kind), own_namespace(kind), "{kind}");
    }
    let devices = fs::read_to_string(process.proc("net/dev")).unwrap();
    assert_eq!(devices.lines().count(), 3, "nothing but loopback: {devices}");
    let limits = fs::read_to_string(process.proc("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert!(core.contains(" 0 "), "{core}");
    assert_eq!(fs::metadata(process.proc("stat")).unwrap().uid(), 0, "not dumpable");
}
