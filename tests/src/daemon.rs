use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as cri};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{Mutex, MutexGuard};
use tonic::transport::{Channel, Endpoint};

use crate::residue::{self, Residue};

/// Whole-system tests share one machine and look at all of it, so they run one after the other, in this program and
/// in any other that runs them at the same time.
static MACHINE: Mutex<()> = Mutex::const_new(());
const MACHINE_LOCK: &str = "/run/lock/hull-tests.lock";
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A hulld with its own root, state, socket, cgroup, bridge and subnets.
pub struct Daemon {
    process: Option<Child>,
    directory: tempfile::TempDir,
    root: PathBuf,
    before: Residue,
    name: String,
    bridge: String,
    _machine: Machine,
}

impl Daemon {
    /// With hull's own bridge network.
    pub async fn start() -> Daemon {
        Daemon::start_with("mode = \"builtin\"\n", "").await
    }

    /// With hull's own bridge network, and with images and writable layers in `root`, a directory that exists.
    pub async fn start_rooted_at(root: &Path) -> Daemon {
        Daemon::start_at(Some(root), "mode = \"builtin\"\n", "").await
    }

    /// `network` goes below `[network]`, `more` at the end of the configuration file.
    pub async fn start_with(network: &str, more: &str) -> Daemon {
        Daemon::start_at(None, network, more).await
    }

    async fn start_at(root: Option<&Path>, network: &str, more: &str) -> Daemon {
        let machine = Machine::alone().await;
        let before = Residue::look();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("hull-e2e-{}-{number}", std::process::id());
        let directory = tempfile::Builder::new().prefix("hull-e2e-").tempdir().unwrap();
        let bridge = format!("he{}x{number}", std::process::id() % 100_000);
        let root = root.map_or_else(|| directory.path().join("root"), Path::to_owned);
        let mut daemon = Daemon { process: None, directory, root, before, name, bridge, _machine: machine };
        std::fs::create_dir_all(daemon.path("certs.d")).unwrap();
        let config = format!(
            "[agent]\npath = \"{}\"\n[cgroup]\nparent = \"/{}\"\n[registry]\nhosts_dir = \"{}\"\n\
             [network]\nbridge = \"{}\"\nsubnets = [\"10.241.{number}.0/24\", \"fd41:{number}::/64\"]\n{network}\n{more}",
            crate::binaries::program("hull-agent").display(),
            daemon.name,
            daemon.path("certs.d").display(),
            daemon.bridge,
        ) + &machines(&daemon.path("kubelet"));
        std::fs::write(daemon.path("hull.toml"), config).unwrap();
        daemon.launch().await;
        daemon
    }

