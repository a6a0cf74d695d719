use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as cri};
use tonic::transport::{Channel, Endpoint};

use super::pod_cgroup::PodCgroup;
use super::{Named, Network};

/// One CRI runtime under measurement. Any failure ends the program: a number without the work behind it is no number.
#[derive(Clone)]
pub struct Peer {
    pub name: String,
    pub runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    socket: String,
    handler: String,
    logs: std::sync::Arc<tempfile::TempDir>,
    cgroup: std::sync::Arc<(String, PodCgroup)>,
}

impl Peer {
    pub async fn connect(named: &Named) -> Peer {
        let name = &named.name;
        let cgroup = format!("hull-bench-{name}-{}", std::process::id());
        let socket = named.socket.trim_start_matches("unix://").to_owned();
        let channel = Peer::try_connect(&socket).await;
        let channel = channel.unwrap_or_else(|error| panic!("{name} at {socket}: {error}"));
        Peer {
            name: name.clone(),
            // 1,000 containers with everything told of them are more than the usual 4 MiB.
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            images: ImageServiceClient::new(channel),
            socket,
            handler: named.handler.clone(),
            logs: std::sync::Arc::new(tempfile::tempdir().expect("a directory for logs")),
            cgroup: std::sync::Arc::new((format!("/{cgroup}"), PodCgroup::make(&cgroup))),
        }
    }

    async fn try_connect(socket: &str) -> Result<Channel, tonic::transport::Error> {
        Endpoint::try_from(format!("unix://{socket}")).expect("a socket path").connect().await
    }

    /// The process that listens on the socket; `None` while nobody does.
    pub fn find_daemon(&self) -> Option<u32> {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).ok()?;
        let credentials = rustix::net::sockopt::socket_peercred(&stream).expect("SO_PEERCRED");
        Some(credentials.pid.as_raw_nonzero().get().cast_unsigned())
    }

    /// The process that listens on the socket.
    pub fn daemon_pid(&self) -> u32 {
        self.find_daemon().unwrap_or_else(|| panic!("nobody listens at {}", self.socket))
    }

    /// Where the log of the container of that pod is.
    pub fn log_path(&self, pod: &str) -> std::path::PathBuf {
        self.logs.path().join(pod).join("main.log")
    }

    /// With a log directory that exists, as kubelet makes it.
    pub fn pod_config(&self, name: &str, network: Network) -> cri::PodSandboxConfig {
        std::fs::create_dir_all(self.logs.path().join(name)).expect("a directory for the pod's logs");
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                // One daemon may be measured with several handlers.
                uid: format!("{name}-{}{}", self.handler, std::process::id()),
                namespace: "bench".into(),
                attempt: 0,
            }),
            hostname: if network == Network::Own { name.to_owned() } else { String::new() },
            log_directory: self.logs.path().join(name).display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.0.clone(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(network)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub async fn run_pod(&self, config: cri::PodSandboxConfig) -> String {
        let request =
            cri::RunPodSandboxRequest { config: Some(config), runtime_handler: self.handler.clone() };
        self.answer(self.runtime.clone().run_pod_sandbox(request).await).pod_sandbox_id
    }

    /// A container that sleeps.
    pub async fn create(&self, pod: &str, sandbox: &cri::PodSandboxConfig, image: &str) -> String {
        self.create_named(pod, sandbox, image, "main", &["/bin/sleep", "100000"]).await
    }

    /// A container of that name with that command.
    pub async fn create_named(
        &self,
        pod: &str,
        sandbox: &cri::PodSandboxConfig,
        image: &str,
        name: &str,
        command: &[&str],
    ) -> String {
        let options = sandbox.linux.clone().and_then(|linux| linux.security_context);
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
            command: command.iter().map(ToString::to_string).collect(),
            log_path: format!("{name}.log"),
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources { cpu_shares: 2, ..Default::default() }),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: options.and_then(|context| context.namespace_options),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        self.answer(self.runtime.clone().create_container(request).await).container_id
    }

    /// A pod with one container that sleeps: the pod's id, the container's.
    pub async fn pod_with_container(&self, name: &str, network: Network, image: &str) -> (String, String) {
        let config = self.pod_config(name, network);
        let pod = self.run_pod(config.clone()).await;
        let container = self.create(&pod, &config, image).await;
        self.start(&container).await;
        (pod, container)
    }

    pub async fn start(&self, container_id: &str) {
        let request = cri::StartContainerRequest { container_id: container_id.to_owned() };
        self.answer(self.runtime.clone().start_container(request).await);
    }

    pub async fn stop_container(&self, container_id: &str) {
        let request = cri::StopContainerRequest { container_id: container_id.to_owned(), timeout: 0 };
        self.answer(self.runtime.clone().stop_container(request).await);
    }

    pub async fn remove_container(&self, container_id: &str) {
        let request = cri::RemoveContainerRequest { container_id: container_id.to_owned() };
        self.answer(self.runtime.clone().remove_container(request).await);
    }

    pub async fn stop_pod(&self, pod_sandbox_id: &str) {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.to_owned() };
        self.answer(self.runtime.clone().stop_pod_sandbox(request).await);
    }

    pub async fn remove_pod(&self, pod_sandbox_id: &str) {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id.to_owned() };
        self.answer(self.runtime.clone().remove_pod_sandbox(request).await);
    }

    /// Runs a command to its end, which must be a good one.
    pub async fn exec_sync(&self, container_id: &str, command: &[&str]) {
        let request = cri::ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: 60,
        };
        let answer = self.answer(self.runtime.clone().exec_sync(request).await);
        assert_eq!(answer.exit_code, 0, "{}: {command:?}", self.name);
    }

    /// The URL of a streaming exec with standard input and output.
    pub async fn exec_url(&self, container_id: &str, command: &[&str]) -> String {
        let request = cri::ExecRequest {
            container_id: container_id.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            stdin: true,
            stdout: true,
            ..Default::default()
        };
        self.answer(self.runtime.clone().exec(request).await).url
    }

    pub async fn pull(&self, image: &str) {
        let image = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
        let request = cri::PullImageRequest { image, ..Default::default() };
        self.answer(self.images.clone().pull_image(request).await);
    }

    pub async fn remove_image(&self, image: &str) {
        let image = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
        self.answer(self.images.clone().remove_image(cri::RemoveImageRequest { image }).await);
    }

    /// What the runtime answered; a failure ends the program.
    pub fn answer<T>(&self, answer: Result<tonic::Response<T>, tonic::Status>) -> T {
        answer.unwrap_or_else(|status| panic!("{}: {status}", self.name)).into_inner()
    }
}

fn namespaces(network: Network) -> cri::NamespaceOption {
    let network = match network {
        Network::Host => cri::NamespaceMode::Node,
        Network::Own => cri::NamespaceMode::Pod,
    };
    cri::NamespaceOption {
        network: network as i32,
        pid: cri::NamespaceMode::Container as i32,
        ipc: cri::NamespaceMode::Pod as i32,
        ..Default::default()
    }
}
