//! The three gRPC services, each call handed to its file.

use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use super::Runtime;
use crate::api::hull::hull_server::Hull;
use crate::api::hull::{self, InfoReply, InfoRequest, PullProgress, PullRequest};
use crate::api::runtime as cri;
use crate::api::runtime::image_service_server::ImageService;
use crate::api::runtime::runtime_service_server::RuntimeService;
use crate::config::Config;
use crate::server::Node;

/// What hulld serves.
#[derive(Clone, Debug)]
pub struct RuntimeServer(pub Arc<Runtime>);

type Answer<T> = Result<Response<T>, Status>;

fn ok<T>(answer: T) -> Answer<T> {
    Ok(Response::new(answer))
}

impl Node for RuntimeServer {
    type Error = super::OpenError;

    async fn open(config: Config) -> Result<Self, Self::Error> {
        Ok(Self(Runtime::open(config).await?))
    }

    async fn release(&self) -> Result<(), String> {
        match self.0.release().await {
            Ok(report) if report.pods == 0 => Ok(()),
            Ok(report) => {
                Err(format!("there are still {} pods; `hull rmp --all --force` removes them", report.pods))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn begin_stop(&self) {
        self.0.end_events();
    }

    async fn shutdown(&self) {
        self.0.shutdown().await;
    }
}

// What is not here answers UNIMPLEMENTED (build.rs, default stubs).
#[tonic::async_trait]
impl RuntimeService for RuntimeServer {
    async fn version(&self, request: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        ok(self.0.version(request.get_ref()))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        ok(self.0.status(request.get_ref()))
    }

    async fn runtime_config(
        &self,
        request: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        ok(self.0.runtime_config(request.get_ref()))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        self.0.update_runtime_config(request.get_ref()).await?;
        ok(cri::UpdateRuntimeConfigResponse {})
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let pod_sandbox_id = self.0.run_pod_sandbox(request.into_inner()).await?;
        ok(cri::RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        self.0.stop_pod_sandbox(&request.get_ref().pod_sandbox_id).await?;
        ok(cri::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        self.0.remove_pod_sandbox(&request.get_ref().pod_sandbox_id).await?;
        ok(cri::RemovePodSandboxResponse {})
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        self.0.update_pod_sandbox_resources(request.into_inner()).await?;
        ok(cri::UpdatePodSandboxResourcesResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        ok(self.0.pod_sandbox_status(request.get_ref())?)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        ok(cri::ListPodSandboxResponse { items: self.0.list_pod_sandbox(request.get_ref()) })
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let container_id = self.0.create_container(request.into_inner()).await?;
        ok(cri::CreateContainerResponse { container_id })
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        self.0.start_container(&request.get_ref().container_id).await?;
        ok(cri::StartContainerResponse {})
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.get_ref();
        self.0.stop_container(&request.container_id, request.timeout).await?;
        ok(cri::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        self.0.remove_container(&request.get_ref().container_id).await?;
        ok(cri::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        ok(cri::ListContainersResponse { containers: self.0.list_containers(request.get_ref()) })
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        ok(self.0.container_status(request.get_ref())?)
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        self.0.update_container_resources(request.into_inner()).await?;
        ok(cri::UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        self.0.reopen_container_log(&request.get_ref().container_id).await?;
        ok(cri::ReopenContainerLogResponse {})
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        ok(cri::ContainerStatsResponse { stats: Some(self.0.container_stats(request.get_ref()).await?) })
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        ok(cri::ListContainerStatsResponse {
            stats: self.0.list_container_stats(request.into_inner().filter).collect().await,
        })
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamContainerStatsResponse, Status>>> {
        ok(self.0.stream_container_stats(request.into_inner()))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        ok(cri::PodSandboxStatsResponse { stats: Some(self.0.pod_sandbox_stats(request.get_ref()).await?) })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        ok(cri::ListPodSandboxStatsResponse {
            stats: self.0.list_pod_sandbox_stats(request.into_inner().filter).collect().await,
        })
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamPodSandboxStatsResponse, Status>>> {
        ok(self.0.stream_pod_sandbox_stats(request.into_inner()))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        ok(cri::ListMetricDescriptorsResponse { descriptors: self.0.list_metric_descriptors() })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        ok(cri::ListPodSandboxMetricsResponse {
            pod_metrics: self.0.list_pod_sandbox_metrics().collect().await,
        })
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamPodSandboxMetricsResponse, Status>>> {
        ok(self.0.stream_pod_sandbox_metrics())
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamContainersResponse, Status>>> {
        ok(self.0.stream_containers(request.into_inner()))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamPodSandboxesResponse, Status>>> {
        ok(self.0.stream_pod_sandboxes(request.into_inner()))
    }

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::ContainerEventResponse, Status>>> {
        ok(Box::pin(self.0.get_container_events()?))
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        ok(self.0.exec_sync(request.into_inner()).await?)
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        ok(cri::ExecResponse { url: self.0.exec(request.into_inner())? })
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        ok(cri::AttachResponse { url: self.0.attach(request.into_inner())? })
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        ok(cri::PortForwardResponse { url: self.0.port_forward(request.get_ref())? })
    }
}

#[tonic::async_trait]
impl ImageService for RuntimeServer {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        ok(cri::ListImagesResponse { images: self.0.list_images(request.get_ref())? })
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<BoxStream<'static, Result<cri::StreamImagesResponse, Status>>> {
        ok(self.0.stream_images(request.into_inner())?)
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        ok(self.0.image_status(request.get_ref())?)
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        ok(cri::PullImageResponse { image_ref: self.0.pull_image(request.into_inner()).await? })
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        self.0.remove_image(request.into_inner()).await?;
        ok(cri::RemoveImageResponse {})
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        ok(self.0.image_fs_info().await?)
    }
}

#[tonic::async_trait]
impl Hull for RuntimeServer {
    async fn pull(
        &self,
        request: Request<PullRequest>,
    ) -> Result<Response<BoxStream<'static, Result<PullProgress, Status>>>, Status> {
        ok(Box::pin(self.0.pull_with_progress(request.into_inner())?))
    }

    async fn info(&self, _request: Request<InfoRequest>) -> Answer<InfoReply> {
        ok(self.0.info().await?)
    }

    async fn tag_image(&self, request: Request<hull::TagImageRequest>) -> Answer<hull::TagImageReply> {
        ok(self.0.tag_image(request.into_inner()).await?)
    }

    async fn untag_image(&self, request: Request<hull::UntagImageRequest>) -> Answer<hull::UntagImageReply> {
        ok(self.0.untag_image(request.into_inner()).await?)
    }

    async fn prune_images(
        &self,
        request: Request<hull::PruneImagesRequest>,
    ) -> Answer<hull::PruneImagesReply> {
        ok(self.0.prune_images(request.into_inner()).await?)
    }

    async fn disk_usage(&self, request: Request<hull::DiskUsageRequest>) -> Answer<hull::DiskUsageReply> {
        ok(self.0.disk_usage(request.get_ref()).await?)
    }

    async fn check_images(
        &self,
        request: Request<hull::CheckImagesRequest>,
    ) -> Answer<BoxStream<'static, Result<hull::CheckImagesProgress, Status>>> {
        ok(self.0.check_images(request.into_inner()).boxed())
    }

    async fn save_images(
        &self,
        request: Request<hull::SaveImagesRequest>,
    ) -> Answer<BoxStream<'static, Result<hull::Chunk, Status>>> {
        ok(self.0.save_images(request.into_inner()).await?)
    }

    async fn load_images(
        &self,
        request: Request<tonic::Streaming<hull::Chunk>>,
    ) -> Answer<BoxStream<'static, Result<hull::LoadedImage, Status>>> {
        ok(self.0.load_images(request.into_inner()).await?.boxed())
    }

    async fn push_image(
        &self,
        request: Request<hull::PushImageRequest>,
    ) -> Answer<BoxStream<'static, Result<hull::PushProgress, Status>>> {
        ok(self.0.push_image(request.into_inner())?.boxed())
    }

    async fn commit_container(
        &self,
        request: Request<hull::CommitContainerRequest>,
    ) -> Answer<hull::CommitContainerReply> {
        ok(self.0.commit_container(request.into_inner()).await?)
    }

    async fn start_container(
        &self,
        request: Request<hull::ContainerRequest>,
    ) -> Answer<hull::StartContainerReply> {
        self.0.start_container_again(&request.get_ref().container).await?;
        ok(hull::StartContainerReply {})
    }

    async fn diff_container(
        &self,
        request: Request<hull::ContainerRequest>,
    ) -> Answer<BoxStream<'static, Result<hull::Difference, Status>>> {
        ok(self.0.diff_container(&request.into_inner())?.boxed())
    }

    async fn export_container(
        &self,
        request: Request<hull::ContainerRequest>,
    ) -> Answer<BoxStream<'static, Result<hull::Chunk, Status>>> {
        ok(self.0.export_container(&request.into_inner())?)
    }

    async fn traces(&self, _: Request<hull::TracesRequest>) -> Answer<hull::TracesReply> {
        ok(self.0.traces().report())
    }
}
