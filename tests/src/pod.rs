use std::path::PathBuf;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as cri};
use tonic::transport::Channel;

use crate::daemon::Daemon;

/// A sandbox under test with the configuration it was made from.
pub struct Pod {
    pub id: String,
    pub config: cri::PodSandboxConfig,
    client: RuntimeServiceClient<Channel>,
}

/// A pod's configuration as a kubelet would write it; host network unless changed.
pub fn pod_config(daemon: &Daemon, name: &str) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "tests".into(),
            attempt: 0,
        }),
        hostname: String::new(),
        log_directory: daemon.path("logs").join(name).display().to_string(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: [("note".to_owned(), "as it was given".to_owned())].into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(host_network()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The same with a network namespace of its own.
pub fn networked_pod_config(daemon: &Daemon, name: &str) -> cri::PodSandboxConfig {
    let mut config = pod_config(daemon, name);
    config.hostname = name.to_owned();
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().namespace_options = Some(cri::NamespaceOption {
        network: cri::NamespaceMode::Pod as i32,
        pid: cri::NamespaceMode::Container as i32,
        ipc: cri::NamespaceMode::Pod as i32,
        ..Default::default()
    });
    config
}

/// The host's network, or, where pods are machines, one of their own: those cannot have the host's.
fn host_network() -> cri::NamespaceOption {
    let network = match crate::microvm::by_default() {
        true => cri::NamespaceMode::Pod,
        false => cri::NamespaceMode::Node,
    };
    cri::NamespaceOption {
        network: network as i32,
        pid: cri::NamespaceMode::Container as i32,
        ipc: cri::NamespaceMode::Pod as i32,
        ..Default::default()
    }
}

/// A container's configuration: `command` in the image, log file NAME.log.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        labels: [("container".to_owned(), name.to_owned())].into(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources::default()),
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: cri::NamespaceMode::Node as i32,
                    pid: cri::NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

impl Pod {
    pub async fn run(daemon: &Daemon, config: cri::PodSandboxConfig) -> Pod {
        Pod::try_run(daemon, config).await.unwrap_or_else(|status| panic!("RunPodSandbox: {status}"))
    }

    pub async fn try_run(daemon: &Daemon, config: cri::PodSandboxConfig) -> Result<Pod, tonic::Status> {
        Pod::try_run_by(daemon, &crate::microvm::default_handler(), config).await
    }

    /// A machine.
    pub async fn run_microvm(daemon: &Daemon, config: cri::PodSandboxConfig) -> Pod {
        let pod = Pod::try_run_by(daemon, "microvm", config).await;
        pod.unwrap_or_else(|status| panic!("RunPodSandbox: {status}"))
    }

    /// By the runtime handler of this name.
    pub async fn try_run_by(
        daemon: &Daemon,
        handler: &str,
        config: cri::PodSandboxConfig,
    ) -> Result<Pod, tonic::Status> {
        let mut client = daemon.runtime().await;
        let request =
            cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok(Pod { id, config, client })
    }

    /// Talks to a hulld that was started again.
    pub async fn reconnect(&mut self, daemon: &Daemon) {
        self.client = daemon.runtime().await;
    }

    /// A client of its own for what has no short form here.
    pub fn client(&self) -> RuntimeServiceClient<Channel> {
        self.client.clone()
    }

    /// Creates and starts; the container's id.
    pub async fn start(&mut self, mut config: cri::ContainerConfig) -> String {
        self.fit(&mut config);
        let id = self.create(config).await.unwrap_or_else(|status| panic!("CreateContainer: {status}"));
        let request = cri::StartContainerRequest { container_id: id.clone() };
        self.client
            .start_container(request)
            .await
            .unwrap_or_else(|status| panic!("StartContainer: {status}"));
        id
    }

    /// Creates and starts a container that must not come to life; the first error.
    pub async fn start_fails(&mut self, mut config: cri::ContainerConfig) -> tonic::Status {
        self.fit(&mut config);
        match self.create(config).await {
            Err(status) => status,
            Ok(container_id) => {
                let request = cri::StartContainerRequest { container_id };
                self.client.start_container(request).await.expect_err("the container should not start")
            }
        }
    }

    /// kubelet repeats the pod's network and IPC modes in each container.
    fn fit(&self, config: &mut cri::ContainerConfig) {
        let pod = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let Some(pod) = pod.and_then(|context| context.namespace_options.clone()) else { return };
        let own = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        let own = own.namespace_options.get_or_insert_default();
        own.network = pod.network;
        own.ipc = pod.ipc;
    }

    pub async fn create(&mut self, config: cri::ContainerConfig) -> Result<String, tonic::Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(self.client.create_container(request).await?.into_inner().container_id)
    }

    pub async fn status(&mut self) -> cri::PodSandboxStatus {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        self.client.pod_sandbox_status(request).await.unwrap().into_inner().status.expect("a status")
    }

    pub async fn container(&mut self, id: &str) -> cri::ContainerStatus {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.client.container_status(request).await.unwrap().into_inner().status.expect("a status")
    }

    /// Waits for the end of a container; its last status.
    pub async fn ended(&mut self, id: &str) -> cri::ContainerStatus {
        let mut status = self.container(id).await;
        let deadline = std::time::Instant::now() + crate::patience(20);
        while status.state != cri::ContainerState::ContainerExited as i32 {
            assert!(std::time::Instant::now() < deadline, "container {id} does not end: {status:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            status = self.container(id).await;
        }
        status
    }

    pub async fn exec(&mut self, id: &str, command: &[&str]) -> cri::ExecSyncResponse {
        self.try_exec(id, command, 60).await.unwrap_or_else(|status| panic!("ExecSync {command:?}: {status}"))
    }

    pub async fn try_exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout };
        Ok(self.client.exec_sync(request).await?.into_inner())
    }

    /// Standard output of a command in the container, which must succeed.
    pub async fn output(&mut self, id: &str, command: &[&str]) -> String {
        let answer = self.exec(id, command).await;
        let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert_eq!(answer.exit_code, 0, "{command:?}: {stderr}");
        String::from_utf8_lossy(&answer.stdout).into_owned()
    }

    /// What a shell script prints in the container.
    pub async fn shell(&mut self, id: &str, script: &str) -> String {
        self.output(id, &["/bin/sh", "-c", script]).await
    }

    pub async fn stop_container(&mut self, id: &str, timeout: i64) {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout };
        self.client.stop_container(request).await.unwrap_or_else(|status| panic!("StopContainer: {status}"));
    }

    pub async fn remove_container(&mut self, id: &str) {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        self.client
            .remove_container(request)
            .await
            .unwrap_or_else(|status| panic!("RemoveContainer: {status}"));
    }

    pub async fn stop(&mut self) {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.client
            .stop_pod_sandbox(request)
            .await
            .unwrap_or_else(|status| panic!("StopPodSandbox: {status}"));
    }

    pub async fn remove(&mut self) {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.client
            .remove_pod_sandbox(request)
            .await
            .unwrap_or_else(|status| panic!("RemovePodSandbox: {status}"));
    }

    /// The container's log file.
    pub fn log_path(&self, name: &str) -> PathBuf {
        PathBuf::from(&self.config.log_directory).join(format!("{name}.log"))
    }

    /// What was printed, without time stamps and tags; partial lines are joined.
    pub fn log(&self, name: &str) -> String {
        let mut text = String::new();
        for line in std::fs::read_to_string(self.log_path(name)).unwrap_or_default().lines() {
            let mut parts = line.splitn(4, ' ');
            let (_time, _stream, tag, content) =
                (parts.next(), parts.next(), parts.next().expect("a tag"), parts.next().unwrap_or(""));
            text.push_str(content);
            if tag == "F" {
                text.push('\n');
            }
        }
        text
    }
}