    /// A path below the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    pub fn socket(&self) -> PathBuf {
        self.path("state/hull.sock")
    }

    /// Name of the cgroup above all pods that name no parent of their own, without the slash.
    pub fn cgroup(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("hulld runs").id()
    }

    /// What hulld wrote to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("hulld.log")).unwrap_or_default()
    }

    async fn launch(&mut self) {
        self.spawn();
        self.answers().await;
    }

    fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("hulld.log")).unwrap();
        let process = Command::new(crate::binaries::program("hulld"))
            .arg("--root")
            .arg(self.root())
            .arg("--state")
            .arg(self.path("state"))
            .arg("--listen")
            .arg(format!("unix://{}", self.socket().display()))
            .arg("--config")
            .arg(self.path("hull.toml"))
            .args(["--log-level", "debug"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(process);
    }

    async fn answers(&mut self) {
        let socket = self.socket();
        let deadline = std::time::Instant::now() + crate::patience(20);
        loop {
            if let Ok(mut client) = connect(&socket).await.map(RuntimeServiceClient::new)
                && client.version(cri::VersionRequest::default()).await.is_ok()
            {
                return;
            }
            let ended = self.process.as_mut().and_then(|process| process.try_wait().ok().flatten());
            assert!(
                ended.is_none() && std::time::Instant::now() < deadline,
                "hulld does not answer ({ended:?}):\n{}",
                self.log()
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// SIGKILL, without a word.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// SIGTERM; waits until it has ended.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let pid = Pid::from_raw(process.id() as i32).expect("a pid");
            kill_process(pid, Signal::TERM).unwrap();
            process.wait().unwrap();
        }
    }

    /// Again, on the same directories.
    pub async fn restart(&mut self) {
        assert!(self.process.is_none(), "stop or kill it first");
        self.launch().await;
    }

    /// Again, and killed `after` that, wherever its start has come to by then.
    pub fn restart_and_kill(&mut self, after: std::time::Duration) {
        assert!(self.process.is_none(), "stop or kill it first");
        self.spawn();
        std::thread::sleep(after);
        self.kill();
    }

    pub async fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(connect(&self.socket()).await.unwrap()).max_decoding_message_size(64 << 20)
    }

    /// For calls that the client does not know.
    pub async fn channel(&self) -> Channel {
        connect(&self.socket()).await.unwrap()
    }

    pub async fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(connect(&self.socket()).await.unwrap())
    }

    /// Pulls and returns the image_ref.
    pub async fn pull(&self, name: &str) -> String {
        self.try_pull(name).await.unwrap_or_else(|status| panic!("pull of {name}: {status}\n{}", self.log()))
    }

    pub async fn try_pull(&self, name: &str) -> Result<String, tonic::Status> {
        let image = Some(cri::ImageSpec { image: name.to_owned(), ..Default::default() });
        let request = cri::PullImageRequest { image, ..Default::default() };
        self.images().await.pull_image(request).await.map(|answer| answer.into_inner().image_ref)
    }

    /// Removes every pod, ends hulld with `--release`, and panics if anything of it remains on the machine.
    pub async fn finish(mut self) {
        self.remove_all_pods().await;
        self.stop();
        let released = self.release().output().unwrap();
        assert!(released.status.success(), "hulld --release: {}", String::from_utf8_lossy(&released.stderr));
        Residue::assert_none_since(&self.before).await;
    }

    /// `hulld --release`, killed `after` that.
    pub fn release_and_kill(&mut self, after: std::time::Duration) {
        assert!(self.process.is_none(), "stop or kill it first");
        let mut release = self.release().stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        release.kill().unwrap();
        release.wait().unwrap();
    }

    fn release(&self) -> Command {
        let mut command = Command::new(crate::binaries::program("hulld"));
        command.arg("--root").arg(self.root()).arg("--state").arg(self.path("state"));
        command.arg("--config").arg(self.path("hull.toml")).arg("--release");
        command
    }

    pub async fn remove_all_pods(&self) {
        let mut runtime = self.runtime().await;
        let pods =
            runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
        for pod in pods {
            let pod_sandbox_id = pod.id;
            runtime
                .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
                .await
                .unwrap_or_else(|status| panic!("stop of {pod_sandbox_id}: {status}"));
            runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
                .await
                .unwrap_or_else(|status| panic!("removal of {pod_sandbox_id}: {status}"));
        }
    }

    /// What this daemon's test has left on the machine so far.
    pub fn residue(&self) -> Vec<String> {
        Residue::since(&self.before)
    }
}

impl Drop for Daemon {
    /// After a failed test: whatever the daemon started is ended, so that the next test starts clean.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- hulld's log ----\n{}", tail(&self.log(), 60));
        }
        self.kill();
        residue::end_cgroups(&self.name);
        if std::thread::panicking() {
            let log = self.log();
            residue::clear_network_since(&self.before, &self.bridge, |id| log.contains(id));
            residue::unmount_below(self.directory.path());
        }
    }
}

/// Both runtime handlers, with what hack/build and hack/guest-kernel have made; whatever is missing is the daemon's to
/// report.
fn machines(kubelet: &Path) -> String {
    let programs = match std::env::var_os("HULL_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => crate::binaries::static_programs(),
    };
    let guest = std::env::var_os("HULL_GUEST_DIR")
        .map_or_else(|| crate::binaries::workspace().join("target-guest"), PathBuf::from);
    format!(
        "\n[runtimes.handlers.process]\nkind = \"process\"\n[runtimes.handlers.microvm]\nkind = \"microvm\"\n\
         [runtimes.handlers.microvm.machine]\nvmm = \"{}\"\nvirtiofsd = \"{}\"\nkernel = \"{}\"\ninitramfs = \"{}\"\n\
         memory = \"512MiB\"\ndisk = \"1GiB\"\nkubelet_roots = [\"{}\"]\n",
        programs.join("hull-vmm").display(),
        programs.join("hull-virtiofsd").display(),
        guest.join("vmlinux").display(),
        guest.join("initramfs.cpio").display(),
        kubelet.display(),
    )
}

/// Held while what a test looks at is on the machine: a daemon, say.
pub struct Machine {
    _file: std::fs::File,
    _here: MutexGuard<'static, ()>,
}

impl Machine {
    /// Waiting for other programs blocks the thread: nothing else of the test runs then.
    pub async fn alone() -> Machine {
        let here = MACHINE.lock().await;
        let file = std::fs::File::create(MACHINE_LOCK).unwrap();
        file.lock().unwrap();
        Machine { _file: file, _here: here }
    }
}

async fn connect(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    Endpoint::try_from(format!("unix://{}", socket.display()))?.connect().await
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
