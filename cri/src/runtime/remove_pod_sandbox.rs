//! RemovePodSandbox: the pod and its containers are gone, with all that they held.

use std::sync::Arc;

use super::objects::{Pod, pod_key};
use super::{Error, Result, Runtime};

impl Runtime {
    /// Removes a pod, stopping it first if need be. That it is gone already is no error.
    pub async fn remove_pod_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        let pod = match self.objects.pod(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.remove_pod(&pod).await }).await
    }

    async fn remove_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let _order = self.order_to_end(pod).await;
        self.stop_pod(pod).await?;
        for container in pod.containers() {
            self.forget_container(&container).await?;
        }
        self.store.sandboxes.remove(pod.id())?;
        self.objects.remove_pod(pod.id());
        if let Some(metadata) = pod.with_record(|record| record.config.clone()?.metadata) {
            self.pod_names.release(&pod_key(&metadata), pod.id());
        }
        Ok(())
    }
}
