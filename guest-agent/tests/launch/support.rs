//! A pod to test in: an image, a cgroup, an agent's place, and containers in it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hull_agent::cgroup::{self, Hierarchies, Leaf, PodCgroup};
use hull_agent::container::{
    self, ChildStdio, ContainerPlan, LaunchError, Launched, PidNamespace, RunningContainer, Slots,
};
use hull_agent::protocol::messages::{self, slot::Kind};
use hull_agent::sandbox::{self, IdMap, PodFacts, PodNamespaces};
use hull_sys::mount::{self, Attributes, OpenTreeFlags, Propagation};
use hull_sys::namespace::{self, Namespaces};
use rustix::fs::CWD;

/// What Kubernetes masks and protects (a part).
pub(crate) const MASKED: [&str; 6] =
    ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/proc/missing", "/sys/firmware"];
pub(crate) const READONLY: [&str; 4] = ["/proc/bus", "/proc/fs", "/proc/sys", "/proc/sysrq-trigger"];

/// CAP_CHOWN, DAC_OVERRIDE, FSETID, FOWNER, MKNOD, NET_RAW, SETGID, SETUID, SETFCAP, SETPCAP, NET_BIND_SERVICE,
/// SYS_CHROOT, KILL, AUDIT_WRITE: the default set.
pub(crate) const CAPABILITIES: u64 = 0xa804_25fb;

/// A filter that allows everything: BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
pub(crate) fn allow_everything() -> Vec<u8> {
    let mut program = vec![0; 8];
    program[..2].copy_from_slice(&6_u16.to_ne_bytes());
    program[4..].copy_from_slice(&0x7fff_0000_u32.to_ne_bytes());
    program
}

/// Runs a test in this process, in a mount namespace that plays the host.
pub(crate) fn inside(test: fn()) {
    namespace::unshare(Namespaces::MOUNT).unwrap();
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    mount::set_attributes_at(CWD, c"/", true, &private).unwrap();
    test();
}

/// The scratch directory of this test, on the host.
pub(crate) fn scratch() -> PathBuf {
    PathBuf::from(std::env::var_os("HULL_TEST_SCRATCH").unwrap())
}

/// A directory tree with busybox and all its names, changed by `change`.
pub(crate) fn image(name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let root = scratch().join(name);
    for directory in ["bin", "etc", "tmp", "proc", "dev", "sys", "root"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let list = std::process::Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nwww:x:34:\nmedia:x:44:web\n").unwrap();
    change(&root);
    root
}

/// A detached clone of the tree at a path, as hulld makes them.
pub(crate) fn tree(path: impl AsRef<Path>) -> OwnedFd {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    mount::open_tree(CWD, path.as_ref(), flags).unwrap()
}

/// A request for a container, with what it brings along.
pub(crate) struct Wanted {
    pub(crate) spec: messages::StartContainer,
    slots: Vec<messages::Slot>,
    fds: Vec<OwnedFd>,
}

impl Wanted {
    /// From layers, the uppermost first, with a writable directory of this name.
    pub(crate) fn new(name: &str, layers: &[PathBuf], command: &[&str]) -> Self {
        let mut wanted =
            Self { spec: messages::StartContainer::default(), slots: Vec::new(), fds: Vec::new() };
        let layers = layers.iter().map(|layer| wanted.slot(tree(layer))).collect();
        let writable = scratch().join(name);
        fs::create_dir_all(&writable).unwrap();
        let writable = wanted.slot(tree(writable));
        wanted.spec = messages::StartContainer {
            id: name.into(),
            process: Some(process(command)),
            rootfs: Some(messages::Rootfs { layers, writable, ..Default::default() }),
            private_cgroup_namespace: true,
            cgroup_leaf: name.into(),
            masked_paths: MASKED.map(String::from).to_vec(),
            readonly_paths: READONLY.map(String::from).to_vec(),
            ..Default::default()
        };
        wanted
    }

    /// A container of one plain image that runs a shell script.
    pub(crate) fn script(name: &str, image: &Path, script: &str) -> Self {
        Self::new(name, &[image.to_owned()], &["sh", "-c", script])
    }

    pub(crate) fn slot(&mut self, fd: OwnedFd) -> u32 {
        let number = self.fds.len() as u32;
        self.fds.push(fd);
        self.slots.push(messages::Slot { kind: Some(Kind::Descriptor(number)) });
        number
    }

    pub(crate) fn process(&mut self) -> &mut messages::Process {
        self.spec.process.as_mut().unwrap()
    }

    pub(crate) fn rootfs(&mut self) -> &mut messages::Rootfs {
        self.spec.rootfs.as_mut().unwrap()
    }

    /// Mounts the tree at a host path.
    pub(crate) fn mount(&mut self, host: impl AsRef<Path>, destination: &str) -> &mut messages::Mount {
        let slot = self.slot(tree(host));
        self.spec.mounts.push(messages::Mount {
            destination: destination.into(),
            source: Some(messages::mount::Source::Slot(slot)),
            ..Default::default()
        });
        self.spec.mounts.last_mut().unwrap()
    }
}

pub(crate) fn process(command: &[&str]) -> messages::Process {
    messages::Process {
        args: command.iter().map(|word| (*word).to_owned()).collect(),
        cap_bounding: CAPABILITIES,
        cap_effective: CAPABILITIES,
        cap_permitted: CAPABILITIES,
        seccomp: allow_everything(),
        no_new_privs: true,
        ..Default::default()
    }
}

/// A pod that this process is the agent of.
pub(crate) struct Pod {
    pub(crate) facts: PodFacts,
    group: PodCgroup,
    leaves: RefCell<Vec<Leaf>>,
    /// Stands for the file of a class of cache and memory bandwidth.
    pub(crate) rdt_tasks: Option<OwnedFd>,
    host: File,
    agent: File,
}

/// A started container with the reading ends of its output.
pub(crate) struct Running {
    pub(crate) launched: Launched,
    pub(crate) remembered: messages::Process,
    name: String,
    stdout: File,
    stderr: File,
}

/// How a process ended and what it said.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// The lines of a process that succeeded.
    pub(crate) fn lines(&self) -> Vec<&str> {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:?}");
        self.stdout.lines().collect()
    }
}

