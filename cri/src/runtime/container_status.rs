//! ContainerStatus.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::objects::Container;
use super::translate::container::{Facts, plan};
use super::translate::signal;
use super::{Result, Runtime};
use crate::api::runtime::{
    ContainerResources, ContainerState, ContainerStatus, ContainerStatusRequest, ContainerStatusResponse,
    ContainerUser, LinuxContainerUser,
};
use crate::store::record::{ContainerPhase, ContainerRecord};

impl Runtime {
    /// Everything about one container.
    pub fn container_status(&self, request: &ContainerStatusRequest) -> Result<ContainerStatusResponse> {
        let container = self.objects.container(&request.container_id)?;
        let info = if request.verbose {
            verbose(&container, &self.container_directory(container.id()))
        } else {
            BTreeMap::new()
        };
        Ok(ContainerStatusResponse { status: Some(container.with_record(status)), info })
    }
}

/// The state as CRI knows it.
pub(super) fn state(phase: ContainerPhase) -> ContainerState {
    match phase {
        // Not running until the agent says so; kubelet would take UNKNOWN for a broken runtime.
        ContainerPhase::Created | ContainerPhase::Starting => ContainerState::ContainerCreated,
        ContainerPhase::Running => ContainerState::ContainerRunning,
        ContainerPhase::Exited => ContainerState::ContainerExited,
    }
}

pub(super) fn status(record: &ContainerRecord) -> ContainerStatus {
    let config = record.config.clone().unwrap_or_default();
    let stop_signal = config.stop_signal();
    let facts = record.image.clone().unwrap_or_default();
    let mut image = config.image.unwrap_or_default();
    // People know an image by its tag; kubelet asked by id.
    for name in [&facts.repo_tag, &facts.repo_digest] {
        if !name.is_empty() {
            image.image = name.clone();
            break;
        }
    }
    let user = record.user.as_ref().map(|user| ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.groups.iter().map(|group| i64::from(*group)).collect(),
        }),
    });
    let resources = config
        .linux
        .and_then(|linux| linux.resources)
        .map(|linux| ContainerResources { linux: Some(linux), ..Default::default() });
    let mut mounts = config.mounts;
    let of_images = mounts.iter_mut().filter_map(|mount| mount.image.as_mut());
    for (image, volume) in of_images.zip(&record.image_volumes) {
        image.image_ref = volume.image_id.clone();
    }
    // A guest has a clock of its own, some milliseconds off, and tells what it likes.
    let started_at = not_before(record.created_at, record.started_at);
    ContainerStatus {
        id: record.id.clone(),
        metadata: config.metadata,
        state: state(record.phase()).into(),
        created_at: record.created_at,
        started_at,
        finished_at: not_before(started_at.max(record.created_at), record.finished_at),
        exit_code: record.exit_code,
        image: Some(image),
        // The id as ListImages tells it: by this kubelet knows which images are in use.
        image_ref: facts.id.clone(),
        reason: record.reason.clone(),
        message: record.message.clone(),
        labels: config.labels,
        annotations: config.annotations,
        mounts,
        log_path: record.log_path.clone(),
        resources,
        image_id: facts.id,
        user,
        stop_signal: signal::effective(stop_signal, &facts.stop_signal).into(),
    }
}

/// A time that cannot have been earlier than another one. 0, which is none, stays.
fn not_before(earliest: i64, time: i64) -> i64 {
    if time == 0 { 0 } else { time.max(earliest) }
}

fn verbose(container: &Container, directory: &Path) -> BTreeMap<String, String> {
    let record = container.record();
    let plan = plan(&record, &container.pod.record(), directory, &Facts::default());
    let info = json!({
        "sandboxID": record.sandbox_id,
        "pid": record.pid,
        "phase": format!("{:?}", record.phase()),
        "bootId": record.boot_id,
        "image": record.image.as_ref().map(|image| &image.id),
        "layers": record.image.as_ref().map(|image| &image.layers),
        "directory": directory,
        "volumes": record.volumes,
        "runtimeType": container.pod.launcher.name(),
        "config": record.config,
        // What the agent is asked for; without devices and seccomp, which are looked up at the start.
        "plan": plan.map_or_else(|error| error.to_string(), |plan| format!("{:#?}", plan.start)),
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{ContainerConfig, ImageSpec, Signal};
    use crate::store::record::{ImageFacts, RunningUser};

    #[test]
    fn times_are_in_their_order_whatever_a_guests_clock_says() {
        let times = |created_at, started_at, finished_at| {
            let record = ContainerRecord { created_at, started_at, finished_at, ..Default::default() };
            let status = status(&record);
            (status.created_at, status.started_at, status.finished_at)
        };
        assert_eq!(times(5, 6, 7), (5, 6, 7));
        assert_eq!(times(5, 3, 4), (5, 5, 5));
        assert_eq!(times(5, 8, 6), (5, 8, 8));
        // One that was not started, and one that never ran
        assert_eq!(times(5, 0, 0), (5, 0, 0));
        assert_eq!(times(5, 0, 4), (5, 0, 5));
    }

    #[test]
    fn a_status_tells_the_image_by_tag_and_id_and_the_user_by_number() {
        let image = ImageFacts {
            id: "sha256:1".into(),
            repo_tag: "docker.io/library/busybox:latest".into(),
            repo_digest: "docker.io/library/busybox@sha256:2".into(),
            stop_signal: "SIGQUIT".into(),
            ..Default::default()
        };
        let spec = ImageSpec { image: "sha256:1".into(), ..Default::default() };
        let record = ContainerRecord {
            config: Some(ContainerConfig { image: Some(spec), ..Default::default() }),
            image: Some(image),
            user: Some(RunningUser { uid: 1000, gid: 5, groups: vec![5, 6] }),
            phase: ContainerPhase::Running.into(),
            ..Default::default()
        };
        let status = status(&record);
        assert_eq!(status.image.as_ref().unwrap().image, "docker.io/library/busybox:latest");
        assert_eq!((status.image_ref.as_str(), status.image_id.as_str()), ("sha256:1", "sha256:1"));
        assert_eq!(status.stop_signal(), Signal::Sigquit);
        assert_eq!(status.state(), ContainerState::ContainerRunning);
        assert_eq!(status.user.unwrap().linux.unwrap().supplemental_groups, [5, 6]);
    }
}
