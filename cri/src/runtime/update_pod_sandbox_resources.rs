//! UpdatePodSandboxResources: other limits for a pod as a whole.
//!
//! kubelet asks before it writes the pod's cgroup itself, and takes an error for a refusal of the resize. So a pod of
//! processes whose cgroup is kubelet's has nothing to do but to remember; a machine grows or shrinks.

use std::sync::Arc;

use super::objects::Pod;
use super::translate::resources;
use super::{Error, Result, Runtime};
use crate::api::runtime::{LinuxContainerResources, UpdatePodSandboxResourcesRequest};
use crate::sandbox::PodLimits;
use crate::store::record::{PodPhase, SandboxRecord};

impl Runtime {
    /// Gives the pod the limits that the request names.
    pub async fn update_pod_sandbox_resources(
        self: &Arc<Self>,
        request: UpdatePodSandboxResourcesRequest,
    ) -> Result<()> {
        let pod = self.objects.pod(&request.pod_sandbox_id)?;
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.resize(&pod, &request).await }).await
    }

    async fn resize(&self, pod: &Arc<Pod>, request: &UpdatePodSandboxResourcesRequest) -> Result<()> {
        let nothing = LinuxContainerResources::default();
        for part in [&request.resources, &request.overhead].into_iter().flatten() {
            resources::limits(part)?;
        }
        // Starts of its containers go on meanwhile; two resizes do not.
        let _order = pod.order.read().await;
        let _resizing = pod.resizing.lock().await;
        if pod.phase() != PodPhase::Ready {
            return Err(Error::FailedPrecondition(format!("the pod sandbox {} is not ready", pod.id())));
        }
        let (old_resources, old_overhead) = pod.with_record(in_force);
        let containers = resources::merged(&old_resources, request.resources.as_ref().unwrap_or(&nothing));
        let overhead = resources::merged(&old_overhead, request.overhead.as_ref().unwrap_or(&nothing));
        let limits = PodLimits {
            cgroup: resources::limits(&resources::with_overhead(&containers, &overhead))?,
            containers: resources::limits(&containers)?,
        };
        let doing = format!("cannot resize the pod sandbox {}", pod.id());
        let resized = pod.launcher.resize(&pod.place(), pod.ready_agent()?, &limits).await;
        resized.map_err(Error::sandbox(doing))?;
        pod.try_change(&self.store, |record| {
            record.resources = Some(containers);
            record.overhead = Some(overhead);
        })
    }
}

/// The limits that the pod has: as it was asked for, or as they were changed since.
fn in_force(record: &SandboxRecord) -> (LinuxContainerResources, LinuxContainerResources) {
    let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
    let asked = |part: Option<&LinuxContainerResources>, changed: &Option<LinuxContainerResources>| {
        changed.clone().or_else(|| part.cloned()).unwrap_or_default()
    };
    (
        asked(linux.and_then(|linux| linux.resources.as_ref()), &record.resources),
        asked(linux.and_then(|linux| linux.overhead.as_ref()), &record.overhead),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{LinuxPodSandboxConfig, PodSandboxConfig};

    #[test]
    fn a_second_resize_starts_from_what_the_first_one_left() {
        let memory = |bytes| LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() };
        let linux = LinuxPodSandboxConfig {
            resources: Some(memory(5)),
            overhead: Some(memory(1)),
            ..Default::default()
        };
        let config = PodSandboxConfig { linux: Some(linux), ..Default::default() };
        let mut record = SandboxRecord { config: Some(config), ..Default::default() };
        assert_eq!(in_force(&record), (memory(5), memory(1)));
        record.resources = Some(memory(9));
        assert_eq!(in_force(&record), (memory(9), memory(1)));
    }
}
