//! UpdateContainerResources: other limits for a container, running or not.

use std::sync::Arc;

use hull_agent::protocol::messages::{self, request};

use super::objects::Container;
use super::translate::resources;
use super::{Error, Result, Runtime};
use crate::api::runtime::{LinuxContainerResources, UpdateContainerResourcesRequest};
use crate::sandbox::Slots;
use crate::store::record::{ContainerPhase, ContainerRecord};

impl Runtime {
    /// Sets the limits that the request names; a container that is not started yet starts with them.
    pub async fn update_container_resources(
        self: &Arc<Self>,
        request: UpdateContainerResourcesRequest,
    ) -> Result<()> {
        let container = self.objects.container(&request.container_id)?;
        let Some(update) = request.linux else { return Ok(()) };
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.update_resources(&container, &update).await }).await
    }

    async fn update_resources(
        &self,
        container: &Arc<Container>,
        update: &LinuxContainerResources,
    ) -> Result<()> {
        resources::limits(update)?;
        let oom_score_adj = resources::oom_score_adj(Some(update))?;
        let _pod_order = container.pod.order.read().await;
        let _order = container.order.lock().await;
        match container.phase() {
            ContainerPhase::Exited => {
                return Err(Error::FailedPrecondition(format!(
                    "the container {} has ended; its limits cannot be changed",
                    container.id()
                )));
            }
            ContainerPhase::Created => {}
            ContainerPhase::Starting | ContainerPhase::Running => {
                let old = container.with_record(asked_for);
                let limits = resources::limits(&resources::update(&old, update))?;
                let call = messages::UpdateResources {
                    container_id: container.id().to_owned(),
                    resources: Some(limits.clone()),
                    // As with every number here, 0 is "not given".
                    oom_score_adj: (oom_score_adj != 0).then_some(oom_score_adj),
                };
                let agent = container.pod.ready_agent()?;
                let call = request::Call::UpdateResources(call);
                let doing = format!("cannot change the limits of the container {}", container.id());
                let changed = agent.order("change limits", call, Slots::default()).await;
                changed.map_err(Error::sandbox(doing.clone()))?;
                let (launcher, place) = (&container.pod.launcher, container.pod.place());
                let announced = launcher.announce(&place, container.id(), None, &limits).await;
                announced.map_err(Error::sandbox(doing))?;
            }
        }
        container.try_change(&self.store, |record| {
            let Some(config) = &mut record.config else { return };
            let linux = config.linux.get_or_insert_default();
            let old = linux.resources.clone().unwrap_or_default();
            linux.resources = Some(resources::merged(&old, &resources::update(&old, update)));
        })
    }
}

fn asked_for(record: &ContainerRecord) -> LinuxContainerResources {
    let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
    linux.and_then(|linux| linux.resources.clone()).unwrap_or_default()
}
