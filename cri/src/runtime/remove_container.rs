//! RemoveContainer: the container is gone with its writable layer.

use std::sync::Arc;
use std::time::Duration;

use hull_agent::protocol::messages::{Forget, error::Code, request};

use super::objects::{Container, container_key};
use super::{Error, Result, Runtime};
use crate::sandbox::{SandboxError, Slots};
use crate::store::record::ContainerPhase;

impl Runtime {
    /// Removes a container, killing it first if it runs. That it is gone already is no error.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = match self.objects.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.remove(&container).await }).await
    }

    async fn remove(&self, container: &Arc<Container>) -> Result<()> {
        loop {
            // Without the pod's order: should its agent die now, that must be noted for this to go on.
            self.stop(container, Duration::ZERO).await?;
            let _pod_order = container.pod.order.read().await;
            if self.forget_container(container).await? {
                return Ok(());
            }
        }
    }

    /// Clears away what is left of a container; false if it runs (it was started meanwhile). The caller holds its
    /// pod's order.
    pub(super) async fn forget_container(&self, container: &Arc<Container>) -> Result<bool> {
        let _order = container.order.lock().await;
        // Somebody else removed it while we waited.
        if container.pod.container(container.id()).is_none() {
            return Ok(true);
        }
        if !matches!(container.phase(), ContainerPhase::Created | ContainerPhase::Exited) {
            return Ok(false);
        }
        if let Some(agent) = container.pod.agent() {
            let call = request::Call::Forget(Forget { container_id: container.id().to_owned() });
            match agent.order("forget a container", call, Slots::default()).await {
                Ok(()) | Err(SandboxError::Lost(_) | SandboxError::Refused { code: Code::NotFound, .. }) => {}
                Err(error) => {
                    return Err(Error::sandbox(format!("cannot remove the container {}", container.id()))(
                        error,
                    ));
                }
            }
        }
        let place = container.pod.place();
        let given_up = container.pod.launcher.forget(&place, container.id()).await;
        given_up.map_err(Error::sandbox(format!("cannot remove the container {}", container.id())))?;
        self.remove_tree(self.container_directory(container.id())).await?;
        self.store.containers.remove(container.id())?;
        self.objects.remove_container(container);
        let metadata =
            container.with_record(|record| record.config.clone().and_then(|config| config.metadata));
        if let Some(metadata) = metadata {
            self.container_names.release(&container_key(container.pod.id(), &metadata), container.id());
        }
        Ok(true)
    }
}
