//! Every state change is crash-safe: hulld, agents and both at once are killed at random instants of every call.
//!
//! HULL_KILL_ROUNDS says how often each call is interrupted, HULL_KILL_SEED makes a run's delays come again (what is
//! under way at such an instant is up to the machine).

use std::error::Error;
use std::time::Duration;

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::{Registry, free_port};
use k8s_cri::v1 as cri;
use rustix::process::{Pid, Signal, kill_process};
use tonic::Status;

const DEFAULT_ROUNDS: usize = 2;
/// Where every pod is a machine, which takes some ten times as long.
const DEFAULT_ROUNDS_OF_MACHINES: usize = 1;
/// Longest time that any call may take here, whatever was killed; only hanging takes this long.
const HANGING: u64 = 40;
const BALLAST: usize = 2 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_in_any_call_loses_nothing_and_leaves_nothing() {
    let mut ground = Ground::new().await;
    for round in 0..rounds() {
        eprintln!("round {round}");
        ground.pull_image().await;
        ground.run_pod(true).await;
        ground.run_pod(false).await;
        ground.create_container().await;
        ground.start_container().await;
        ground.exec_sync().await;
        ground.stop_container().await;
        ground.remove_container().await;
        ground.stop_pod().await;
        ground.remove_pod().await;
    }
    ground.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_any_call_ends_its_pod_truthfully() {
    let mut ground = Ground::new().await;
    for round in 0..rounds() {
        for with_daemon in [false, true] {
            for call in [AgentCall::Start, AgentCall::Exec, AgentCall::Stop, AgentCall::StopPod] {
                eprintln!("round {round}, {call:?}, hulld {}", if with_daemon { "too" } else { "lives" });
                ground.kill_agent(call, with_daemon).await;
            }
        }
    }
    ground.finish().await;
}

/// What is made once for all pods (the index of images, the namespace of layer mounts, bridge and rules), and how it is
/// released in the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_in_its_first_start_its_first_pod_and_its_release_leaves_nothing() {
    for round in 0..rounds() {
        eprintln!("round {round}");
        let mut ground = Ground::new().await;
        ground.daemon.kill();
        for directory in [ground.daemon.root(), ground.daemon.path("state")] {
            std::fs::remove_dir_all(directory).unwrap();
        }
        let delay = ground.chance.within(60);
        eprintln!("killed {delay:?} into its first start");
        ground.daemon.restart_and_kill(delay);
        ground.daemon.restart().await;
        ground.daemon.pull(&ground.image).await;

        let config = ground.published("first");
        let container = ground.sleeper("main");
        let mut client = ground.daemon.runtime().await;
        let (pod_config, container_config) = (config.clone(), container.clone());
        let first_pod = async move {
            let config = Some(pod_config.clone());
            let request =
                cri::RunPodSandboxRequest { config, runtime_handler: hull_tests::microvm::default_handler() };
            let pod_sandbox_id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
            let (config, sandbox_config) = (Some(container_config), Some(pod_config));
            let request = cri::CreateContainerRequest { pod_sandbox_id, config, sandbox_config };
            let container_id = client.create_container(request).await?.into_inner().container_id;
            client.start_container(cri::StartContainerRequest { container_id }).await
        };
        ground.killed_during("the first pod", 100, first_pod).await;
        let mut pod = Pod::run(&ground.daemon, config).await;
        let existing = ground.containers_of(&pod).await;
        for id in &existing {
            pod.remove_container(id).await;
        }
        let id = pod.start(container).await;
        assert_eq!(pod.shell(&id, "echo works").await, "works\n");

        ground.daemon.remove_all_pods().await;
        ground.daemon.stop();
        let delay = ground.chance.within(60);
        eprintln!("killed {delay:?} into its release");
        ground.daemon.release_and_kill(delay);
        ground.daemon.restart().await;
        ground.finish().await;
    }
}

fn rounds() -> usize {
    let default = if hull_tests::microvm::by_default() { DEFAULT_ROUNDS_OF_MACHINES } else { DEFAULT_ROUNDS };
    std::env::var("HULL_KILL_ROUNDS").map_or(default, |rounds| rounds.parse().expect("a number"))
}

/// Random delays that a seed brings back.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new() -> Chance {
        let drawn = || std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = std::env::var("HULL_KILL_SEED").map_or_else(|_| drawn(), |seed| seed.parse().unwrap());
        eprintln!("HULL_KILL_SEED={seed}");
        Chance(seed | 1)
    }

    /// xorshift64
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn within(&mut self, milliseconds: u64) -> Duration {
        Duration::from_micros(self.draw() % (hull_tests::patience(1).as_secs() * milliseconds * 1000))
    }

    pub(crate) fn below(&mut self, count: usize) -> usize {
        (self.draw() % count as u64) as usize
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.draw().is_multiple_of(count)
    }
}

