//! Calls of CRI that are newer than the independent client's schema (Kubernetes 1.31), declared by hand from the
//! published one and spoken without hull's own generated code.

use std::fmt::Debug;

use k8s_cri::v1 as cri;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

/// `UpdatePodSandboxResourcesRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdatePodSandboxResourcesRequest {
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    pub overhead: Option<cri::LinuxContainerResources>,
    #[prost(message, optional, tag = "3")]
    pub resources: Option<cri::LinuxContainerResources>,
}

/// `ContainerStatsResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatsResponse {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<ContainerStats>,
}

/// `ContainerStats`, as far as it tells of pressure.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStats {
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "3")]
    pub memory: Option<MemoryUsage>,
    #[prost(message, optional, tag = "6")]
    pub io: Option<IoUsage>,
}

/// `CpuUsage`, its pressure
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuUsage {
    #[prost(message, optional, tag = "4")]
    pub psi: Option<PsiStats>,
}

/// `MemoryUsage`, its pressure
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemoryUsage {
    #[prost(message, optional, tag = "8")]
    pub psi: Option<PsiStats>,
}

/// `IoUsage`, its pressure
#[derive(Clone, PartialEq, prost::Message)]
pub struct IoUsage {
    #[prost(message, optional, tag = "2")]
    pub psi: Option<PsiStats>,
}

/// `PsiStats`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PsiStats {
    #[prost(message, optional, tag = "1")]
    pub full: Option<PsiData>,
    #[prost(message, optional, tag = "2")]
    pub some: Option<PsiData>,
}

/// `PsiData`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PsiData {
    #[prost(uint64, tag = "1")]
    pub total: u64,
    #[prost(double, tag = "2")]
    pub avg10: f64,
    #[prost(double, tag = "3")]
    pub avg60: f64,
    #[prost(double, tag = "4")]
    pub avg300: f64,
}

/// `CreateContainerRequest`, with what this file's mounts need.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub sandbox_config: Option<cri::PodSandboxConfig>,
}

/// `ContainerConfig`, as far as tests of mounts need it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<cri::ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    pub image: Option<cri::ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    #[prost(string, tag = "11")]
    pub log_path: String,
    #[prost(message, optional, tag = "15")]
    pub linux: Option<cri::LinuxContainerConfig>,
    /// A number of CRI's `Signal`; 0: the image's.
    #[prost(int32, tag = "18")]
    pub stop_signal: i32,
}

impl From<cri::ContainerConfig> for ContainerConfig {
    /// What the older client says, as far as it is here.
    fn from(plain: cri::ContainerConfig) -> Self {
        let cri::ContainerConfig { metadata, image, command, log_path, linux, .. } = plain;
        Self { metadata, image, command, log_path, linux, ..Self::default() }
    }
}

/// `ContainerStatusResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<ContainerStatus>,
}

/// `ContainerStatus`, what the older client does not know of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatus {
    #[prost(message, repeated, tag = "14")]
    pub mounts: Vec<Mount>,
    /// A number of CRI's `Signal`.
    #[prost(int32, tag = "19")]
    pub stop_signal: i32,
}

/// `ImageSpec`, with what was found under the name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageSpec {
    #[prost(string, tag = "1")]
    pub image: String,
    #[prost(string, tag = "20")]
    pub image_ref: String,
}

/// `Mount`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    #[prost(message, optional, tag = "9")]
    pub image: Option<ImageSpec>,
    #[prost(string, tag = "10")]
    pub image_sub_path: String,
    #[prost(string, repeated, tag = "11")]
    pub mount_options: Vec<String>,
}

/// What has no fields, or none that matters.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

/// A request whose only field is a filter.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filtered<F: prost::Message + Default + Debug> {
    #[prost(message, optional, tag = "1")]
    pub filter: Option<F>,
}

/// A piece of a streamed list.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Piece<T: prost::Message + Default + Debug> {
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<T>,
}

/// Makes a container in this pod and starts it; its id.
pub async fn start(
    channel: Channel,
    pod: &crate::pod::Pod,
    config: ContainerConfig,
) -> Result<String, tonic::Status> {
    let container_id = create(channel, pod, config).await?;
    let request = cri::StartContainerRequest { container_id: container_id.clone() };
    pod.client().start_container(request).await?;
    Ok(container_id)
}

/// Makes a container in this pod; its id.
pub async fn create(
    channel: Channel,
    pod: &crate::pod::Pod,
    config: ContainerConfig,
) -> Result<String, tonic::Status> {
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config),
        sandbox_config: Some(pod.config.clone()),
    };
    let path = "/runtime.v1.RuntimeService/CreateContainer";
    let answer: cri::CreateContainerResponse = call(channel, path, request).await?;
    Ok(answer.container_id)
}

/// One call, `/runtime.v1.SERVICE/METHOD`.
pub async fn call<Q, A>(channel: Channel, path: &'static str, request: Q) -> Result<A, tonic::Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + Debug + 'static,
{
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    Ok(client.unary(tonic::Request::new(request), path, ProstCodec::<Q, A>::default()).await?.into_inner())
}

/// All of a streamed list, and in how many pieces it came.
pub async fn list<F, T>(
    channel: Channel,
    path: &'static str,
    filter: Option<F>,
) -> Result<(Vec<T>, usize), tonic::Status>
where
    F: prost::Message + Default + Debug + 'static,
    T: prost::Message + Default + Debug + 'static,
{
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    let codec = ProstCodec::<Filtered<F>, Piece<T>>::default();
    let request = tonic::Request::new(Filtered { filter });
    let mut stream = client.server_streaming(request, path, codec).await?.into_inner();
    let (mut all, mut pieces) = (Vec::new(), 0);
    while let Some(piece) = stream.message().await? {
        all.extend(piece.items);
        pieces += 1;
    }
    Ok((all, pieces))
}
