//! GetContainerEvents: what changed, with the state of the whole pod, as soon as it is committed.

use std::sync::{Arc, Weak};

use super::Runtime;
use super::container_status::status as container_status;
use super::objects::Pod;
use super::pod_sandbox_status::status as pod_status;
use crate::api::runtime::{ContainerEventResponse, ContainerEventType, ContainerStatus};
use crate::events::{Board, Stamped, Subscription};
use crate::store::record::{ContainerRecord, SandboxRecord};

/// Where changes of pods and containers are posted.
pub type Changes = Board<Change, ContainerEventResponse>;

/// A change of a pod or container that was just committed.
#[derive(Debug)]
pub struct Change {
    /// What happened.
    pub kind: ContainerEventType,
    /// The pod, for its other containers.
    pub pod: Weak<Pod>,
    /// To whom: the record as it was committed, so that an event never tells of a later state of its own subject.
    pub subject: Subject,
}

/// Whom a change is about.
#[derive(Debug)]
pub enum Subject {
    /// A container.
    Container(Box<ContainerRecord>),
    /// The pod itself, whose event has the sandbox's id; kubelet awaits them (containerd sends them, too).
    Pod(Box<SandboxRecord>),
}

impl Runtime {
    /// Everything that happens from now on, until the client goes away, falls too far behind, or hulld stops.
    pub fn get_container_events(&self) -> Result<Subscription<ContainerEventResponse>, tonic::Status> {
        self.objects.changes().subscribe()
    }

    /// Makes events of changes until hulld ends.
    pub(super) fn tell_changes(self: &Arc<Self>) {
        let runtime = Arc::clone(self);
        let Some(mut changes) = runtime.objects.changes().changes() else { return };
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = runtime.closing.cancelled() => return,
                    change = changes.recv() => match change {
                        Some(change) => runtime.objects.changes().publish(event(change)),
                        None => return,
                    },
                }
            }
        });
    }

    /// From here on nobody is told anything: hulld stops, and an open stream would hold it up.
    pub fn end_events(&self) {
        self.objects.changes().close();
    }
}

fn event(Stamped { at, change }: Stamped<Change>) -> ContainerEventResponse {
    let pod = change.pod.upgrade();
    let mut containers_statuses = pod.as_ref().map(|pod| statuses(pod)).unwrap_or_default();
    let (container_id, pod_sandbox_status) = match change.subject {
        Subject::Pod(record) => (record.id.clone(), Some(pod_status(&record))),
        Subject::Container(record) => {
            let own = container_status(&record);
            containers_statuses.retain(|status| status.id != own.id);
            if change.kind != ContainerEventType::ContainerDeletedEvent {
                containers_statuses.push(own);
            }
            (record.id, pod.map(|pod| pod.with_record(pod_status)))
        }
    };
    ContainerEventResponse {
        container_id,
        container_event_type: change.kind.into(),
        created_at: at,
        pod_sandbox_status,
        containers_statuses,
    }
}

/// The statuses of a pod's containers, oldest first.
pub(super) fn statuses(pod: &Pod) -> Vec<ContainerStatus> {
    let mut statuses: Vec<_> =
        pod.containers().iter().map(|container| container.with_record(container_status)).collect();
    statuses.sort_by_key(|status| status.created_at);
    statuses
}