impl Pod {
    /// With namespaces of its own for everything but the network.
    pub(crate) fn enter() -> Self {
        Self::enter_with(|_, _| ())
    }

    pub(crate) fn enter_with(change: impl FnOnce(&mut messages::CreateSandbox, &mut Vec<OwnedFd>)) -> Self {
        hull_sys::signal::reset_all();
        let layout = cgroup::discover().unwrap();
        let mut spec = messages::CreateSandbox {
            new_ipc_namespace: true,
            new_uts_namespace: true,
            hostname: "pod-name".into(),
            etc_hostname: Some(b"pod-name\n".to_vec()),
            etc_hosts: Some(b"127.0.0.1 localhost\n".to_vec()),
            cgroups: Some(layout.clone()),
            ..Default::default()
        };
        let mut fds = Vec::new();
        change(&mut spec, &mut fds);
        let parent = format!("/hull-test-launch-{}", std::process::id());
        let group = PodCgroup::open(Arc::new(Hierarchies::open(&layout).unwrap()), &parent).unwrap();
        let mount_namespace = || File::open("/proc/thread-self/ns/mnt").unwrap();
        let host = mount_namespace();
        let slots: Vec<_> = (0..fds.len() as u32)
            .map(|number| messages::Slot { kind: Some(Kind::Descriptor(number)) })
            .collect();
        sandbox::withdraw(&layout, &spec.mount_label).unwrap();
        let facts = sandbox::enter(&spec, &Slots::new(&slots, &fds), None).unwrap();
        sandbox::leave_host().unwrap();
        Self {
            facts,
            group,
            leaves: RefCell::new(Vec::new()),
            rdt_tasks: None,
            host,
            agent: mount_namespace(),
        }
    }

    /// Its users are those from 100000 on outside, its groups those from 200000 on; 65536 of each.
    pub(crate) fn in_user_namespace() -> Self {
        let map = |host| IdMap::new(0, host, 65_536).unwrap();
        let namespaces = PodNamespaces::make(map(100_000), map(200_000)).unwrap();
        let mapping = |host_id| messages::IdMapping { container_id: 0, host_id, length: 65_536 };
        Self::enter_with(|spec, fds| {
            (spec.uid_mapping, spec.gid_mapping) = (Some(mapping(100_000)), Some(mapping(200_000)));
            let slots = [
                (&mut spec.user_namespace, namespaces.user),
                (&mut spec.network_namespace, namespaces.network),
                (&mut spec.ipc_namespace, namespaces.ipc),
                (&mut spec.uts_namespace, namespaces.uts),
            ];
            for (slot, namespace) in slots {
                *slot = Some(fds.len() as u32);
                fds.push(namespace);
            }
        })
    }

    pub(crate) fn leaf(&self, name: &str) -> Leaf {
        let leaf = || self.group.leaf(name).unwrap();
        self.leaves.borrow_mut().push(leaf());
        leaf().create().unwrap();
        leaf()
    }