#[derive(Clone, Copy, Debug)]
enum AgentCall {
    Start,
    Exec,
    Stop,
    StopPod,
}

/// A daemon with an image, and what is needed to kill it.
struct Ground {
    daemon: Daemon,
    registry: Registry,
    image: String,
    chance: Chance,
    number: usize,
}

impl Ground {
    async fn new() -> Ground {
        let registry = Registry::start();
        let image = registry.push("busybox", "v1", &image::busybox());
        let daemon = Daemon::start().await;
        daemon.pull(&image).await;
        Ground { daemon, registry, image, chance: Chance::new(), number: 0 }
    }

    fn next_name(&mut self, what: &str) -> String {
        self.number += 1;
        format!("{what}{}", self.number)
    }

    /// A call that is hit `within` so many milliseconds after it was sent; its answer if that came first. hulld runs
    /// again afterwards, and now and then it was killed in the middle of that start, too.
    async fn killed_during<T: Send + 'static>(
        &mut self,
        what: &str,
        within: u64,
        call: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Option<T> {
        let delay = self.chance.within(within);
        let call = tokio::spawn(call);
        tokio::task::block_in_place(|| std::thread::sleep(delay));
        self.daemon.kill();
        let answer = in_time(what, call).await.unwrap();
        eprintln!("{what}, hulld killed after {delay:?}, answered: {}", answer.is_ok());
        if self.chance.one_in(3) {
            let delay = self.chance.within(80);
            eprintln!("killed {delay:?} into its start");
            self.daemon.restart_and_kill(delay);
        }
        self.daemon.restart().await;
        match answer {
            Ok(answer) => Some(answer),
            Err(status) => {
                assert!(is_broken_connection(&status), "{what}: {status:?}");
                None
            }
        }
    }

    async fn pull_image(&mut self) {
        let name = self.next_name("pulled");
        let ballast: Vec<u8> = (0..BALLAST / 8).flat_map(|_| self.chance.draw().to_le_bytes()).collect();
        let image = Image::new(
            vec![
                (image::busybox_layer(), Packing::Gzip),
                (Layer::default().file("ballast", 0o644, &ballast), Packing::Zstd),
                (Layer::default().file("name", 0o644, name.as_bytes()), Packing::Plain),
            ],
            serde_json::json!({"Env": ["PATH=/bin"]}),
        );
        let reference = self.registry.push(&name, "v1", &image);
        let spec = Some(cri::ImageSpec { image: reference.clone(), ..Default::default() });
        let mut images = self.daemon.images().await;
        let request = cri::PullImageRequest { image: spec.clone(), ..Default::default() };
        let answer =
            self.killed_during("PullImage", 160, async move { images.pull_image(request).await }).await;

        let mut images = self.daemon.images().await;
        let request = cri::ImageStatusRequest { image: spec.clone(), verbose: false };
        let known = images.image_status(request).await.unwrap().into_inner().image.is_some();
        assert!(known || answer.is_none(), "a pulled image is gone");
        if !known {
            self.daemon.pull(&reference).await;
        }
        // What looks pulled is whole
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let script = "cat /name; wc -c < /ballast; sleep 1000";
        let id = pod.start(container_config("main", &reference, &["/bin/sh", "-c", script])).await;
        printed(&pod, "main", &format!("{name}{BALLAST}\n")).await;
        pod.remove_container(&id).await;
        pod.remove().await;
        images.remove_image(cri::RemoveImageRequest { image: spec }).await.unwrap();
    }

