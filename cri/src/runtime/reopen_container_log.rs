//! ReopenContainerLog: kubelet has renamed the log; writing goes on in a new file.

use std::sync::Arc;

use super::translate::container::log_place;
use super::{Error, Result, Runtime};
use crate::store::record::ContainerPhase;

impl Runtime {
    /// Opens the log anew and hands it to the agent.
    pub async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let container = self.objects.container(id)?;
        if container.phase() != ContainerPhase::Running {
            return Err(Error::FailedPrecondition(format!("the container {} does not run", container.id())));
        }
        let config = container.with_record(|record| record.config.clone()).unwrap_or_default();
        let pod_config = container.pod.with_record(|record| record.config.clone()).unwrap_or_default();
        let Some(place) = log_place(&config, &pod_config) else {
            return Err(Error::FailedPrecondition(format!("the container {} has no log", container.id())));
        };
        let doing = || format!("cannot reopen the log of the container {}", container.id());
        let agent = container.pod.ready_agent()?;
        let launcher = Arc::clone(&container.pod.launcher);
        let pod = container.pod.place();
        let reopening = launcher.reopen_log(&pod, &agent, container.id(), place).await;
        reopening.map_err(Error::sandbox(doing()))
    }
}