    pub(crate) fn start(&self, wanted: &Wanted) -> Result<Running, LaunchError> {
        self.start_in(wanted, PidNamespace::New)
    }

    pub(crate) fn start_in(&self, wanted: &Wanted, pids: PidNamespace<'_>) -> Result<Running, LaunchError> {
        let plan = ContainerPlan::new(&wanted.spec, &self.facts)?;
        let (stdio, stdout, stderr) = pipes();
        let leaf = self.leaf(&wanted.spec.cgroup_leaf);
        let slots = Slots::new(&wanted.slots, &wanted.fds);
        let launched = container::launch(&plan, &slots, stdio, &leaf, pids)?;
        let remembered = plan.process_of(&launched);
        Ok(Running { launched, remembered, name: wanted.spec.cgroup_leaf.clone(), stdout, stderr })
    }

    pub(crate) fn run(&self, wanted: &Wanted) -> Output {
        self.start(wanted).unwrap_or_else(|error| panic!("{error}")).finish()
    }

    pub(crate) fn exec_request(
        &self,
        running: &Running,
        request: &messages::Process,
        inherit: bool,
    ) -> Result<Running, LaunchError> {
        let leaf = self.group.leaf(&running.name).unwrap();
        let container = RunningContainer {
            pid: running.launched.pid,
            pidfd: running.launched.pidfd.as_fd(),
            cgroup: &leaf,
            process: &running.remembered,
            private_cgroup_namespace: true,
            rdt_tasks: self.rdt_tasks.as_ref().map(AsFd::as_fd),
            user_namespace: self.facts.user_namespace.as_deref(),
        };
        let (stdio, stdout, stderr) = pipes();
        let launched = container::exec(&container, request, inherit, stdio)?;
        let name = running.name.clone();
        Ok(Running { launched, remembered: messages::Process::default(), name, stdout, stderr })
    }

    pub(crate) fn exec(&self, running: &Running, script: &str) -> Output {
        let request =
            messages::Process { args: ["sh", "-c", script].map(String::from).to_vec(), ..Default::default() };
        self.exec_request(running, &request, true).unwrap_or_else(|error| panic!("{error}")).finish()
    }

    /// Does something in the mount namespace that plays the host.
    pub(crate) fn on_host<T>(&self, act: impl FnOnce() -> T) -> T {
        namespace::enter(self.host.as_fd(), Namespaces::MOUNT).unwrap();
        let result = act();
        namespace::enter(self.agent.as_fd(), Namespaces::MOUNT).unwrap();
        result
    }

    /// All processes in the pod's cgroups.
    pub(crate) fn processes(&self) -> Vec<i32> {
        self.leaves.borrow().iter().flat_map(|leaf| leaf.processes().unwrap()).collect()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for leaf in self.leaves.borrow().iter() {
            let _ = leaf.kill();
            while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
            if let Err(error) = leaf.remove() {
                eprintln!("{error}");
            }
        }
        if let Err(error) = self.group.remove_created() {
            eprintln!("{error}");
        }
    }
}

fn pipes() -> (ChildStdio, File, File) {
    let pipe = || {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        (File::from(reader), writer)
    };
    let ((stdout, out), (stderr, err)) = (pipe(), pipe());
    (ChildStdio { stdin: None, stdout: Some(out), stderr: Some(err) }, stdout, stderr)
}

impl Running {
    /// Reads both streams to their end (they are small) and reaps the process.
    pub(crate) fn finish(mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.stdout.read_to_end(&mut stdout).unwrap();
        self.stderr.read_to_end(&mut stderr).unwrap();
        let code = hull_sys::process::wait(self.launched.pidfd.as_fd()).unwrap().exit_code();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output { code, stdout: text(stdout), stderr: text(stderr) }
    }

    /// Waits until the process has printed a line, and returns it.
    pub(crate) fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.stdout.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        String::from_utf8_lossy(&line).into_owned()
    }

    pub(crate) fn kill(self) -> Output {
        hull_sys::process::pidfd_send_signal(self.launched.pidfd.as_fd(), 9).unwrap();
        self.finish()
    }
}

/// `key: value` and `key value` lines as a map.
pub(crate) fn fields(lines: &[&str]) -> BTreeMap<String, String> {
    let pair = |line: &&str| {
        let (key, value) = line.split_once([':', ' ', '\t'])?;
        Some((key.to_owned(), value.trim().to_owned()))
    };
    lines.iter().filter_map(pair).collect()
}