    async fn run_pod(&mut self, networked: bool) {
        let name = self.next_name("pod");
        let config = if networked { self.published(&name) } else { pod_config(&self.daemon, &name) };
        let mut runtime = self.daemon.runtime().await;
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: hull_tests::microvm::default_handler(),
        };
        let answer = self
            .killed_during("RunPodSandbox", 30, async move { runtime.run_pod_sandbox(request).await })
            .await;
        let mut pod = Pod::run(&self.daemon, config).await;
        if let Some(answer) = answer {
            assert_eq!(answer.into_inner().pod_sandbox_id, pod.id, "the pod that was made is still the pod");
        }
        let status = pod.status().await;
        assert_eq!(status.state, cri::PodSandboxState::SandboxReady as i32);
        let has_address = networked || hull_tests::microvm::by_default();
        assert_eq!(!status.network.unwrap_or_default().ip.is_empty(), has_address);
        assert_eq!(self.pods_named(&name).await, [pod.id.clone()]);
        let id = pod.start(self.sleeper("main")).await;
        assert_eq!(pod.shell(&id, "echo works").await, "works\n");
        pod.stop().await;
        pod.remove().await;
    }

    async fn create_container(&mut self) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let config = self.sleeper("main");
        let mut client = pod.client();
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self
            .killed_during("CreateContainer", 5, async move { client.create_container(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        let id = pod.create(config).await.unwrap();
        if let Some(answer) = answer {
            assert_eq!(answer.into_inner().container_id, id);
        }
        assert_eq!(self.containers_of(&pod).await, std::slice::from_ref(&id));
        self.start(&pod, &id).await;
        assert_eq!(pod.shell(&id, "echo works").await, "works\n");
        pod.remove().await;
    }

    async fn start_container(&mut self) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let id = pod.create(self.shell("main", "echo started; exec sleep 1000")).await.unwrap();
        let mut client = pod.client();
        let request = cri::StartContainerRequest { container_id: id.clone() };
        let answer = self
            .killed_during("StartContainer", 22, async move { client.start_container(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        let status = pod.container(&id).await;
        match status.state() {
            cri::ContainerState::ContainerCreated if answer.is_none() => self.start(&pod, &id).await,
            cri::ContainerState::ContainerRunning => {}
            _ => panic!("answered: {}, then {status:?}", answer.is_some()),
        }
        assert_eq!(pod.shell(&id, "echo works").await, "works\n");
        let status = pod.container(&id).await;
        assert!(status.started_at > 0 && status.finished_at == 0, "{status:?}");
        // Once, and not again by the repeated request
        printed(&pod, "main", "started\n").await;
        pod.remove_container(&id).await;
        pod.remove().await;
    }

    async fn exec_sync(&mut self) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let id = pod.start(self.sleeper("main")).await;
        let mut client = pod.client();
        let cmd = ["/bin/sh", "-c", "echo before; usleep 20000; echo after"].map(str::to_owned).into();
        let request = cri::ExecSyncRequest { container_id: id.clone(), cmd, timeout: 10 };
        let answer = self.killed_during("ExecSync", 60, async move { client.exec_sync(request).await }).await;
        if let Some(answer) = answer {
            assert_eq!(String::from_utf8(answer.into_inner().stdout).unwrap(), "before\nafter\n");
        }
        pod.reconnect(&self.daemon).await;
        assert_eq!(pod.container(&id).await.state(), cri::ContainerState::ContainerRunning);
        // The command whose client went away ends too (SIGPIPE at the latest), and others go on
        hull_tests::eventually(
            "only the container's own process is left",
            hull_tests::patience(5),
            async || (pod.shell(&id, "ps -o comm").await.matches("usleep").count() == 0).then_some(()),
        )
        .await;
        pod.remove().await;
    }

    async fn stop_container(&mut self) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let script = "trap 'exit 3' TERM; echo up; while true; do usleep 10000; done";
        let id = pod.start(self.shell("main", script)).await;
        printed(&pod, "main", "up\n").await;
        let mut client = pod.client();
        let request = cri::StopContainerRequest { container_id: id.clone(), timeout: 30 };
        let again = request.clone();
        let answer = self
            .killed_during("StopContainer", 30, async move { client.stop_container(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        let status = pod.container(&id).await;
        let over = (status.state(), status.exit_code) == (cri::ContainerState::ContainerExited, 3);
        let runs = status.state() == cri::ContainerState::ContainerRunning && answer.is_none();
        assert!(over || runs, "answered: {}, then {status:?}", answer.is_some());
        in_time("StopContainer", pod.client().stop_container(again)).await.unwrap();
        let status = pod.container(&id).await;
        assert_eq!(
            (status.state(), status.exit_code),
            (cri::ContainerState::ContainerExited, 3),
            "{status:?}"
        );
        pod.remove().await;
    }

    async fn remove_container(&mut self) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, pod_config(&self.daemon, &name)).await;
        let config = self.sleeper("main");
        let id = pod.start(config.clone()).await;
        let mut client = pod.client();
        let request = cri::RemoveContainerRequest { container_id: id.clone() };
        let answer = self
            .killed_during("RemoveContainer", 14, async move { client.remove_container(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        let left = self.containers_of(&pod).await;
        assert!(left.is_empty() || (left == [id.clone()] && answer.is_none()), "{left:?}");
        pod.remove_container(&id).await;
        assert!(self.containers_of(&pod).await.is_empty());
        assert!(!self.daemon.root().join("containers").join(&id).exists());
        let id = pod.start(config).await;
        assert_eq!(pod.shell(&id, "echo works").await, "works\n");
        pod.remove().await;
    }

    async fn stop_pod(&mut self) {
        let name = self.next_name("pod");
        let config = self.published(&name);
        let mut pod = Pod::run(&self.daemon, config.clone()).await;
        let running = pod.start(self.sleeper("running")).await;
        let ended = pod.start(self.shell("ended", "exit 5")).await;
        pod.ended(&ended).await;
        let mut client = pod.client();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        let answer = self
            .killed_during("StopPodSandbox", 30, async move { client.stop_pod_sandbox(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        if answer.is_some() {
            assert_eq!(pod.status().await.state(), cri::PodSandboxState::SandboxNotready);
        }
        pod.stop().await;
        assert_eq!(pod.status().await.state(), cri::PodSandboxState::SandboxNotready);
        for (id, code) in [(&running, 137), (&ended, 5)] {
            let status = pod.container(id).await;
            let found = (status.state(), status.exit_code);
            assert_eq!(found, (cri::ContainerState::ContainerExited, code), "{status:?}");
        }
        // Its host port is free again
        let mut config = config;
        config.metadata.as_mut().unwrap().attempt = 1;
        let mut next = Pod::run(&self.daemon, config).await;
        next.remove().await;
        pod.remove().await;
    }

    async fn remove_pod(&mut self) {
        let name = self.next_name("pod");
        let config = self.published(&name);
        let mut pod = Pod::run(&self.daemon, config.clone()).await;
        pod.start(self.sleeper("main")).await;
        if self.chance.one_in(2) {
            pod.stop().await;
        }
        let mut client = pod.client();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        let answer = self
            .killed_during("RemovePodSandbox", 20, async move { client.remove_pod_sandbox(request).await })
            .await;
        pod.reconnect(&self.daemon).await;
        let left = self.pods_named(&name).await;
        assert!(left.is_empty() || (left == [pod.id.clone()] && answer.is_none()), "{left:?}");
        pod.remove().await;
        assert!(self.pods_named(&name).await.is_empty());
        assert!(self.containers_of(&pod).await.is_empty());
        let mut pod = Pod::run(&self.daemon, config).await;
        pod.remove().await;
    }

    /// The agent of a pod is killed at some instant of a call, and hulld with it if asked.
    async fn kill_agent(&mut self, call: AgentCall, with_daemon: bool) {
        let name = self.next_name("pod");
        let mut pod = Pod::run(&self.daemon, networked_pod_config(&self.daemon, &name)).await;
        // A number that is nobody else's in the list of processes
        let nap = format!("{}", 5_000_000 + u64::from(std::process::id()) * 1000 + self.number as u64);
        let mut config = self.shell("main", &format!("sleep {nap} & exec sleep {nap}"));
        let options = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        options.namespace_options =
            pod.config.linux.as_ref().unwrap().security_context.as_ref().unwrap().namespace_options.clone();
        let id = pod.create(config).await.unwrap();
        if !matches!(call, AgentCall::Start) {
            self.start(&pod, &id).await;
        }
        let agent = super::survival::agent_of(&self.daemon, &pod.id).await;
        let mut client = pod.client();
        let (container_id, pod_sandbox_id) = (id.clone(), pod.id.clone());
        let under_way = tokio::spawn(async move {
            match call {
                AgentCall::Start => {
                    client.start_container(cri::StartContainerRequest { container_id }).await.map(drop)
                }
                AgentCall::Exec => {
                    let cmd = ["/bin/usleep", "10000"].map(str::to_owned).into();
                    let request = cri::ExecSyncRequest { container_id, cmd, timeout: 10 };
                    client.exec_sync(request).await.map(drop)
                }
                AgentCall::Stop => {
                    let request = cri::StopContainerRequest { container_id, timeout: 0 };
                    client.stop_container(request).await.map(drop)
                }
                AgentCall::StopPod => {
                    let request = cri::StopPodSandboxRequest { pod_sandbox_id };
                    client.stop_pod_sandbox(request).await.map(drop)
                }
            }
        });
        let delay = self.chance.within(30);
        tokio::task::block_in_place(|| std::thread::sleep(delay));
        let daemon_first = with_daemon && self.chance.one_in(2);
        if daemon_first {
            self.daemon.kill();
        }
        // It may have ended by itself: the pod was stopped
        let killed = kill_process(Pid::from_raw(agent).unwrap(), Signal::KILL).is_ok();
        if with_daemon {
            self.daemon.kill();
        }
        let answer = in_time("a call whose agent was killed", under_way).await.unwrap();
        eprintln!("after {delay:?}, hulld first: {daemon_first}, agent killed: {killed}: {answer:?}");
        if with_daemon {
            self.daemon.restart().await;
            pod.reconnect(&self.daemon).await;
        } else if let (AgentCall::Stop | AgentCall::StopPod, Err(status)) = (call, &answer) {
            panic!("a stop must not fail because the agent is gone: {status:?}");
        }

        hull_tests::eventually("the pod is not ready", hull_tests::patience(5), async || {
            (pod.status().await.state() == cri::PodSandboxState::SandboxNotready).then_some(())
        })
        .await;
        hull_tests::eventually("nothing of it runs", hull_tests::patience(5), async || {
            (!super::survival::running(&format!("sleep\u{0}{nap}"))).then_some(())
        })
        .await;
        let status = pod.container(&id).await;
        let truthful = match (status.state(), status.exit_code) {
            (cri::ContainerState::ContainerCreated, _) => matches!(call, AgentCall::Start) && answer.is_err(),
            (cri::ContainerState::ContainerExited, 255) => status.reason == hull_tests::microvm::lost(),
            (cri::ContainerState::ContainerExited, 137) => true,
            (cri::ContainerState::ContainerExited, 128) => answer.is_err(),
            _ => false,
        };
        assert!(truthful, "{status:?}");
        pod.stop().await;
        pod.remove().await;
    }

    /// On hull's network, with a host port.
    fn published(&self, name: &str) -> cri::PodSandboxConfig {
        let mut config = networked_pod_config(&self.daemon, name);
        config.port_mappings = vec![cri::PortMapping {
            protocol: cri::Protocol::Tcp as i32,
            container_port: 80,
            host_port: free_port().into(),
            host_ip: String::new(),
        }];
        config
    }

    fn sleeper(&self, name: &str) -> cri::ContainerConfig {
        container_config(name, &self.image, &["/bin/sleep", "1000"])
    }

    fn shell(&self, name: &str, script: &str) -> cri::ContainerConfig {
        container_config(name, &self.image, &["/bin/sh", "-c", script])
    }

    async fn start(&self, pod: &Pod, id: &str) {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        in_time("StartContainer", pod.client().start_container(request)).await.unwrap();
    }

    async fn pods_named(&self, name: &str) -> Vec<String> {
        let request = cri::ListPodSandboxRequest::default();
        let pods = self.daemon.runtime().await.list_pod_sandbox(request).await.unwrap().into_inner().items;
        let named = pods.into_iter().filter(|pod| pod.metadata.as_ref().unwrap().name == name);
        named.map(|pod| pod.id).collect()
    }

    async fn containers_of(&self, pod: &Pod) -> Vec<String> {
        let filter = cri::ContainerFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let found = self.daemon.runtime().await.list_containers(request).await.unwrap().into_inner();
        found.containers.into_iter().map(|container| container.id).collect()
    }

    /// Nothing is left on the machine, nor below the daemon's own directories.
    async fn finish(self) {
        let spec = Some(cri::ImageSpec { image: self.image.clone(), ..Default::default() });
        self.daemon.remove_all_pods().await;
        self.daemon.images().await.remove_image(cri::RemoveImageRequest { image: spec }).await.unwrap();
        let (root, state) = (self.daemon.root(), self.daemon.path("state"));
        let kept = ["containers", "layers", "state/sandboxes", "state/containers", "network/pods"];
        let kept: Vec<_> = kept.iter().map(|name| root.join(name)).chain([state.join("pods")]).collect();
        hull_tests::eventually("the directories are empty", hull_tests::patience(5), async || {
            let left: Vec<_> =
                kept.iter().flat_map(|path| std::fs::read_dir(path).unwrap().flatten()).collect();
            if !left.is_empty() {
                eprintln!("left: {left:?}");
            }
            left.is_empty().then_some(())
        })
        .await;
        self.daemon.finish().await;
    }
}

async fn in_time<T>(what: &str, call: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(hull_tests::patience(HANGING), call).await;
    answer.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Waits until a container's log is this and nothing else.
async fn printed(pod: &Pod, container: &str, text: &str) {
    hull_tests::eventually(&format!("{container} prints {text:?}"), hull_tests::patience(10), async || {
        let log = pod.log(container);
        assert!(text.starts_with(&log), "{log:?} instead of {text:?}");
        (log == text).then_some(())
    })
    .await;
}

/// Errors of the transport have a cause; what the server says has none.
fn is_broken_connection(status: &Status) -> bool {
    status.source().is_some()
}
