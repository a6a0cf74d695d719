use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as cri};
use tonic::transport::{Channel, Endpoint};

/// One CRI runtime under measurement. Any failure ends the program: a number without the work behind it is no number.
pub struct Peer {
    pub name: String,
    pub runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    socket: String,
    logs: tempfile::TempDir,
}

impl Peer {
    pub async fn connect(name: &str, socket: &str) -> Peer {
        let socket = socket.trim_start_matches("unix://").to_owned();
        let endpoint = Endpoint::try_from(format!("unix://{socket}")).expect("a socket path");
        let channel = endpoint.connect().await.unwrap_or_else(|error| panic!("{name} at {socket}: {error}"));
        Peer {
            name: name.to_owned(),
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            socket,
            logs: tempfile::tempdir().expect("a directory for logs"),
        }
    }

    /// The process that listens on the socket.
    pub fn daemon_pid(&self) -> u32 {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).expect("the socket");
        let credentials = rustix::net::sockopt::socket_peercred(&stream).expect("SO_PEERCRED");
        credentials.pid.as_raw_nonzero().get().cast_unsigned()
    }

    pub fn pod_config(&self, name: &str) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-{}", std::process::id()),
                namespace: "bench".into(),
                attempt: 0,
            }),
            log_directory: self.logs.path().join(name).display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: format!("/hull-bench-{}-{}", self.name, std::process::id()),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub async fn run_pod(&mut self, config: cri::PodSandboxConfig) -> String {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        self.answer(self.runtime.clone().run_pod_sandbox(request).await).pod_sandbox_id
    }

    pub async fn create(&mut self, pod: &str, sandbox: &cri::PodSandboxConfig, image: &str) -> String {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
            command: vec!["/bin/sleep".into(), "100000".into()],
            log_path: "main.log".into(),
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources { cpu_shares: 2, ..Default::default() }),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
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

    pub async fn start(&mut self, container_id: &str) {
        let request = cri::StartContainerRequest { container_id: container_id.to_owned() };
        self.answer(self.runtime.clone().start_container(request).await);
    }

    pub async fn stop_container(&mut self, container_id: &str) {
        let request = cri::StopContainerRequest { container_id: container_id.to_owned(), timeout: 0 };
        self.answer(self.runtime.clone().stop_container(request).await);
    }

    pub async fn remove_container(&mut self, container_id: &str) {
        let request = cri::RemoveContainerRequest { container_id: container_id.to_owned() };
        self.answer(self.runtime.clone().remove_container(request).await);
    }

    pub async fn stop_pod(&mut self, pod_sandbox_id: &str) {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.to_owned() };
        self.answer(self.runtime.clone().stop_pod_sandbox(request).await);
    }

    pub async fn remove_pod(&mut self, pod_sandbox_id: &str) {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id.to_owned() };
        self.answer(self.runtime.clone().remove_pod_sandbox(request).await);
    }

    pub async fn pull(&mut self, image: &str) {
        let image = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
        self.answer(
            self.images.clone().pull_image(cri::PullImageRequest { image, ..Default::default() }).await,
        );
    }

    pub async fn remove_image(&mut self, image: &str) {
        let image = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
        self.answer(self.images.clone().remove_image(cri::RemoveImageRequest { image }).await);
    }

    fn answer<T>(&self, answer: Result<tonic::Response<T>, tonic::Status>) -> T {
        answer.unwrap_or_else(|status| panic!("{}: {status}", self.name)).into_inner()
    }
}

fn namespaces() -> cri::NamespaceOption {
    cri::NamespaceOption {
        network: cri::NamespaceMode::Node as i32,
        pid: cri::NamespaceMode::Container as i32,
        ipc: cri::NamespaceMode::Pod as i32,
        ..Default::default()
    }
}
