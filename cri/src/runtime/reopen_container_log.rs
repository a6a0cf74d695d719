//! ReopenContainerLog: kubelet has renamed the log; writing goes on in a new file.

use std::sync::Arc;

use hull_agent::protocol::messages::{SetLog, request};

use super::translate::container::log_place;
use super::{Error, Result, Runtime, blocking};
use crate::sandbox::Source;
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
        let sources = [Source::Log(place)];
        let slots = blocking(move || launcher.open(&sources)).await?.map_err(Error::sandbox(doing()))?;
        let call = SetLog { container_id: container.id().to_owned(), log: 0 };
        agent.order("reopen a log", request::Call::SetLog(call), slots).await.map_err(Error::sandbox(doing()))
    }
}
